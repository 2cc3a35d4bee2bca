"""Adapters added to their base: a model file like any other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..adapters import ADAPTERS, SavedAdapter, attach_saved, foreign, read_adapters
from ..adapters.reading import check_fit
from ..adapters.saved import Base
from ..checkpoint import DTYPES, check_finite, check_suffix, is_finite, write_tensors
from ..config import FOREIGN
from ..errors import CheckpointError, ConfigError, OutputError
from ..loading import check_model, find_quantised, load_model, without_values
from ..models import Rwkv, Sizes
from ..ops.quant import quantize
from ..packed import Entry, Packed, fingerprint_of, read_model

Paths = Path | str | Sequence[Path | str]


def merge(
    base_path: Path | str,
    adapter: Paths,
    out_path: Path | str,
    dtype: str = "same",
    overwrite: bool = False,
    alpha: float | None = None,
    pissa_init: Path | str | None = None,
    onto: str = "dense",
) -> Path:
    """Write the base with an adapter, and the parts trained beside it, added; returns `out_path`.

    Arguments:
        adapter: an adapter folder, or an adapter `.pth` of the original program; of several, each adds the change that
            it makes alone. A learned initial state becomes `blocks.*.att.time_state` in the file.
        out_path: ends in `.pth` or `.safetensors`.
        dtype: `fp32`, `bf16` or `fp16`; `same` keeps each tensor's own. Sums are taken in float32.
        onto: of a base that was quantised in training, `dense` adds to the weights as they are in the file, `trained`
            to the matrices as they were rounded then, which the adapter was trained against.
        alpha, pissa_init: for a `.pth` of the original program, as in `read_adapter`.

    Raises CheckpointError if the files do not belong together, OutputError if `out_path` exists or cannot be written.
    """
    out = Path(out_path)
    check_suffix(out)
    if dtype != "same" and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: unknown; allowed are same {' '.join(DTYPES)}")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; choose another name, or give --overwrite")
    entries = read_model(base_path)
    kind, sizes = check_model(base_path, entries)
    paths = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    adapters = list(zip(paths, read_adapters(paths, alpha, pissa_init), strict=True))
    base = {name: entry.dense() if isinstance(entry, Packed) else entry for name, entry in entries.items()}
    if onto == "trained":
        base = base | as_trained(base_path, entries, kind, trained_against(adapters))
    foreigners = [pair for pair in adapters if pair[1].config and pair[1].config.peft.startswith(FOREIGN)]
    if foreigners:
        merged = merge_foreign(base_path, base, *foreigners[0], alone=len(paths) == 1)
    else:
        merged = merge_tensors(base, adapters, sizes, fingerprint_of(base_path, entries))
    write_tensors(out, in_formats(merged, entries, base_path, dtype))
    return out


def trained_against(adapters: Iterable[tuple[Path | str, SavedAdapter]]) -> Base:
    """What the adapters were trained against. Raises ConfigError if that is the dense base, or not the same for all."""
    found = {saved.against for _, saved in adapters}
    if len(found) > 1 or Base().quant in {base.quant for base in found}:
        raise ConfigError("--onto trained: only for adapters that were trained with one --quant; leave it out")
    return found.pop()


def as_trained(path: Path | str, entries: Mapping[str, Entry], kind: type[Rwkv], base: Base) -> dict[str, Tensor]:
    """The matrices of a dense model file that training kept quantised, as it computed with them."""
    number = DTYPES[base.precision]
    model = without_values(kind, kind.sizes_of({name: tuple(e.shape) for name, e in entries.items()}), entries)
    _, names = find_quantised(path, model, entries, base.quant, base.quant_head)
    dense = {name: entries[name] for name in names}
    return {n: quantize(t, base.quant, number).dense() for n, t in dense.items() if isinstance(t, Tensor)}


def in_formats(
    merged: dict[str, Tensor], base: Mapping[str, Entry], base_path: Path | str, dtype: str
) -> dict[str, Tensor]:
    """The tensors in the number format `dtype`, or for `same` in the base's. Raises CheckpointError for NaN or Inf."""
    written = {}
    for name, tensor in merged.items():
        own = base[name].dtype if name in base else tensor.dtype
        written[name] = tensor.to(own if dtype == "same" else DTYPES[dtype])
        if not is_finite(written[name]):
            entry = base.get(name)
            if isinstance(entry, Tensor):
                check_finite(base_path, name, entry)
            number = str(written[name].dtype).removeprefix("torch.")
            raise CheckpointError(f"{base_path}: merged, {name} holds NaN or Inf in {number}; try --dtype fp32")
    return written


def merge_tensors(
    base: dict[str, Tensor], adapters: Iterable[tuple[Path | str, SavedAdapter]], sizes: Sizes, fingerprint: str
) -> dict[str, Tensor]:
    """The base's tensors under their names; those that an adapter changes are new and float32.

    Raises CheckpointError if an adapter was trained on another base.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    merged = dict(base)
    for path, adapter in adapters:
        if adapter.base and adapter.base != fingerprint:
            raise CheckpointError(f"{path}: was trained on a base with other weights than this one; name that base")
        check_fit(path, adapter, shapes, sizes)
        for name, tensor in changed_tensors(base, adapter).items():
            if name not in merged or merged[name] is base.get(name):
                merged[name] = tensor
            else:
                merged[name] = merged[name] + (tensor - base[name].float() if name in base else tensor)
    return merged


def changed_tensors(base: dict[str, Tensor], adapter: SavedAdapter) -> dict[str, Tensor]:
    """The tensors of the base that an adapter alone changes, as it leaves them, float32."""
    config = adapter.config
    changed = {n: part.float().view(base[n].shape if n in base else part.shape) for n, part in adapter.parts.items()}
    if config is not None and adapter.tensors:
        for target in config.targets:
            name = f"{target}.weight"
            changed[name] = ADAPTERS[config.peft].merged(base[name], adapter.of_matrix(target), config)
    return changed


def merge_foreign(
    base_path: Path | str, base: dict[str, Tensor], path: Path | str, adapter: SavedAdapter, alone: bool
) -> dict[str, Tensor]:
    """As `merge_tensors`, for an adapter that only PEFT can merge."""
    if not alone:
        raise ConfigError(f"{path}: an adapter of PEFT's merges alone; merge one after the other")
    model = load_model(base_path)
    attach_saved(model, adapter, path)
    return base | foreign.merged_tensors(model)
