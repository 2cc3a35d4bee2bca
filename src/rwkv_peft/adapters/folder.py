"""Adapter folders, in the form of Hugging Face PEFT.

adapter_config.json, adapter_model.safetensors   what PEFT reads: the adapter, where there is one of matrices
parts.safetensors                                parts trained in full, under their official names, if there are any
state.pth                                        a learned initial state, in the official form, if there is one
rwkv_peft.json                                   our format version, the method, and the fingerprint of the base
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint import NAMES, write_tensors
from ..config import FOREIGN, AdapterConfig, ChatForm
from ..errors import CheckpointError, ConfigError, OutputError
from ..files import write_folder, write_text
from ..models import STATES, Rwkv
from ..ops.matrix import QuantizedLinear
from . import foreign
from .attach import ADAPTERS, adapted, is_merged, unmerged, wrap
from .base import AdaptedLinear, unshortened
from .reading import FORMAT, check_fit, read_adapter
from .saved import Base, SavedAdapter, file_name
from .trainable import add_parts, freeze, make_trainable

FILES = ("adapter_config.json", "adapter_model.safetensors", "parts.safetensors", "state.pth", "rwkv_peft.json")

Model = TypeVar("Model", bound=nn.Module)


def save_adapter(model: nn.Module, folder: Path | str) -> None:
    """Write the model's adapter, and every other parameter that trains, as an adapter folder.

    An adapter that is there already is replaced. Raises ConfigError if the model has no adapter, or several, and
    OutputError if the folder holds something else or cannot be written.
    """
    folder = Path(folder)
    config: AdapterConfig | None = getattr(model, "adapter_config", None)
    if config is None:
        raise ConfigError("save_adapter: the model has no adapter; attach one first")
    if getattr(model, "adapter_count", 1) > 1:
        raise ConfigError("save_adapter: the model has several adapters; load the one to save alone")
    others = sorted(p.name for p in folder.iterdir() if p.name not in FILES) if folder.is_dir() else []
    if others:
        raise OutputError(f"{folder}: holds {others[0]}, which is no adapter's file; name a new folder")
    with unmerged(model):
        _save(model, folder, config)


def _save(model: nn.Module, folder: Path, config: AdapterConfig) -> None:
    """As `save_adapter`, of a model whose adapter is not merged."""
    layers = dict(adapted(model))
    tensors = foreign.tensors(model) or {
        f"{n}.{k}": t.cpu() for n, layer in layers.items() for k, t in layer.to_file().items()
    }
    parts, states = split_states(trained_parts(model, layers))
    settings = foreign.settings(model) or peft_config(config, layers, getattr(model, "source", ""))
    ours = {
        "format": FORMAT, "peft": config.peft, "base": getattr(model, "fingerprint", ""), "parts": sorted(parts),
        "state": sorted(states),
    }  # fmt: skip
    if isinstance(model, Rwkv) and model.quant != "none":
        head = isinstance(model.head, QuantizedLinear) or isinstance(getattr(model.head, "base", None), QuantizedLinear)
        ours["against"] = asdict(Base(model.quant, head, NAMES[model.dtype]))
    form = getattr(model, "form", ChatForm())
    if form != ChatForm():
        ours["form"] = asdict(form)

    def write(temporary: Path) -> None:
        if tensors:
            write_tensors(temporary / "adapter_model.safetensors", {file_name(name): t for name, t in tensors.items()})
            write_text(temporary / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
        if parts:
            write_tensors(temporary / "parts.safetensors", parts)
        if states:
            write_tensors(temporary / "state.pth", states)
        write_text(temporary / "rwkv_peft.json", json.dumps(ours, indent=2) + "\n")

    write_folder(folder, write)


def load_adapter(
    model: Model, path: Path | str, alpha: float | None = None, pissa_init: Path | str | None = None
) -> Model:
    """Attach the adapter in a folder, with its parts, to the base it was trained on; in place.

    The first adapter of a model trains on, with its parts, and nothing else does. A model may take several, one call
    each: each adds the change that it makes alone, in any order. `path` may also be a `.pth` of the original program:
    `alpha` and `pissa_init` are as in `read_adapter`.

    Raises CheckpointError if the folder is damaged, or does not belong to this model; ConfigError if the model's
    adapters are merged, or one of them is PEFT's own.
    """
    attach_saved(model, read_adapter(path, alpha, pissa_init), path)
    return model


def attach_saved(model: nn.Module, saved: SavedAdapter, path: Path | str) -> None:
    """As `load_adapter`, of an adapter that was read from `path`."""
    config, is_first = saved.config or AdapterConfig("state"), getattr(model, "adapter_config", None) is None
    assert isinstance(model, Rwkv)
    if is_merged(model):
        raise ConfigError("load_adapter: the model's adapters are merged; unmerge_adapter(model) first")
    if not is_first and (config.peft.startswith(FOREIGN) or foreign.of(model)):
        raise ConfigError(f"{path}: an adapter of PEFT's must be the only one; merge the others first")
    if saved.base and model.fingerprint and model.fingerprint != saved.base:
        raise CheckpointError(f"{path}: was trained on a base with other weights than {model.source}; load that base")
    check_fit(path, saved, model.shapes(), model.sizes)
    quantised = [name for name in saved.parts if isinstance(_owner(model, name), QuantizedLinear)]
    if quantised:
        raise ConfigError(
            f"{path}: holds {quantised[0]}, which is quantised here; leave --quant-head out, or name the dense file"
        )
    if is_first:
        freeze(model)
    if config.peft.startswith(FOREIGN):
        foreign.load(model, saved, path)
    elif saved.tensors:
        for name, layer in zip(config.targets, wrap(model, config, config.targets), strict=True):
            layer.from_file(saved.of_matrix(name))
            layer.requires_grad_(False)
    put_parts(model, saved.parts)
    if is_first:
        own = [f"{name}.{key}" for name, layer in adapted(model) for key in layer.trained()]
        make_trainable(model, [*own, *saved.parts])
        model.adapter_config = config
    if model.form == ChatForm():  # of several, the first that has one
        model.form = saved.form
    model.adapter_count += 1


def _owner(model: nn.Module, parameter: str) -> nn.Module | None:
    """The module that a parameter of this name is of; None for one that the model has not yet."""
    try:
        return model.get_submodule(parameter.rpartition(".")[0])
    except AttributeError:
        return None


def put_parts(model: nn.Module, parts: Mapping[str, Tensor]) -> None:
    """Replace parameters by parts that were trained in full; a second adapter's add their change to the first's."""
    add_parts(model, {"state" if name.endswith(".time_state") else "shift" for name in parts if name.endswith(STATES)})
    bases: dict[str, Tensor] = dict(getattr(model, "adapter_bases", {}))
    for name, part in parts.items():
        parameter = model.get_parameter(name)
        value = part.to(parameter.device, torch.float32, copy=True).view(parameter.shape)
        if name not in bases:
            bases[name], parameter.data = parameter.data, value
        else:
            parameter.data = parameter.data + (value - bases[name].float())
    model.adapter_bases = bases  # type: ignore[assignment]


def trained_parts(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> dict[str, Tensor]:
    """Every parameter that trains, or came with an adapter, and is not an adapter's own; float32, on the CPU."""
    own = {f"{name}.{key}" for name, layer in layers.items() for key in layer.trained()} | foreign.parameters(model)
    parts = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in own}
    parts |= {name: model.get_parameter(name) for name in getattr(model, "adapter_bases", ())}
    return {name: unshortened(p.data.cpu()) for name, p in parts.items()}


def split_states(parts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parts of the model, and learned states."""
    return (
        {name: part for name, part in parts.items() if not name.endswith(STATES)},
        {name: part for name, part in parts.items() if name.endswith(STATES)},
    )


def peft_config(config: AdapterConfig, matrices: Iterable[str], source: str) -> dict[str, Any]:
    """The settings as PEFT's `adapter_config.json` has them; the targets are the full names of the matrices."""
    if config.peft not in ADAPTERS:
        return {}
    method = ADAPTERS[config.peft]
    common = {"peft_type": method.peft_type, "base_model_name_or_path": source, "task_type": None}
    return {**common, "inference_mode": True, "target_modules": sorted(matrices), **method.to_peft(config)}
