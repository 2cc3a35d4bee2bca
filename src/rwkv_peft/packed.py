"""Model files with quantised matrices: what stands in the place of a weight, in bitsandbytes' names.

A matrix's indices have its name, `blocks.0.att.key.weight`; beside it are `….weight.absmax`, `….weight.quant_map` and
more, and `….weight.quant_state.bitsandbytes__nf4`, which is JSON. An fp8 matrix has a `…weight_scale` instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import DTYPES, Fingerprint, not_float, read_metadata, read_tensors
from .errors import CheckpointError
from .ops.quant import QUANTS, QuantizedLinear
from .ops.quant.blocks import STATE
from .ops.quant.fp8 import E4M3

MOST_SETTINGS = 4096  # bytes of JSON
FINGERPRINT = "fingerprint"  # in the metadata of a file: that of the dense model it was made from
DTYPE = "dtype"  # there too: the number format that matrices had which cannot tell themselves
NUMBERS = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Packed:
    """A matrix (O,I) as a file holds it."""

    quant: str
    shape: tuple[int, int]
    tensors: dict[str, Tensor]
    """By what follows the matrix's name, as in `QuantizedLinear.to_file`."""
    settings: dict[str, Any]

    def layer(self, dtype: torch.dtype, device: torch.device) -> QuantizedLinear:
        """The layer that holds it, on a device, for activations of this dtype."""
        kind = QUANTS[self.quant]
        buffers = kind.from_file(self.tensors, self.settings)
        return kind(self.shape, {name: t.to(device, copy=True) for name, t in buffers.items()}, dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, in the number format that it had before, or as a model of this dtype computes with it."""
        return self.layer(dtype or self.dtype, torch.device("cpu")).dense()

    @property
    def dtype(self) -> torch.dtype:
        """The number format that the weight had before; bf16 where the file does not tell."""
        return DTYPES.get(NUMBERS.get(str(self.settings.get("dtype")), ""), torch.bfloat16)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


Entry = Tensor | Packed


def read_model(path: Path | str) -> dict[str, Entry]:
    """Every tensor of a model file, memory-mapped; a quantised matrix is one entry, under its weight's name.

    Raises CheckpointError as `read_tensors` does, or if what belongs to a quantised matrix is missing or odd.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    tensors = read_tensors(path, whole_numbers=True)
    metadata = read_metadata(path)
    for name, tensor in tensors.items():
        matrix, weight, rest = name.partition(".weight")
        groups.setdefault(matrix, {})[weight + rest] = tensor
    found: dict[str, Entry] = {}
    for matrix, group in groups.items():
        if ".weight" in group and len(group) > 1:
            own = {name[1:]: tensor for name, tensor in group.items()}
            found[f"{matrix}.weight"] = packed(f"{path}: tensor {matrix}.weight", own, metadata)
            continue
        for rest, tensor in group.items():
            if not tensor.is_floating_point():
                raise not_float(path, matrix + rest, tensor)
            found[matrix + rest] = tensor
    check_scales(path, found)
    return found


def check_scales(path: Path | str, entries: Mapping[str, Entry]) -> None:
    """Raise CheckpointError if some fp8 matrices have a scale, and others have lost theirs."""
    if not any(isinstance(entry, Packed) and entry.quant == "fp8" for entry in entries.values()):
        return
    for name, entry in entries.items():
        if isinstance(entry, Tensor) and entry.dtype == E4M3:
            raise CheckpointError(f"{path}: tensor {name} is fp8 without its {name}_scale; get the file again")


def read_by_layer(path: Path | str) -> Iterator[tuple[str, Entry]]:
    """The entries of a model file in its order, for a file larger than the memory. Raises as `read_model` does.

    What was read of a mapped file counts as memory of this process until the mapping goes, so each layer has its own.
    """
    for _, names in groupby(list(read_model(path)), _layer):
        entries = read_model(path)
        for name in names:
            yield name, entries[name]


def _layer(name: str) -> str:
    """The layer that a tensor is of, e.g. `blocks.0`, or the beginning of its name, e.g. `emb`."""
    first, *rest = name.split(".", 2)
    return f"{first}.{rest[0]}" if first == "blocks" and rest else first


def fingerprint_of(path: Path | str) -> str:
    """The fingerprint of a model file: of its tensors, or of the dense ones that it was made from."""
    written = read_metadata(path).get(FINGERPRINT)
    if written:
        return written
    found = Fingerprint()
    for name, entry in read_by_layer(path):
        if isinstance(entry, Tensor):
            found.add(name, entry)
    return found.digits()


def packed(what: str, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Packed:
    """The matrix that these tensors are, in a file with such metadata.

    Raises CheckpointError, whose message begins with `what`.
    """
    quant = next((name.removeprefix(STATE) for name in tensors if name.startswith(STATE)), "fp8")
    if quant == "fp8" and "weight_scale" not in tensors:
        raise CheckpointError(f"{what}: is without its {STATE}…, which says what it is; get the file again")
    if quant not in QUANTS:
        raise CheckpointError(f"{what}: is stored as {quant}; allowed are {' '.join(QUANTS)}; get another file")
    try:
        settings = _settings(tensors.get(STATE + quant)) or {DTYPE: metadata.get(DTYPE)}
        rows, columns = map(int, tensors["weight"].shape if quant == "fp8" else settings["shape"])
        entry = Packed(quant, (rows, columns), tensors, settings)
        stored = QUANTS[quant].from_file(tensors, settings)
        layout = QUANTS[quant].layout(rows, columns)
        if {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} != layout:
            raise ValueError("shapes that do not fit together")
    except KeyError as error:
        raise CheckpointError(
            f"{what}: is without its {error.args[0]}, which {quant} has; get the file again"
        ) from error
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"{what}: is no {quant} matrix as this program and bitsandbytes store it ({error}); get the file again"
        ) from error
    return entry


def _settings(tensor: Tensor | None) -> dict[str, Any]:
    if tensor is None:
        return {}
    if tensor.numel() > MOST_SETTINGS:
        raise ValueError(f"{tensor.numel()} bytes of settings")
    found = json.loads(bytes(tensor.flatten().tolist()))
    return dict(found)
