"""Files of tensors, written one tensor after the other: no more than one needs to be in memory.

Names, dtypes and shapes must be known first. They are given as `forms`, tensors of which nothing else is used: they may
be on the meta device. What is written is what `mapped` reads.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

from .mapped import LOCAL_HEADER, SAFETENSORS, STORAGES

ALIGNMENT = 64  # of the tensors of a `.pth`, in bytes, as torch.save has it
LARGE_ENTRY = 20  # bytes more in the header of an entry of a zip file that 32 bits cannot count


def write_safetensors(
    path: Path, forms: Mapping[str, Tensor], tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors`, which come in the order of `forms`, and are laid out as that format's own library does."""
    # numbers of more bytes first, so that all are aligned; the format has no room for gaps
    names = sorted(forms, key=lambda name: (-forms[name].dtype.itemsize, name))
    starts = dict(zip(names, accumulate((forms[name].nbytes for name in names), initial=0), strict=False))
    header = _header(forms, starts, metadata)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for (name, form), tensor in zip(forms.items(), tensors, strict=True):
            file.seek(8 + len(header) + starts[name])
            file.write(_bytes(tensor, form))


def _header(forms: Mapping[str, Tensor], starts: Mapping[str, int], metadata: Mapping[str, str] | None) -> bytes:
    """What a `.safetensors` says of its tensors, given where each begins; a whole number of 8 bytes."""
    types = {dtype: name for name, dtype in SAFETENSORS.items()}
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, start in starts.items():
        form = forms[name]
        ends = [start, start + form.nbytes]
        entries[name] = {"dtype": types[form.dtype], "shape": list(form.shape), "data_offsets": ends}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8)


def write_pth(path: Path, forms: Mapping[str, Tensor], tensors: Iterable[Tensor]) -> None:
    """Write `tensors`, which come in the order of `forms`, as torch.save writes a dict of them: a zip file."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, file, "data.pkl", memoryview(_index(forms)))
        _add(archive, file, "byteorder", memoryview(sys.byteorder.encode()))
        for key, (form, tensor) in enumerate(zip(forms.values(), tensors, strict=True)):
            _add(archive, file, f"data/{key}", _bytes(tensor, form))
        _add(archive, file, "version", memoryview(b"3\n"))


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, content: memoryview) -> None:
    """Add an entry, stored as it is, so that its content is aligned: readers map it where it lies."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    is_large = content.nbytes >= zipfile.ZIP64_LIMIT
    start = file.tell() + LOCAL_HEADER + len(entry.filename) + 4 + LARGE_ENTRY * is_large
    padding = -start % ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding  # torch.save's
    with archive.open(entry, "w", force_zip64=is_large) as stored:
        stored.write(content)


def _bytes(tensor: Tensor, form: Tensor) -> memoryview:
    """The bytes of a tensor, which is as was announced; copied only where it is not contiguous, or not on the CPU."""
    assert (tensor.dtype, tensor.shape) == (form.dtype, form.shape), (tensor.dtype, tensor.shape, form)
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


class _Storage(NamedTuple):
    """What the index of a `.pth` says of the bytes of a tensor."""

    kind: Any
    key: str
    length: int
    """In numbers of that kind."""


class _Entry:
    """What it says of a tensor; pickled as torch.save pickles that."""

    def __init__(self, key: str, form: Tensor) -> None:
        self.key, self.form = key, form

    def __reduce__(self) -> tuple[Any, ...]:
        dtype, shape = self.form.dtype, tuple(self.form.shape)
        stride = torch.empty(shape, device="meta").stride()
        place: tuple[Any, ...] = (0, shape, stride, False, OrderedDict())  # no gradient is wanted, and no hooks
        kind = next((name for name, number in STORAGES.items() if number == dtype), None)
        if kind is None:  # younger numbers, e.g. fp8, have no such name
            storage = _Storage(torch.UntypedStorage, self.key, self.form.nbytes)
            return _rebuild_tensor_v3, (storage, *place, dtype)
        return _rebuild_tensor_v2, (_Storage(getattr(torch, kind), self.key, self.form.numel()), *place)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        return ("storage", obj.kind, obj.key, "cpu", obj.length) if isinstance(obj, _Storage) else None


def _index(forms: Mapping[str, Tensor]) -> bytes:
    """The pickled dict of a `.pth`."""
    file = io.BytesIO()
    _Pickler(file, protocol=2).dump({name: _Entry(str(key), form) for key, (name, form) in enumerate(forms.items())})
    return file.getvalue()
