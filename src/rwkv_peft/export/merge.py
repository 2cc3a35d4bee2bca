"""An adapter added to its base: a model file like any other."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..adapters import ADAPTERS
from ..adapters.folder import AdapterFolder, check_fit, read_adapter
from ..checkpoint import DTYPES, check_finite, check_suffix, fingerprint, read_tensors, write_tensors
from ..errors import CheckpointError, ConfigError, OutputError
from ..loading import check_model


def merge(
    base_path: Path | str,
    adapter_folder: Path | str,
    out_path: Path | str,
    dtype: str = "same",
    overwrite: bool = False,
) -> Path:
    """Write the base with the adapter, and the parts trained beside it, added; returns `out_path`.

    Arguments:
        out_path: ends in `.pth` or `.safetensors`.
        dtype: `fp32`, `bf16` or `fp16`; `same` keeps each tensor's own. Sums are taken in float32.

    Raises CheckpointError if the files do not belong together, OutputError if `out_path` exists or cannot be written.
    """
    out = Path(out_path)
    check_suffix(out)
    if dtype != "same" and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: unknown; allowed are same {' '.join(DTYPES)}")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; choose another name, or give --overwrite")
    base = read_tensors(base_path)
    check_model(base_path, base)
    adapter = read_adapter(adapter_folder)
    merged = merge_tensors(base, adapter, adapter_folder)
    for name, tensor in merged.items():
        merged[name] = tensor.to(base[name].dtype if dtype == "same" else DTYPES[dtype])
        check_finite(out, name, merged[name])
    write_tensors(out, merged)
    return out


def merge_tensors(base: dict[str, Tensor], adapter: AdapterFolder, folder: Path | str) -> dict[str, Tensor]:
    """The base's tensors under their names; those that the adapter changes are new and float32.

    Raises CheckpointError if the adapter was trained on another base.
    """
    if adapter.base and adapter.base != fingerprint(base):
        raise CheckpointError(f"{folder}: was trained on a base with other weights than this one; name that base")
    check_fit(folder, adapter, {name: tuple(tensor.shape) for name, tensor in base.items()})
    merged = dict(base)
    for target in adapter.config.targets:
        name = f"{target}.weight"
        merged[name] = ADAPTERS[adapter.config.peft].merged(base[name], adapter.of_matrix(target), adapter.config)
    return merged | {name: part.float() for name, part in adapter.parts.items()}
