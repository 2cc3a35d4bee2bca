"""Adapter folders, in the form of Hugging Face PEFT.

adapter_config.json, adapter_model.safetensors   what PEFT reads: the adapter
parts.safetensors                                parts trained in full, under their official names, if there are any
rwkv_peft.json                                   our format version, and the fingerprint of the base
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint import check_finite, read_tensors, write_tensors
from ..config import AdapterConfig
from ..errors import CheckpointError, ConfigError, OutputError
from ..files import write_folder, write_text
from .attach import ADAPTERS, adapted, attach_adapter

FORMAT = 1
FILES = ("adapter_config.json", "adapter_model.safetensors", "parts.safetensors", "rwkv_peft.json")
PREFIX = "base_model.model."  # PEFT's, before every name

Model = TypeVar("Model", bound=nn.Module)


@dataclasses.dataclass
class AdapterFolder:
    """What a folder holds, read and checked, under official names."""

    config: AdapterConfig
    tensors: dict[str, Tensor]
    """E.g. `blocks.0.att.key.lora_A.weight`."""
    parts: dict[str, Tensor]
    """E.g. `blocks.0.ln1.weight`."""
    base: str
    """Fingerprint of the base; empty if the folder was not written by us."""

    def of_matrix(self, target: str) -> dict[str, Tensor]:
        """The adapter's tensors of one matrix, by their names within it."""
        return {name: self.tensors[f"{target}.{name}"] for name in ADAPTERS[self.config.peft].tensors}


def save_adapter(model: nn.Module, folder: Path | str) -> None:
    """Write the model's adapter, and every other parameter that trains, as an adapter folder.

    An adapter that is there already is replaced. Raises ConfigError if the model has no adapter, OutputError if the
    folder holds something else or cannot be written.
    """
    folder = Path(folder)
    config = getattr(model, "adapter_config", None)
    if config is None:
        raise ConfigError("save_adapter: the model has no adapter; attach one first")
    layers = dict(adapted(model))
    tensors = {f"{name}.{key}": p for name, layer in layers.items() for key, p in layer.trained().items()}
    parts = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in tensors}
    parts |= {n: model.get_parameter(n) for n in getattr(model, "adapter_parts", ())}
    others = sorted(p.name for p in folder.iterdir() if p.name not in FILES) if folder.is_dir() else []
    if others:
        raise OutputError(f"{folder}: holds {others[0]}, which is no adapter's file; name a new folder")
    settings = peft_config(config, layers, getattr(model, "source", ""))
    ours = {"format": FORMAT, "base": getattr(model, "fingerprint", ""), "parts": sorted(parts)}

    def write(temporary: Path) -> None:
        write_tensors(temporary / "adapter_model.safetensors", {PREFIX + name: t for name, t in tensors.items()})
        if parts:
            write_tensors(temporary / "parts.safetensors", parts)
        write_text(temporary / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
        write_text(temporary / "rwkv_peft.json", json.dumps(ours, indent=2) + "\n")

    write_folder(folder, write)


def load_adapter(model: Model, folder: Path | str) -> Model:
    """Attach the adapter in `folder`, with its parts, to the base it was trained on; in place.

    Raises CheckpointError if the folder is damaged, or does not belong to this model.
    """
    saved = read_adapter(folder)
    if saved.base and getattr(model, "fingerprint", saved.base) != saved.base:
        raise CheckpointError(f"{folder}: was trained on a base with other weights than {model.source}; load that base")
    check_fit(folder, saved, {name: tuple(p.shape) for name, p in model.named_parameters()})
    attach_adapter(model, saved.config)
    for name, value in {**saved.tensors, **saved.parts}.items():
        parameter = model.get_parameter(name)
        parameter.data = value.to(parameter.device, torch.float32)
    model.adapter_parts = tuple(saved.parts)  # type: ignore[assignment]
    return model


def read_adapter(folder: Path | str) -> AdapterFolder:
    """Everything in an adapter folder. Raises CheckpointError if a file is missing or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; an adapter is a folder with adapter_config.json in it")
    settings = _read_json(folder / "adapter_config.json")
    ours = _read_json(folder / "rwkv_peft.json") if (folder / "rwkv_peft.json").exists() else {}
    if ours.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{folder}: has format {ours['format']}; this program reads {FORMAT}; update it")
    tensors = read_tensors(folder / "adapter_model.safetensors")
    stray = [name for name in tensors if not name.startswith(PREFIX)]
    if stray:
        raise CheckpointError(
            f"{folder}: tensor {stray[0]} does not begin with {PREFIX}; it is no adapter of PEFT's form"
        )
    parts = read_tensors(folder / "parts.safetensors") if (folder / "parts.safetensors").exists() else {}
    if sorted(parts) != ours.get("parts", sorted(parts)):
        raise CheckpointError(
            f"{folder}: parts.safetensors does not hold what rwkv_peft.json lists; copy the folder again"
        )
    plain = {name[len(PREFIX) :]: tensor for name, tensor in tensors.items()}
    for name, tensor in {**plain, **parts}.items():
        check_finite(folder, name, tensor)
    return AdapterFolder(_adapter_config(folder, settings, plain), plain, parts, ours.get("base", ""))


def check_fit(folder: Path | str, saved: AdapterFolder, base: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the folder is complete and all of it fits a base of these shapes."""
    expected: dict[str, tuple[int, ...]] = {}
    for target in saved.config.targets:
        shape = base.get(f"{target}.weight", ())
        if len(shape) != 2:
            raise CheckpointError(f"{folder}: adapts {target}, which this base has not; name its own base")
        with torch.device("meta"):
            layer = ADAPTERS[saved.config.peft](nn.Linear(shape[1], shape[0], bias=False), saved.config)
        expected |= {f"{target}.{key}": tuple(p.shape) for key, p in layer.trained().items()}
    odd = sorted(expected.keys() ^ saved.tensors.keys())
    if odd or not expected:
        what = odd[0] if odd else "every tensor"
        raise CheckpointError(f"{folder}: {what} is missing or has no use; copy the folder again")
    expected |= {name: base.get(name, ()) for name in saved.parts}
    for name, tensor in {**saved.tensors, **saved.parts}.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(f"{folder}: {name} {tuple(tensor.shape)} does not fit this base; name its own base")


def peft_config(config: AdapterConfig, matrices: Iterable[str], source: str) -> dict[str, Any]:
    """The settings as PEFT's `adapter_config.json` has them; the targets are the full names of the matrices."""
    method = ADAPTERS[config.peft]
    common = {"peft_type": method.peft_type, "base_model_name_or_path": source, "task_type": None}
    return {**common, "inference_mode": True, "target_modules": sorted(matrices), **method.to_peft(config)}


def _adapter_config(folder: Path, settings: Mapping[str, Any], tensors: Iterable[str]) -> AdapterConfig:
    methods = {method.peft_type: method for method in ADAPTERS.values()}
    method = methods.get(str(settings.get("peft_type")))
    if method is None:
        got, allowed = settings.get("peft_type"), " ".join(methods)
        raise CheckpointError(f"{folder}: holds an adapter of type {got}; allowed are {allowed}")
    # PEFT can name its targets by a pattern, or leave layers out: the tensors tell which they are
    targets = {name.removesuffix(f".{own}") for name in tensors for own in method.tensors if name.endswith(f".{own}")}
    try:
        config = dataclasses.replace(method.from_peft(settings), targets=tuple(sorted(targets)))
        config.check()
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        what = str(error) if isinstance(error, ValueError) else f"an entry is missing or out of range ({error})"
        raise CheckpointError(f"{folder}/adapter_config.json: {what}; merge it with PEFT, or copy it again") from error
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; an adapter folder needs it") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy the folder again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no object; copy the folder again")
    return found
