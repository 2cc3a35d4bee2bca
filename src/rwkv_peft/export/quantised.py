"""A model file with its matrices quantised: smaller, and loaded without quantising anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import check_finite, stream_tensors
from ..errors import CheckpointError, ConfigError, OutputError
from ..loading import check_model, find_quantised, quantised_layer, without_values
from ..ops.quant import form_in_file
from ..packed import DTYPE, FINGERPRINT, Packed, fingerprint_of, read_by_layer, read_model


def export_quantised(
    path: Path | str, out_path: Path | str, quant: str, quant_head: bool = False, overwrite: bool = False
) -> Path:
    """Write the model in `path` with the matrices of its layers in the format `quant`; returns `out_path`.

    The names are those of bitsandbytes; everything else stays as it is. `load_model` loads it as the same model that it
    makes of `path` with this `quant`, and adapters of one fit the other.

    Raises CheckpointError if `path` is no whole model or quantised already, OutputError if `out_path` exists or cannot
    be written.
    """
    out = Path(out_path)
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: ends in {out.suffix or 'nothing'}; a quantised model is a .safetensors file")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; choose another name, or give --overwrite")
    entries = read_model(path)
    if any(isinstance(entry, Packed) for entry in entries.values()):
        raise CheckpointError(f"{path}: is quantised already; name the dense file")
    kind, sizes = check_model(path, entries)
    _, names = find_quantised(path, without_values(kind, sizes, entries), entries, quant, quant_head)
    number = str(next(e.dtype for name, e in entries.items() if name in names)).removeprefix("torch.")
    metadata = {"format": "pt", FINGERPRINT: fingerprint_of(path), DTYPE: number}
    announced = tensors_of(path, names, lambda _, weight: form_in_file(weight, quant))
    # plain numbers first: small tensors made between large ones that go would keep the memory of these from being used
    plain = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in announced]
    forms = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape, dtype in plain}
    written = tensors_of(path, names, lambda n, w: quantised_layer(path, n, w, quant, w.dtype).to_file())
    stream_tensors(out, forms, (tensor for _, tensor in written), metadata)
    return out


def tensors_of(
    path: Path | str, quantised: set[str], to_file: Callable[[str, Tensor], dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a dense model file, with what `to_file` gives in the place of the matrices to be quantised."""
    for name, weight in read_by_layer(path):
        assert isinstance(weight, Tensor)
        check_finite(path, name, weight)
        if name in quantised:
            yield from ((f"{name.removesuffix('weight')}{own}", part) for own, part in to_file(name, weight).items())
        else:
            yield name, weight
