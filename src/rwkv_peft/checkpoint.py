"""Files ↔ tensors under their official names. Nothing in a file is ever executed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError
from .files import write_atomic
from .mapped import UnusualError, map_tensors, metadata_of
from .streamed import write_pth, write_safetensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SUFFIXES = (".pth", ".safetensors")


def read_tensors(path: Path | str, whole_numbers: bool = False) -> dict[str, Tensor]:
    """Every tensor of a `.pth` or `.safetensors` file, memory-mapped: nothing is read before it is used.

    Raises CheckpointError if the file is missing, is a folder, is damaged, or holds anything but named float tensors;
    with `whole_numbers`, these are allowed too.
    """
    path = Path(path)
    _check_readable(path)
    try:
        tensors = map_tensors(path)
    except UnusualError:  # which the slower way reads, or knows what to say of
        tensors = _read_pth(path) if path.suffix == ".pth" else _read_safetensors(path)
    _check_tensors(path, tensors, whole_numbers)
    return tensors


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], whole_numbers: bool = False) -> None:
    """Raise CheckpointError for an entry that is no named tensor of an allowed type."""
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(tensor).__name__}; a model file holds only named tensors"
            )
        if tensor.is_complex() or not (tensor.is_floating_point() or whole_numbers):
            raise not_float(path, name, tensor)


def not_float(path: Path | str, name: str, tensor: Tensor) -> CheckpointError:
    """The error of a tensor that should hold floating-point numbers."""
    return CheckpointError(
        f"{path}: tensor {name} is {tensor.dtype}; allowed are float types; get the unquantised file"
    )


def read_metadata(path: Path | str) -> dict[str, str]:
    """What a `.safetensors` file says of itself beside its tensors; empty for a `.pth`. Call `read_tensors` first."""
    return metadata_of(Path(path)) if Path(path).suffix == ".safetensors" else {}


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as `.pth` or `.safetensors`, by the path's ending, atomically. Raises OutputError.

    Only a `.safetensors` file can hold `metadata`.
    """
    stream_tensors(path, tensors, tensors.values(), metadata)


def stream_tensors(
    path: Path | str,
    forms: Mapping[str, Tensor],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """As `write_tensors`, of tensors that are made one at a time: each is written before the next is asked for.

    Arguments:
        forms: names, dtypes and shapes; of these tensors nothing else is used, so they may be on the meta device.
        tensors: in the order of `forms`. What it raises is raised here, and leaves nothing behind.
    """
    path = Path(path)
    check_suffix(path)

    def write(temporary: Path) -> None:
        if path.suffix == ".pth":
            write_pth(temporary, forms, tensors)
        else:
            write_safetensors(temporary, forms, tensors, metadata)

    write_atomic(path, write, sum(form.nbytes for form in forms.values()))


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


class Fingerprint:
    """A name for weights that file form does not change, nor whether they are bf16 or fp32: 16 hex digits.

    Taken from the names, the shapes and 64 values of each tensor, rounded to bf16.
    """

    def __init__(self) -> None:
        self.samples: dict[str, bytes] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor in."""
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 64)][:64].to(torch.bfloat16).float().cpu()
        self.samples[name] = f"{name}{tuple(tensor.shape)}".encode() + sample.numpy().tobytes()

    def digits(self) -> str:
        """The name of all that was added, in whatever order."""
        return hashlib.sha256(b"".join(self.samples[name] for name in sorted(self.samples))).hexdigest()[:16]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The `Fingerprint` of these weights."""
    found = Fingerprint()
    for name, tensor in tensors.items():
        found.add(name, tensor)
    return found.digits()


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


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is cut off or no safetensors file ({first_line(error)}); download it again"
        ) from error
