"""A model file with its matrices quantised: smaller, and loaded without quantising anew."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..checkpoint import check_finite, write_tensors
from ..errors import CheckpointError, ConfigError, OutputError
from ..loading import check_model, find_quantised, layers_of, without_values
from ..ops.quant import quantize
from ..packed import FINGERPRINT, Packed, fingerprint_of, read_model


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
    name_of_weights = fingerprint_of(path, entries)
    _, quantised = find_quantised(path, without_values(kind, sizes, entries), entries, quant, quant_head)
    written: dict[str, Tensor] = {}
    for names in layers_of(entries):
        entries = read_model(path)  # mapped anew, so that what was read before leaves this process's memory
        for name in names:
            tensor = entries[name]
            assert isinstance(tensor, Tensor)
            check_finite(path, name, tensor)
            if name in quantised:
                layer = quantize(tensor, quant, tensor.dtype)
                written |= {f"{name.removesuffix('weight')}{own}": part for own, part in layer.to_file().items()}
            else:
                written[name] = tensor.clone()
    write_tensors(out, written, {"format": "pt", FINGERPRINT: name_of_weights})
    return out
