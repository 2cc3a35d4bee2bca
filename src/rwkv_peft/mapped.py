"""The tensors of a `.pth` or `.safetensors` file where they lie: mapped into memory, read when they are used.

A mapping that torch makes of a `.pth` counts against the machine's memory as a whole, so that a file larger than it
cannot be opened; this one does not. Of the index of a `.pth` only tensors are understood: no code in it can run.
"""

from __future__ import annotations

import io
import json
import mmap
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "ByteStorage": torch.uint8, "CharStorage": torch.int8,
    "ShortStorage": torch.int16, "IntStorage": torch.int32, "LongStorage": torch.int64, "BoolStorage": torch.bool,
}  # fmt: skip
SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip
LARGEST_HEADER = 10**8  # bytes, as that format has it
LOCAL_HEADER = 30  # bytes before an entry's name in a zip file
NO_RESERVE = 0x4000  # Linux's flag of a mapping that need not fit into memory


class UnusualError(Exception):
    """A file that is damaged, or has a form that this does not know."""


class Place(NamedTuple):
    """Where a tensor is within its storage."""

    dtype: torch.dtype
    storage: str
    offset: int
    """In numbers."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor by its name. Raises UnusualError if the file has another form, or is damaged."""
    try:
        whole = torch.frombuffer(_map(path), dtype=torch.uint8)
        places, starts = _index_of_pth(path) if path.suffix == ".pth" else _index_of_safetensors(path)
        return {name: _tensor(whole, place, *starts[place.storage]) for name, place in places.items()}
    except Exception as error:  # of many types, for as many kinds of damage
        raise UnusualError(str(error)) from error


def _map(path: Path) -> mmap.mmap:
    """The file's bytes; what is written to them does not reach the file."""
    with path.open("rb") as file:
        how: dict[str, int] = {"access": mmap.ACCESS_COPY}
        if sys.platform.startswith("linux"):
            how = {"flags": mmap.MAP_PRIVATE | NO_RESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
        return mmap.mmap(file.fileno(), 0, **how)


def _tensor(whole: Tensor, place: Place, start: int, size: int) -> Tensor:
    """A tensor of a storage of so many bytes, which begins there."""
    found = whole[start : start + size]
    if len(found) != size:
        raise ValueError("cut off")
    first, rest = divmod(start, place.dtype.itemsize)
    if rest:
        raise ValueError("not aligned")
    return found.view(place.dtype).as_strided(place.shape, place.stride, first + place.offset)


def _place(storage: tuple[torch.dtype, str], offset: int, shape: Any, stride: Any, *_: Any) -> Place:
    """What a `.pth` says of a tensor."""
    dtype, key = storage
    return Place(dtype, key, offset, tuple(shape), tuple(stride))


class _Index(pickle.Unpickler):
    """Of a `.pth`: knows tensors and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _place
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda place, *_: place
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str]:
        kind, dtype, key, *_ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(str(kind))
        return dtype, key


def _index_of_pth(path: Path) -> tuple[dict[str, Place], dict[str, tuple[int, int]]]:
    """The places, and the start and bytes of each storage."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = {entry.filename: entry for entry in archive.infolist()}
        folder = next(name for name in entries if name.endswith("/data.pkl")).removesuffix("data.pkl")
        if f"{folder}byteorder" in entries and archive.read(f"{folder}byteorder") != sys.byteorder.encode():
            raise ValueError("another byte order")
        if entries[f"{folder}data.pkl"].file_size > LARGEST_HEADER:
            raise ValueError("no index")
        places = dict(_Index(io.BytesIO(archive.read(f"{folder}data.pkl"))).load())
        starts = {}
        for key in {place.storage for place in places.values()}:
            entry = entries[f"{folder}data/{key}"]
            file.seek(entry.header_offset)
            local = file.read(LOCAL_HEADER)
            names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
            if entry.compress_type != zipfile.ZIP_STORED or local[:4] != b"PK\3\4":
                raise ValueError("not stored as it is")
            starts[key] = entry.header_offset + LOCAL_HEADER + names, entry.file_size
    return places, starts


def metadata_of(path: Path) -> dict[str, str]:
    """What a `.safetensors` file, which `map_tensors` can read, says of itself beside its tensors."""
    return dict(_header(path)[0].get("__metadata__") or {})


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a `.safetensors` file, and its bytes."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError("no header")
        entries = json.loads(file.read(size))
    metadata = entries.get("__metadata__") or {}
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError("metadata that are no text")
    return entries, size


def _index_of_safetensors(path: Path) -> tuple[dict[str, Place], dict[str, tuple[int, int]]]:
    entries, size = _header(path)
    entries.pop("__metadata__", None)
    places, starts = {}, {}
    for name, entry in entries.items():
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        stride = torch.empty(shape, device="meta").stride()
        places[name] = Place(SAFETENSORS[entry["dtype"]], name, 0, shape, stride)
        starts[name] = 8 + size + first, last - first
    if 8 + size + max((entry["data_offsets"][1] for entry in entries.values()), default=0) != path.stat().st_size:
        raise ValueError("cut off")
    return places, starts
