"""Adapter folders, in the form of Hugging Face PEFT.

adapter_config.json, adapter_model.safetensors   what PEFT reads: the adapter
parts.safetensors                                parts trained in full, under their official names, if there are any
rwkv_peft.json                                   our format version, and the fingerprint of the base
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from ..checkpoint import read_tensors, write_tensors
from ..config import AdapterConfig
from ..errors import CheckpointError, ConfigError
from ..files import write_text
from .attach import ADAPTERS, adapted, attach_adapter

FORMAT = 1
PREFIX = "base_model.model."  # PEFT's, before every name
PEFT_NAMES = {"lora": "LORA"}

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

    def of_module(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors of one matrix, by their names within it."""
        return {key[len(name) + 1 :]: value for key, value in self.tensors.items() if key.startswith(name + ".")}


def save_adapter(model: nn.Module, folder: Path | str) -> None:
    """Write the model's adapter, and every other parameter that trains, as an adapter folder.

    Raises ConfigError if the model has no adapter, OutputError if the folder cannot be written.
    """
    folder = Path(folder)
    config = getattr(model, "adapter_config", None)
    if config is None:
        raise ConfigError("save_adapter: the model has no adapter; attach one first")
    layers = dict(adapted(model))
    tensors = {f"{name}.{key}": p for name, layer in layers.items() for key, p in layer.trained().items()}
    parts = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in tensors}
    parts |= {n: model.get_parameter(n) for n in getattr(model, "adapter_parts", ())}
    write_tensors(folder / "adapter_model.safetensors", {PREFIX + name: t for name, t in tensors.items()})
    if parts:
        write_tensors(folder / "parts.safetensors", parts)
    write_text(folder / "adapter_config.json", _json(peft_config(config, layers, getattr(model, "source", ""))))
    ours = {"format": FORMAT, "base": getattr(model, "fingerprint", ""), "parts": sorted(parts)}
    write_text(folder / "rwkv_peft.json", _json(ours))


def load_adapter(model: Model, folder: Path | str) -> Model:
    """Attach the adapter in `folder`, with its parts, to the base it was trained on; in place.

    Raises CheckpointError if the folder is damaged, or does not belong to this model.
    """
    saved = read_adapter(folder)
    if saved.base and getattr(model, "fingerprint", saved.base) != saved.base:
        raise CheckpointError(f"{folder}: was trained on a base with other weights than {model.source}; load that base")  # type: ignore[attr-defined]
    attach_adapter(model, saved.config)
    own = {f"{name}.{key}": p for name, layer in adapted(model) for key, p in layer.trained().items()}
    if own.keys() != saved.tensors.keys():
        odd = sorted(own.keys() ^ saved.tensors.keys())
        raise CheckpointError(
            f"{folder}: {len(odd)} tensors do not belong to this model, e.g. {odd[0]}; load its own base"
        )
    names = dict(model.named_parameters())
    for name, value in {**saved.tensors, **saved.parts}.items():
        if name not in names or names[name].shape != value.shape:
            raise CheckpointError(f"{folder}: {name} {tuple(value.shape)} does not fit this model; load its own base")
        names[name].data = value.to(names[name].device)
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
    return AdapterFolder(_adapter_config(folder, settings), plain, parts, ours.get("base", ""))


def peft_config(config: AdapterConfig, layers: Mapping[str, nn.Module], source: str) -> dict[str, Any]:
    """The settings as PEFT's `adapter_config.json` has them; the targets are the full names of the matrices."""
    return {
        "peft_type": PEFT_NAMES[config.peft],
        "base_model_name_or_path": source,
        "task_type": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": 2 * config.rank if config.alpha is None else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _adapter_config(folder: Path, settings: Mapping[str, Any]) -> AdapterConfig:
    method = next((ours for ours, peft in PEFT_NAMES.items() if peft == settings.get("peft_type")), None)
    if method not in ADAPTERS:
        raise CheckpointError(
            f"{folder}: holds a {settings.get('peft_type')} adapter; allowed are {' '.join(PEFT_NAMES.values())}"
        )
    special = [key for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if settings.get(key)]
    if special:
        raise CheckpointError(f"{folder}: uses {special[0]}, which is not supported yet")
    targets = settings.get("target_modules")
    try:
        config = AdapterConfig(
            "lora",
            int(settings["r"]),
            float(settings["lora_alpha"]),
            float(settings.get("lora_dropout", 0)),
            tuple(targets or ()),
        )
        config.check()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}/adapter_config.json: {error!r} is missing or out of range; copy the folder again"
        ) from error
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


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
