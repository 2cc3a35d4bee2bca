"""What the folder of an adapter holds, or an adapter file of the original program; and whether it fits a base."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint import check_finite, read_tensors
from ..config import FOREIGN, AdapterConfig, ChatForm
from ..errors import CheckpointError, ConfigError
from ..models import SHIFT, STATES, WKV, Sizes
from . import foreign
from .attach import ADAPTERS
from .base import AdaptedLinear
from .original import read_original
from .saved import PREFIX, Base, SavedAdapter

FORMAT = 1
Entry = TypeVar("Entry", ChatForm, Base)


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
    form = _entry(path, "form", ours, ChatForm)
    form = dataclasses.replace(form, special_tokens=tuple(form.special_tokens))
    return SavedAdapter(
        config, tensors, parts | states, str(ours.get("base", "")), form, _entry(path, "against", ours, Base)
    )


def read_adapters(
    paths: Sequence[Path | str], alpha: float | None = None, pissa_init: Path | str | None = None
) -> list[SavedAdapter]:
    """As `read_adapter`, of each; the options are for those that are files of the original program.

    Raises ConfigError if an option is given that none of them needs.
    """
    files = [Path(path).is_file() for path in paths]
    flag = "--alpha" if alpha is not None else "--pissa-init" if pissa_init is not None else ""
    if flag and not any(files):
        raise ConfigError(
            f"{flag}: only for an adapter .pth of the original program; a folder holds its own; leave it out"
        )
    found = [
        read_adapter(path, alpha, pissa_init) if is_file else read_adapter(path)
        for path, is_file in zip(paths, files, strict=True)
    ]
    methods = {saved.config.peft for saved, is_file in zip(found, files, strict=True) if is_file and saved.config}
    if alpha is not None and "lora" not in methods:
        raise ConfigError(f"--alpha {alpha:g}: only a LoRA has it; leave it out")
    if pissa_init is not None and "pissa" not in methods:
        raise ConfigError(f"--pissa-init {pissa_init}: only a PiSSA has it; leave it out")
    return found


def check_fit(path: Path | str, saved: SavedAdapter, base: Mapping[str, tuple[int, ...]], sizes: Sizes) -> None:
    """Raise CheckpointError unless the adapter is complete and all of it fits a base of these shapes and sizes."""
    expected: dict[str, tuple[int, ...]] = {}
    is_ours = saved.config is not None and saved.config.peft in ADAPTERS
    for target in saved.config.targets if saved.config and is_ours else ():
        shape = base.get(f"{target}.weight", ())
        if len(shape) != 2:
            raise CheckpointError(f"{path}: adapts {target}, which this base has not; name its own base")
        expected |= {f"{target}.{key}": size for key, size in _file_shapes(path, saved.config, shape).items()}  # type: ignore[arg-type]
    odd = sorted(expected.keys() ^ saved.tensors.keys()) if is_ours else []
    states = _state_shapes(sizes, saved.parts)
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


def _file_shapes(path: Path | str, config: AdapterConfig, matrix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes that a matrix's tensors have in a folder."""
    try:
        with torch.device("meta"):
            layer = ADAPTERS[config.peft](nn.Linear(matrix[1], matrix[0], bias=False), config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: does not fit this base ({error}); name its own base") from error
    return {name: tuple(tensor.shape) for name, tensor in layer.to_file().items()}


def _state_shapes(sizes: Sizes, parts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the learned states of every layer, of the kinds that `parts` hold."""
    kinds = tuple(kind for kind in STATES if any(name.endswith(kind) for name in parts))
    shapes = {WKV: (sizes.heads, sizes.head_size, sizes.head_size)} | dict.fromkeys(SHIFT, (sizes.width,))
    every = {name.format(i): shape for i in range(sizes.layers) for name, shape in shapes.items()}
    return {name: shape for name, shape in every.items() if name.endswith(kinds)}


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


def _entry(path: Path, name: str, ours: Mapping[str, Any], kind: type[Entry]) -> Entry:
    """An entry of rwkv_peft.json that has the fields of a dataclass, or the defaults of those that it has not."""
    entries = ours.get(name, {})
    plain = {field.name: field.default for field in dataclasses.fields(kind)}
    if isinstance(entries, dict) and all(key in plain and _alike(value, plain[key]) for key, value in entries.items()):
        return kind(**entries)
    raise CheckpointError(f"{path}/rwkv_peft.json: the entry {name} is damaged; copy the folder again")


def _alike(value: object, default: object) -> bool:
    """Whether a value from JSON can stand where this default does."""
    if isinstance(default, tuple):
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    return value == default or isinstance(value, str if default is None else type(default))


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
