"""Files to bytes and lines: read in blocks, unpacked on the way, in constant memory whatever the size."""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import DataError
from ...packages import optional

PACKERS = (".gz", ".zst")
BLOCK = 1 << 20  # bytes of a file read at once
PACKED_BLOCK = 1 << 14  # bytes of a packed file unpacked at once
LONGEST = 1 << 28  # bytes of one line or value: what a line break, quote or bracket that is missing may cost


class DamagedError(DataError):
    """The bytes themselves end or make no sense from some place on; the message is of the form `reason; remedy`."""


def blocks_of(path: Path) -> Iterator[bytes]:
    """The bytes of a file in blocks, unpacked if its name ends in `.gz` or `.zst`.

    Raises:
        DamagedError: the file cannot be unpacked or read to its end; all that comes before has been yielded.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        if path.suffix.lower() == ".gz":
            yield from _unpacked(file, "gzip", zlib.error, lambda: zlib.decompressobj(wbits=31))
        elif path.suffix.lower() == ".zst":
            zstandard = optional("zstandard", str(path))
            # as far as `zstd --long=31` goes, which large corpora are packed with
            unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
            yield from _unpacked(file, "Zstandard", zstandard.ZstdError, unpacker.decompressobj)
        else:
            yield from _read(file, BLOCK)


def _read(file: BinaryIO, size: int) -> Iterator[bytes]:
    try:
        while block := file.read(size):
            yield block
    except OSError as error:
        raise DamagedError(f"cannot be read ({error.strerror or error}); copy it anew") from None


def _unpacked(file: BinaryIO, form: str, failure: type[Exception], new: Any) -> Iterator[bytes]:
    """The members of a packed file one behind the other, each checked against the length and the sum it carries."""
    member, begun = new(), False
    for block in _read(file, PACKED_BLOCK):
        packed = block
        while packed:
            if not begun and not packed.strip(b"\0"):
                break  # tape programs and some downloads pad with zeros behind the last member
            try:
                unpacked = member.decompress(packed)
            except failure as error:
                reason = " ".join(str(error).split())
                raise DamagedError(f"is no {form} file, or a damaged one ({reason}); copy or pack it anew") from None
            begun, packed = True, b""
            if member.eof:
                packed, begun = member.unused_data, False
                member = new()
            if unpacked:
                yield unpacked
    if begun:
        raise DamagedError(f"is cut off: the {form} file ends too early; copy or pack it anew")


def text_blocks(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks without a byte order mark. Raises `DataError` if it is that of another encoding than UTF-8."""
    head = b""
    for block in blocks:
        head += block
        if len(head) >= len(codecs.BOM_UTF32):
            break
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise DataError("is UTF-16 or UTF-32, must be UTF-8; save the file as UTF-8")
    yield head.removeprefix(codecs.BOM_UTF8)
    yield from blocks


def lines_of(blocks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line, without its line feed."""
    number, parts, length = 0, [], 0
    for block in blocks:
        first, *others = block.split(b"\n")
        parts.append(first)
        length += len(first)
        if length > LONGEST:
            raise DataError(f"line {number + 1} has more than {LONGEST:,} bytes; write one example a line")
        if others:
            yield number + 1, b"".join(parts)
            yield from enumerate(others[:-1], number + 2)
            number += len(others)
            parts, length = [others[-1]], len(others[-1])
    if length:
        yield number + 1, b"".join(parts)
