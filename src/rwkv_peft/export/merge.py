"""Adapters added to their base: a model file like any other, written a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from ..adapters import ADAPTERS, SavedAdapter, attach_saved, foreign, read_adapters
from ..adapters.reading import check_fit
from ..adapters.saved import Base
from ..checkpoint import DTYPES, check_finite, check_suffix, is_finite, stream_tensors
from ..config import FOREIGN
from ..errors import CheckpointError, ConfigError, OutputError
from ..loading import check_model, find_quantised, load_model, without_values
from ..models import Rwkv, Sizes
from ..ops.quant import quantize
from ..packed import Entry, Packed, fingerprint_of, read_by_layer, read_model

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
    if onto not in ("dense", "trained"):
        raise ConfigError(f"--onto {onto}: unknown; allowed are dense trained")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; choose another name, or give --overwrite")
    entries = read_model(base_path)
    kind, sizes = check_model(base_path, entries)
    paths = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    adapters = list(zip(paths, read_adapters(paths, alpha, pissa_init), strict=True))
    rounding = Rounding()
    if onto == "trained":
        rounding = rounding_of(base_path, entries, kind, trained_against(adapters))
    foreigners = [pair for pair in adapters if pair[1].config and pair[1].config.peft.startswith(FOREIGN)]
    if foreigners:
        changes = [merge_foreign(base_path, *foreigners[0], alone=len(paths) == 1)]
    else:
        check_belong(adapters, entries, sizes, fingerprint_of(base_path))
        changes = [saved for _, saved in adapters]
    forms = merged_forms(entries, changes, dtype)
    stream_tensors(out, forms, merged_tensors(base_path, forms, changes, rounding))
    return out


def trained_against(adapters: Iterable[tuple[Path | str, SavedAdapter]]) -> Base:
    """What the adapters were trained against. Raises ConfigError if that is the dense base, or not the same for all."""
    found = {saved.against for _, saved in adapters}
    if len(found) > 1 or Base().quant in {base.quant for base in found}:
        raise ConfigError("--onto trained: only for adapters that were trained with one --quant; leave it out")
    return found.pop()


@dataclass(frozen=True)
class Rounding:
    """Which matrices of a dense file training kept quantised, and how; `base` is None if that does not matter."""

    names: frozenset[str] = frozenset()
    base: Base | None = None

    def weight(self, name: str, entry: Entry) -> Tensor:
        """What an adapter is added to."""
        if self.base is None:
            return entry.dense() if isinstance(entry, Packed) else entry
        dtype = DTYPES[self.base.precision]
        if isinstance(entry, Packed):
            return entry.dense(dtype)
        return quantize(entry, self.base.quant, dtype).dense() if name in self.names else entry


def rounding_of(path: Path | str, entries: Mapping[str, Entry], kind: type[Rwkv], base: Base) -> Rounding:
    """That of a model file, for adapters that were trained against `base`. Raises ConfigError if the file is not it."""
    own = {entry.quant for entry in entries.values() if isinstance(entry, Packed)}
    head = "head.weight" if isinstance(entries["head.weight"], Packed) and not base.quant_head else ""
    if own - {base.quant} or head:
        raise ConfigError(
            f"--onto trained: the adapter was trained against {base.quant}{', the head dense' if head else ''}, and "
            f"{path} holds {head or 'matrices'} in {' '.join(sorted(own))}; name the dense file, or leave it out"
        )
    model = without_values(kind, kind.sizes_of({name: tuple(e.shape) for name, e in entries.items()}), entries)
    _, names = find_quantised(path, model, entries, base.quant, base.quant_head)
    return Rounding(frozenset(names), base)


def check_belong(
    adapters: Iterable[tuple[Path | str, SavedAdapter]], entries: Mapping[str, Entry], sizes: Sizes, fingerprint: str
) -> None:
    """Raise CheckpointError if an adapter was trained on another base, or does not fit this one."""
    shapes = {name: tuple(entry.shape) for name, entry in entries.items()}
    for path, adapter in adapters:
        if adapter.base and adapter.base != fingerprint:
            raise CheckpointError(f"{path}: was trained on a base with other weights than this one; name that base")
        check_fit(path, adapter, shapes, sizes)


def merged_forms(entries: Mapping[str, Entry], changes: Iterable[SavedAdapter], dtype: str) -> dict[str, Tensor]:
    """The tensors of the merged file, on the meta device: the base's, then what only adapters have."""
    found = {name: (tuple(entry.shape), entry.dtype) for name, entry in entries.items()}
    for change in changes:
        for name, part in change.parts.items():
            found.setdefault(name, (tuple(part.shape), torch.float32))
    return {n: torch.empty(shape, dtype=DTYPES.get(dtype, own), device="meta") for n, (shape, own) in found.items()}


def merged_tensors(
    base_path: Path | str, forms: Mapping[str, Tensor], changes: Sequence[SavedAdapter], rounding: Rounding
) -> Iterator[Tensor]:
    """The tensors of the merged file, each made when it is asked for. Raises CheckpointError for NaN or Inf."""
    pairs = zip_longest(forms.items(), read_by_layer(base_path))  # what the base has not comes last
    for (name, form), found in pairs:
        entry = found[1] if found else None
        weight = rounding.weight(name, entry) if entry is not None else None
        merged = merged_tensor(name, weight, changes).to(form.dtype).view(form.shape)
        if not is_finite(merged):
            raise not_finite(base_path, name, entry, form.dtype)
        yield merged


def not_finite(base_path: Path | str, name: str, entry: Entry | None, dtype: torch.dtype) -> CheckpointError:
    """The error of a merged tensor that holds NaN or Inf. Raises that of the base's own, if it is to blame."""
    if isinstance(entry, Packed):
        check_finite(base_path, name, entry.dense(torch.float32))
    elif entry is not None:
        check_finite(base_path, name, entry)
    number = str(dtype).removeprefix("torch.")
    return CheckpointError(f"{base_path}: merged, {name} holds NaN or Inf in {number}; try --dtype fp32")


def merged_tensor(name: str, weight: Tensor | None, changes: Iterable[SavedAdapter]) -> Tensor:
    """A tensor of the base with the change that each adapter makes alone, float32; itself if none does.

    `weight` is None for what the base has not: a learned state.
    """
    merged = None
    for change in changes:
        changed = changed_tensor(name, weight, change)
        if changed is not None and merged is not None:
            merged = merged + (changed if weight is None else changed - weight.float())
        elif changed is not None:
            merged = changed
    found = weight if merged is None else merged
    assert found is not None
    return found


def changed_tensor(name: str, weight: Tensor | None, adapter: SavedAdapter) -> Tensor | None:
    """A tensor of the base as an adapter alone leaves it, float32; None if it leaves it as it is."""
    config = adapter.config
    target, _, leaf = name.rpartition(".")
    if config is not None and weight is not None and leaf == "weight" and target in config.targets:
        return ADAPTERS[config.peft].merged(weight, adapter.of_matrix(target), config)
    part = adapter.parts.get(name)
    return None if part is None else part.float().view(part.shape if weight is None else weight.shape)


def merge_foreign(base_path: Path | str, path: Path | str, adapter: SavedAdapter, alone: bool) -> SavedAdapter:
    """What an adapter that only PEFT can merge makes of the base, as parts that take the place of the base's."""
    if not alone:
        raise ConfigError(f"{path}: an adapter of PEFT's merges alone; merge one after the other")
    model = load_model(base_path)
    attach_saved(model, adapter, path)
    return SavedAdapter(None, parts=foreign.merged_tensors(model))
