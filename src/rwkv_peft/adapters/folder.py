"""Adapter folders, in the form of Hugging Face PEFT.

adapter_config.json, adapter_model.safetensors   what PEFT reads: the adapter, where there is one of matrices
parts.safetensors                                parts trained in full, under their official names, if there are any
state.pth                                        a learned initial state, in the official form, if there is one
rwkv_peft.json                                   our format version, the method, and the fingerprint of the base
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
from ..config import FOREIGN, AdapterConfig
from ..errors import CheckpointError, ConfigError, OutputError
from ..files import write_folder, write_text
from . import foreign
from .attach import ADAPTERS, adapted, is_merged, unmerged, wrap
from .base import AdaptedLinear
from .original import read_original
from .saved import PREFIX, SavedAdapter, file_name
from .state_tuning import STATES
from .trainable import add_parts, freeze, make_trainable

FORMAT = 1
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
        f"{n}.{k}": t for n, layer in layers.items() for k, t in layer.to_file().items()
    }
    parts, states = split_states(trained_parts(model, layers))
    settings = foreign.settings(model) or peft_config(config, layers, getattr(model, "source", ""))
    ours = {
        "format": FORMAT, "peft": config.peft, "base": getattr(model, "fingerprint", ""), "parts": sorted(parts),
        "state": sorted(states),
    }  # fmt: skip

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

    A model may take several, one call each: each adds the change that it makes alone, in any order. `path` may also be
    a `.pth` of the original program: `alpha` and `pissa_init` are as in `read_adapter`.

    Raises CheckpointError if the folder is damaged, or does not belong to this model.
    """
    if is_merged(model):
        raise ConfigError("load_adapter: the model's adapters are merged; unmerge_adapter(model) first")
    saved = read_adapter(path, alpha, pissa_init)
    if saved.base and getattr(model, "fingerprint", saved.base) != saved.base:
        raise CheckpointError(f"{path}: was trained on a base with other weights than {model.source}; load that base")
    check_fit(path, saved, {name: tuple(p.shape) for name, p in model.named_parameters()})
    config = saved.config or AdapterConfig("state")
    is_first = getattr(model, "adapter_config", None) is None
    if is_first:
        freeze(model)
    if config.peft.startswith(FOREIGN):
        if not is_first:
            raise ConfigError(f"{path}: an adapter of PEFT's must be the only one; merge the others first")
        foreign.load(model, saved, path)
    elif saved.tensors:
        for name, layer in zip(config.targets, wrap(model, config, config.targets), strict=True):
            layer.from_file(saved.of_matrix(name))
            layer.requires_grad_(False)
    put_parts(model, saved.parts)
    if is_first:
        make_trainable(model, [f"{n}.{k}" for n, layer in adapted(model) for k in layer.trained()])
        make_trainable(model, [n for n in saved.parts if n.endswith(STATES)])
        model.adapter_config = config  # type: ignore[assignment]
    model.adapter_count = getattr(model, "adapter_count", 0) + 1  # type: ignore[assignment]
    return model


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
    """Every parameter that trains, or came with an adapter, and is not an adapter's own."""
    own = {f"{name}.{key}" for name, layer in layers.items() for key in layer.trained()} | foreign.parameters(model)
    parts = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in own}
    return parts | {name: model.get_parameter(name) for name in getattr(model, "adapter_bases", ())}


def split_states(parts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parts of the model, and learned states."""
    return (
        {name: part for name, part in parts.items() if not name.endswith(STATES)},
        {name: part for name, part in parts.items() if name.endswith(STATES)},
    )


def read_adapter(path: Path | str, alpha: float | None = None, pissa_init: Path | str | None = None) -> SavedAdapter:
    """Everything in an adapter folder, or in an adapter `.pth` of the original program.

    Arguments, for the latter alone:
        alpha: lora_alpha of a LoRA, which the file does not hold.
        pissa_init: a PiSSA's file of initial values; `init_pissa.pth` beside the adapter if None.

    Raises CheckpointError if a file is missing or damaged.
    """
    path = Path(path)
    if path.is_file():
        return read_original(path, alpha, None if pissa_init is None else Path(pissa_init))
    if not path.is_dir():
        kind = "file" if path.suffix == ".pth" else "folder; an adapter is a folder with adapter_config.json in it"
        raise CheckpointError(f"{path}: no such {kind}; check the path")
    check_options([path], alpha, pissa_init)
    ours = _read_json(path / "rwkv_peft.json") if (path / "rwkv_peft.json").exists() else {}
    if ours.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{path}: has format {ours['format']}; this program reads {FORMAT}; update it")
    parts, states = (_read_listed(path, file, ours.get(key)) for file, key in (
        ("parts.safetensors", "parts"), ("state.pth", "state"),
    ))  # fmt: skip
    if ours.get("peft") == "state":
        config, tensors = AdapterConfig("state"), {}
    else:
        settings = _read_json(path / "adapter_config.json")
        method = _method(settings, str(ours.get("peft", "")))
        tensors = _read_adapter_tensors(path, foreign=method is None)
        if method and "peft" not in ours and not all(map(method.owns, tensors)):
            method = None  # of matrices that only PEFT adapts, e.g. the embedding
        config = _adapter_config(path, settings, method, tensors) if method else foreign.config_of(path, settings)
    for name, tensor in {**tensors, **parts, **states}.items():
        check_finite(path, name, tensor)
    return SavedAdapter(config, tensors, parts | states, str(ours.get("base", "")))


def check_options(paths: Iterable[Path | str], alpha: float | None, pissa_init: Path | str | None) -> None:
    """Raise ConfigError if an option for files of the original program is given, and none of `paths` needs it."""
    flag = "--alpha" if alpha is not None else "--pissa-init" if pissa_init is not None else ""
    if flag and not any(Path(path).is_file() for path in paths):
        raise ConfigError(
            f"{flag}: only for an adapter .pth of the original program; a folder holds its own; leave it out"
        )
    files = [Path(path) for path in paths if flag and Path(path).is_file()]
    methods = {saved.config.peft for path in files if (saved := read_adapter(path, alpha, pissa_init)).config}
    if files and alpha is not None and "lora" not in methods:
        raise ConfigError(f"--alpha {alpha:g}: only a LoRA has it; leave it out")
    if files and pissa_init is not None and "pissa" not in methods:
        raise ConfigError(f"--pissa-init {pissa_init}: only a PiSSA has it; leave it out")


def check_fit(path: Path | str, saved: SavedAdapter, base: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the adapter is complete and all of it fits a base of these shapes."""
    expected: dict[str, tuple[int, ...]] = {}
    is_ours = saved.config is not None and saved.config.peft in ADAPTERS
    for target in saved.config.targets if saved.config and is_ours else ():
        shape = base.get(f"{target}.weight", ())
        if len(shape) != 2:
            raise CheckpointError(f"{path}: adapts {target}, which this base has not; name its own base")
        expected |= {f"{target}.{key}": size for key, size in _file_shapes(path, saved.config, shape).items()}  # type: ignore[arg-type]
    odd = sorted(expected.keys() ^ saved.tensors.keys()) if is_ours else []
    states = _state_shapes(base, saved.parts)
    odd += sorted(states.keys() - saved.parts.keys())
    odd += sorted({f"{target}.weight" for target in saved.config.targets} & saved.parts.keys()) if saved.config else []
    if odd or not (saved.tensors or saved.parts):
        what = odd[0] if odd else "every tensor"
        raise CheckpointError(f"{path}: {what} is missing or has no use; copy the folder again")
    expected |= states
    expected |= {name: base.get(name, ()) for name in saved.parts if name not in expected}
    for name, tensor in {**(saved.tensors if is_ours else {}), **saved.parts}.items():
        if _true_axes(tensor.shape) != _true_axes(expected[name]):
            raise CheckpointError(f"{path}: {name} {tuple(tensor.shape)} does not fit this base; name its own base")


def peft_config(config: AdapterConfig, matrices: Iterable[str], source: str) -> dict[str, Any]:
    """The settings as PEFT's `adapter_config.json` has them; the targets are the full names of the matrices."""
    if config.peft not in ADAPTERS:
        return {}
    method = ADAPTERS[config.peft]
    common = {"peft_type": method.peft_type, "base_model_name_or_path": source, "task_type": None}
    return {**common, "inference_mode": True, "target_modules": sorted(matrices), **method.to_peft(config)}


def _file_shapes(path: Path | str, config: AdapterConfig, matrix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes that a matrix's tensors have in a folder."""
    try:
        with torch.device("meta"):
            layer = ADAPTERS[config.peft](nn.Linear(matrix[1], matrix[0], bias=False), config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: does not fit this base ({error}); name its own base") from error
    return {name: tuple(tensor.shape) for name, tensor in layer.to_file().items()}


def _state_shapes(base: Mapping[str, tuple[int, ...]], parts: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the learned states of every layer, of the kinds that `parts` hold."""
    kinds = tuple(kind for kind in STATES if any(name.endswith(kind) for name in parts))
    if not kinds:
        return {}
    width = base["emb.weight"][1]
    heads, size = next(base[f"blocks.0.att.{name}"] for name in ("r_k", "time_faaaa") if f"blocks.0.att.{name}" in base)
    shapes: dict[str, tuple[int, ...]] = {}
    for block in {name.split(".att.")[0] for name in base if ".att." in name}:
        shapes[f"{block}.att.time_state"] = (heads, size, size)
        shapes |= {f"{block}.{mix}.shift_state": (width,) for mix in ("att", "ffn")}
    return {name: shape for name, shape in shapes.items() if name.endswith(kinds)}


def _true_axes(shape: Iterable[int]) -> list[int]:
    """Without those of length 1: a vector may be stored as (D,) or (1,1,D)."""
    return [length for length in shape if length != 1]


def _read_listed(path: Path, file: str, listed: object) -> dict[str, Tensor]:
    """A file of the folder, which holds what rwkv_peft.json lists; nothing if neither is there."""
    tensors = read_tensors(path / file) if (path / file).exists() else {}
    if sorted(tensors) != (sorted(tensors) if listed is None else listed):
        raise CheckpointError(f"{path}: {file} does not hold what rwkv_peft.json lists; copy the folder again")
    return tensors


def _read_adapter_tensors(path: Path, foreign: bool) -> dict[str, Tensor]:
    """The tensors of PEFT's file, without `base_model.model.`; a `foreign` method's may be shared by all layers."""
    tensors = read_tensors(path / "adapter_model.safetensors", whole_numbers=foreign)
    start = "base_model." if foreign else PREFIX
    stray = [name for name in tensors if not name.startswith(start)]
    if stray:
        raise CheckpointError(f"{path}: tensor {stray[0]} does not begin with {start}; it is no adapter of PEFT's form")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _method(settings: Mapping[str, Any], peft: str) -> type[AdaptedLinear] | None:
    """Our own method that a folder is of, by the name in rwkv_peft.json or PEFT's; None if PEFT itself must read it."""
    if peft.startswith(FOREIGN):
        return None
    if peft in ADAPTERS:
        return ADAPTERS[peft]
    by_type = {method.peft_type: method for method in reversed(ADAPTERS.values())}
    method = by_type.get(str(settings.get("peft_type")))
    return method if method and method.reads(settings) else None


def _adapter_config(
    path: Path, settings: Mapping[str, Any], method: type[AdaptedLinear], tensors: Iterable[str]
) -> AdapterConfig:
    """The settings in adapter_config.json."""
    # PEFT can name its targets by a pattern, or leave layers out: the tensors tell which they are
    targets = {name.removesuffix(f".{own}") for name in tensors for own in method.tensors if name.endswith(f".{own}")}
    try:
        config = dataclasses.replace(method.from_peft(settings), targets=tuple(sorted(targets)))
        config.check()
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        what = str(error) if isinstance(error, ValueError) else f"an entry is missing or out of range ({error})"
        raise CheckpointError(f"{path}/adapter_config.json: {what}; merge it with PEFT, or copy it again") from error
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; an adapter folder needs it") from error
    except (OSError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy the folder again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no object; copy the folder again")
    return found
