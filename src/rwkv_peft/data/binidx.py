"""Binidx: tokens in PREFIX.bin and where each document is in PREFIX.idx, Megatron's MMIDIDX format.

The index is, all little endian: `MMIDIDX` and two zeros, u64 version 1, u8 code of the dtype, u64 number of items n,
u64 number of document entries d, int32 (n) sizes in tokens, int64 (n) pointers in bytes, int64 (d) first items of
documents. RWKV's tools make every document one item, and so the entries are 0 to n; they are not read.

Source: `MMapIndexedDataset` of RWKV-LM's binidx.py. n items, N tokens.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..files import output_errors, write_atomic

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float32", 7: "float64", 8: "uint16"}
READABLE = ("uint8", "uint16", "int32", "int64")
MOST_CHECKED = 2**30  # bytes of a .bin whose ids are looked at when it is opened
CHUNK = 2**20  # values that are handled at once

Ids = npt.NDArray[np.integer]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Binidx:
    """An open pair; a document is an item of its index."""

    title: str
    """The prefix, for messages."""
    ids: Ids
    """(N,) mapped from the whole .bin."""
    starts: Integers
    """(n,) where each document begins, in tokens."""
    lengths: Integers
    """(n,) its tokens, perhaps none."""


def prefix_of(path: str) -> str:
    """The prefix of a pair that is named by it or by one of its files."""
    return path[:-4] if path.endswith((".idx", ".bin")) else path


def is_binidx(path: str) -> bool:
    """Whether `path` names a pair: its prefix, or one of its files. So does what half of a pair is left of."""
    prefix = prefix_of(path)
    index, tokens = (Path(f"{prefix}.{end}") for end in ("idx", "bin"))
    try:
        if prefix == path and not index.is_file():
            return tokens.is_file() and not Path(path).exists()
        return index.is_file() or tokens.is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False


def open_binidx(path: str, vocab_size: int | None = None) -> Binidx:
    """Open a pair by its prefix, or by one of its files, and check that it is whole.

    With `vocab_size`, the ids in the first GiB are compared with it.

    Raises:
        DataError: a file is missing or damaged, the two do not belong together, there is no token, the dtype is none
            for ids, or an id is not in the vocabulary.
    """
    prefix = prefix_of(os.fspath(path))
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    available = _size(tokens)
    dtype, lengths, pointers = _read_index(index, _size(index))
    starts = _starts(tokens, available, dtype, lengths, pointers)
    try:
        ids = np.memmap(tokens, dtype, "r")
    except (OSError, ValueError) as error:
        raise DataError(f"{tokens}: cannot be read ({error}); give --data a pair that can") from None
    pair = Binidx(prefix, ids, starts, lengths)
    if vocab_size is not None:
        _check_ids(pair, vocab_size)
    return pair


def magic_prime(tokens: int, ctx_len: int) -> int | None:
    """RWKV-LM's `--magic_prime` for that many tokens: the largest prime p = 3 k + 2 up to tokens // ctx_len - 1.

    None if there are fewer than three windows of `ctx_len` tokens. Source: `make_data.py` of RWKV-LM.
    """
    most = tokens // ctx_len - 1
    return next((p for p in range(most - (most - 2) % 3, 1, -3) if _is_prime(p)), None)


class BinidxWriter:
    """Collects documents in the folder `PREFIX.partial`, where another run can go on; `put_in_place` makes the pair.

    Every error of the file system is an OutputError.
    """

    def __init__(self, prefix: str, dtype: npt.DTypeLike = np.uint16, documents: int = 0, tokens: int = 0) -> None:
        """Go on behind the first `documents` of `tokens` tokens in all; what was written after them is cut off.

        Raises DataError if there are not so many.
        """
        self.folder = Path(f"{prefix}.partial")
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.documents, self.tokens = documents, tokens
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._ids = self._continue("ids", tokens * self.dtype.itemsize)
        self._sizes = self._continue("sizes", documents * 4)

    def _continue(self, name: str, size: int) -> IO[bytes]:
        path = self.folder / name
        with output_errors(path):
            path.touch()
            if path.stat().st_size < size:
                raise DataError(f"{path}: is shorter than it was; remove {self.folder}, or use --overwrite")
            file = path.open("r+b")
            file.truncate(size)
            file.seek(size)
        return file

    def add(self, ids: npt.NDArray[np.integer], sizes: npt.NDArray[np.integer]) -> None:
        """Add documents: their ids (N,) side by side, and the tokens of each (n,)."""
        with output_errors(self.folder):
            self._ids.write(ids.astype(self.dtype, copy=False).tobytes())
            self._sizes.write(sizes.astype("<i4", copy=False).tobytes())
        self.documents += len(sizes)
        self.tokens += len(ids)

    def flush(self) -> None:
        """Bring everything to the disk."""
        with output_errors(self.folder):
            for file in (self._ids, self._sizes):
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """Leave the files as they are, for another run; what was not flushed may be lost."""
        for file in (self._ids, self._sizes):
            with suppress(OSError):
                file.close()


def put_in_place(prefix: str, first: int = 0, last: int | None = None, dtype: npt.DTypeLike = np.uint16) -> int:
    """Make a pair, instead of one that is there, of what a writer has flushed; returns its tokens.

    Of the documents, it has those from `first` to `last`. The .bin appears first and then the .idx, each whole. Where
    this was broken off, it can be done again. Raises OutputError if something cannot be written, and DataError if what
    was flushed is no longer there.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    folder, index, tokens = Path(f"{prefix}.partial"), Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    ids, sizes = folder / "ids", folder / "sizes"
    with output_errors(index):
        documents = sizes.stat().st_size // 4
        last = documents if last is None else last
        start, end, whole = (_tokens(sizes, 0, n) * kind.itemsize for n in (first, last, documents))
        is_there = ids.exists()
        if (ids if is_there else tokens).stat().st_size != (whole if is_there else end - start):
            raise DataError(f"{folder}: does not hold what it did; remove it, and prepare the data again")
        if is_there:
            index.unlink(missing_ok=True)  # an old index with the new tokens would be read as if it were right
    if is_there and (start, end) == (0, whole):
        with output_errors(tokens):
            ids.replace(tokens)
    elif is_there:
        write_atomic(tokens, lambda path: _copy(ids, path, start, end), end - start)
    n = last - first
    size = HEADER.size + 12 * n + 8 * (n + 1)
    write_atomic(index, lambda path: _write_index(path, sizes, kind, first, last), size)
    return (end - start) // kind.itemsize


def _write_index(path: Path, sizes: Path, dtype: np.dtype[np.generic], first: int, last: int) -> None:
    n = last - first
    code = next(code for code, name in DTYPES.items() if name == dtype.name)
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, n, n + 1))
        for chunk in _chunks(sizes, first, last):
            file.write(chunk.tobytes())
        end = 0
        for chunk in _chunks(sizes, first, last):
            ends = end + np.cumsum(chunk, dtype=np.int64) * dtype.itemsize
            file.write((ends - chunk * np.int64(dtype.itemsize)).astype("<i8").tobytes())
            end = int(ends[-1])
        for item in range(0, n + 1, CHUNK):
            file.write(np.arange(item, min(item + CHUNK, n + 1), dtype="<i8").tobytes())


def _tokens(sizes: Path, first: int, last: int) -> int:
    return sum(int(chunk.sum(dtype=np.int64)) for chunk in _chunks(sizes, first, last))


def _chunks(sizes: Path, first: int, last: int) -> Iterator[npt.NDArray[np.int32]]:
    with sizes.open("rb") as file:
        file.seek(4 * first)
        while first < last and (data := file.read(4 * min(CHUNK, last - first))):
            yield np.frombuffer(data, "<i4")
            first += len(data) // 4


def _copy(source: Path, target: Path, start: int, end: int) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        old.seek(start)
        while start < end and (data := old.read(min(CHUNK, end - start))):
            new.write(data)
            start += len(data)


def _size(path: Path) -> int:
    """Bytes of a file of a pair."""
    try:
        if path.is_file():
            return path.stat().st_size
        what = "is not a regular file" if path.exists() else "no such file"
    except (OSError, ValueError) as error:
        what = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    raise DataError(f"{path}: {what}; a binidx pair is PREFIX.bin and PREFIX.idx, give --data the prefix of both")


def _read_index(path: Path, available: int) -> tuple[np.dtype[np.generic], Integers, Integers]:
    """The dtype of the ids, the tokens of each item, and its pointer in bytes; (n,) each."""
    again = "make it again with `rwkv-peft prepare`"
    try:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
            if not header.startswith(MAGIC):
                raise DataError(f"{path}: is no binidx index, which begins with MMIDIDX; {again}")
            if len(header) < HEADER.size:
                raise DataError(f"{path}: ends within its first {HEADER.size} bytes; {again}")
            _, version, code, n, documents = HEADER.unpack(header)
            if version != 1:
                raise DataError(f"{path}: is of version {version}, must be 1; {again}")
            if DTYPES.get(code) not in READABLE:
                kind = DTYPES.get(code, f"of unknown code {code}")
                raise DataError(f"{path}: its dtype is {kind}, must be {', '.join(READABLE)}; {again}")
            size = HEADER.size + 12 * n + 8 * documents
            if size != available:
                what = "it is cut off" if size > available else "something is behind it"
                raise DataError(f"{path}: has {available:,} bytes, its header says {size:,}: {what}; {again}")
            if not n:
                raise DataError(f"{path}: has no documents; prepare a source that has")
            sizes = np.fromfile(file, "<i4", n)
            pointers = np.fromfile(file, "<i8", n)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give --data a pair that can") from None
    if len(pointers) < n:
        raise DataError(f"{path}: became shorter while it was read; {again}")
    return np.dtype(DTYPES[code]).newbyteorder("<"), sizes.astype(np.int64), pointers.astype(np.int64)


def _starts(path: Path, available: int, dtype: np.dtype[np.generic], lengths: Integers, pointers: Integers) -> Integers:
    """(n,) where each item begins, in tokens, checked against the bytes that the .bin has."""
    again = "the two files do not belong together, or are damaged: make both again"
    tokens, rest = divmod(available, dtype.itemsize)
    if rest:
        raise DataError(
            f"{path}: has {available:,} bytes, must be a multiple of {dtype.itemsize} ({dtype.name}); {again}"
        )
    starts = pointers // dtype.itemsize
    for wrong, what in (
        (lengths < 0, "has a negative length"),
        (pointers % dtype.itemsize != 0, f"begins within a token of {dtype.itemsize} bytes"),
        (starts < 0, "begins before the file"),
        (starts > tokens - lengths, f"ends behind the {tokens:,} tokens of the file"),
    ):
        if wrong.any():
            raise DataError(f"{path}: by its index, document {int(wrong.argmax()) + 1} {what}; {again}")
    end = int((starts + lengths).max())
    if end < tokens:
        raise DataError(f"{path}: has {tokens:,} tokens, its index knows of {end:,}; {again}")
    if not tokens:
        raise DataError(f"{path}: has no tokens; prepare a source that has")
    return starts


def _check_ids(pair: Binidx, vocab_size: int) -> None:
    """Raise `DataError` at the first id that is not in the vocabulary."""
    bounds = np.iinfo(pair.ids.dtype)
    if bounds.min >= 0 and bounds.max < vocab_size:
        return
    for first in range(0, min(len(pair.ids), MOST_CHECKED // pair.ids.dtype.itemsize), CHUNK):
        chunk = pair.ids[first : first + CHUNK]
        if chunk.max() < vocab_size and chunk.min() >= 0:
            continue
        place = first + int(((chunk < 0) | (chunk >= vocab_size)).argmax())
        inside = (pair.starts <= place) & (place < pair.starts + pair.lengths)
        where = f"document {int(inside.argmax()) + 1}" if inside.any() else f"token {place + 1}, in no document"
        raise DataError(
            f"{pair.title}.bin: {where}: token id {int(pair.ids[place])} is not in the vocabulary, which has 0 to "
            f"{vocab_size - 1}; use the model that it was prepared for, or prepare it again"
        )


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, isqrt(n) + 1))
