"""Model files ↔ tensors under their official names. Nothing in a file is ever executed."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, OutputError
from .files import write_atomic

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUFFIXES = (".pth", ".safetensors")
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}  # fmt: skip
LARGEST_HEADER = 10**8  # bytes, as that format has it


def read_tensors(path: Path | str, whole_numbers: bool = False) -> dict[str, Tensor]:
    """Every tensor of a `.pth` or `.safetensors` file, memory-mapped: nothing is read before it is used.

    Raises CheckpointError if the file is missing, is a folder, is damaged, or holds anything but named float tensors;
    with `whole_numbers`, these are allowed too.
    """
    path = Path(path)
    _check_readable(path)
    tensors = _read_pth(path) if path.suffix == ".pth" else _read_safetensors(path)
    _check_tensors(path, tensors, whole_numbers)
    return tensors


def read_header(path: Path | str) -> dict[str, Tensor]:
    """As `read_tensors`, but without values, on the meta device: works for files that no memory here could hold."""
    path = Path(path)
    _check_readable(path)
    try:
        tensors = _pth_header(path) if path.suffix == ".pth" else _safetensors_header(path)
    except Exception:  # an unusual or a damaged file, of which the slower way knows what to say
        return read_tensors(path)
    _check_tensors(path, tensors)
    return tensors


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], whole_numbers: bool = False) -> None:
    """Raise CheckpointError for an entry that is no named tensor of an allowed type."""
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(tensor).__name__}; a model file holds only named tensors"
            )
        if not (tensor.is_floating_point() or (whole_numbers and not tensor.is_complex())):
            raise CheckpointError(
                f"{path}: tensor {name} is {tensor.dtype}; allowed are float types; get the unquantised file"
            )


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as `.pth` or `.safetensors`, by the path's ending, atomically. Raises OutputError."""
    path = Path(path)
    check_suffix(path)
    # a view would drag its whole storage into a .pth, and is refused by safetensors
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    plain = {name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for name, t in plain.items()}
    size = sum(t.nbytes for t in plain.values())

    def write(temporary: Path) -> None:
        try:
            if path.suffix == ".pth":
                torch.save(plain, temporary)
            else:
                from safetensors.torch import save_file

                save_file(plain, temporary)
        except Exception as error:  # both writers raise their own types where the disk fails
            raise OutputError(
                f"{path}: cannot be written ({first_line(error)}); make room, or write elsewhere"
            ) from error

    write_atomic(path, write, size)


def check_suffix(path: Path) -> None:
    """Raise CheckpointError unless the path ends in a known form."""
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: ends in {path.suffix or 'nothing'}; allowed are {' and '.join(SUFFIXES)}")


def is_finite(tensor: Tensor) -> bool:
    """Whether the tensor holds neither NaN nor Inf; the sum tells it fast where it is finite itself."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def check_finite(path: Path | str, name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if the tensor holds NaN or Inf."""
    if not is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{path}: tensor {name} holds {bad} NaN or Inf of {tensor.numel()}; get the file again")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A name for these weights that file form does not change, nor whether they are bf16 or fp32: 16 hex digits.

    Taken from the names, the shapes and 64 values of each tensor, rounded to bf16.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 64)][:64].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def first_line(error: BaseException) -> str:
    """The beginning of an exception's message, for use inside one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _check_readable(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name the model file in it, ending in {' or '.join(SUFFIXES)}")
    check_suffix(path)
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES) if path.parent.is_dir() else []
        here = f"; that folder has {', '.join(near[:5])}" if near else ""
        raise CheckpointError(f"{path}: no such file{here}; check the path")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if empty:
        raise CheckpointError(f"{path}: is empty; get the file again")


def _read_pth(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises a different type for each kind of damage
        raise CheckpointError(_why_not_pth(path, str(error))) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}; a model file holds a dict of tensors")
    return found


def _why_not_pth(path: Path, message: str) -> str:
    code = re.search(r"GLOBAL (\S+)", message)
    if code:
        return (
            f"{path}: holds Python code ({code[1]}), which is never run; get a file of plain tensors, or .safetensors"
        )
    with path.open("rb") as file:
        magic = file.read(2)
    if magic == b"PK":
        return f"{path}: is cut off or damaged ({path.stat().st_size:,} bytes); download it again"
    return f"{path}: is not a file of torch.save's zip form; download it again, or save it anew with torch.save"


class _Header(pickle.Unpickler):
    """Of the index in a `.pth`: knows tensors and nothing else, so no code in it can run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda dtype, offset, shape, *_: torch.empty(shape, dtype=dtype, device="meta")
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> torch.dtype:
        """The number format stands for the storage."""
        dtype: torch.dtype = pid[1]
        return dtype


def _pth_header(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        index = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        found = _Header(io.BytesIO(archive.read(index))).load()
    return dict(found)


def _safetensors_header(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError("no header")
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    if 8 + size + max(entry["data_offsets"][1] for entry in entries.values()) != path.stat().st_size:
        raise ValueError("cut off")
    return {
        name: torch.empty(entry["shape"], dtype=SAFETENSORS[entry["dtype"]], device="meta")
        for name, entry in entries.items()
    }


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is cut off or no safetensors file ({first_line(error)}); download it again"
        ) from error
