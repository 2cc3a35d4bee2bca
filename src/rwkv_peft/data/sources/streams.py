"""Files to bytes and lines: read in blocks, unpacked on the way, in constant memory whatever the size."""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import DataError
from ...packages import optional

PACKERS = (".gz", ".zst")
BLOCK = 1 << 20  # bytes of a file, or of its whole lines, read at once
PACKED_BLOCK = 1 << 14  # bytes of a packed file unpacked at once
LONGEST = 1 << 28  # bytes of one line or value: what a line break, quote or bracket that is missing may cost


Watch = Callable[[int], object]  # is told of bytes of a file as they are read


class DamagedError(DataError):
    """The bytes themselves end or make no sense from some place on; the message is of the form `reason; remedy`."""


def blocks_of(path: Path, watch: Watch | None = None) -> Iterator[bytes]:
    """The bytes of a file in blocks, unpacked if its name ends in `.gz` or `.zst`; `watch` hears of those on the disk.

    Raises:
        DamagedError: the file cannot be unpacked or read to its end; all that comes before has been yielded.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        if path.suffix.lower() == ".gz":
            packed = _read(file, PACKED_BLOCK, watch)
            yield from _unpacked(packed, "gzip", zlib.error, lambda: zlib.decompressobj(wbits=31))
        elif path.suffix.lower() == ".zst":
            zstandard = optional("zstandard", str(path))
            # as far as `zstd --long=31` goes, which large corpora are packed with
            unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
            packed = _read(file, PACKED_BLOCK, watch)
            yield from _unpacked(packed, "Zstandard", zstandard.ZstdError, unpacker.decompressobj)
        else:
            yield from _read(file, BLOCK, watch)


def _read(file: BinaryIO, size: int, watch: Watch | None) -> Iterator[bytes]:
    try:
        while block := file.read(size):
            if watch is not None:
                watch(len(block))
            yield block
    except OSError as error:
        raise DamagedError(f"cannot be read ({error.strerror or error}); copy it anew") from None


def _unpacked(blocks: Iterator[bytes], form: str, failure: type[Exception], new: Any) -> Iterator[bytes]:
    """The members of a packed file one behind the other, each checked against the length and the sum it carries."""
    member, begun = new(), False
    for block in blocks:
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


def line_blocks(blocks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Whole lines, about `BLOCK` bytes of them at once, with the number, from 1, of the first.

    Which lines are together does not depend on where the blocks end. Where the blocks end in damage, the whole lines
    before it come first.
    """
    number, text = 1, bytearray()
    try:
        for block in blocks:
            searched = max(len(text), BLOCK - 1)
            text += block
            while end := text.find(b"\n", searched) + 1:
                yield number, bytes(text[:end])
                number += text.count(b"\n", 0, end)
                del text[:end]
                searched = BLOCK - 1
            if len(text) > LONGEST:
                _refuse_long_line(number, text)
    except DamagedError:
        if end := text.rfind(b"\n") + 1:
            yield number, bytes(text[:end])
        raise
    if text:
        yield number, bytes(text)


def _refuse_long_line(number: int, text: bytearray) -> None:
    """Raise `DataError` if the last line of `text`, whose first has that number, is too long."""
    if len(text) - text.rfind(b"\n") - 1 > LONGEST:
        number += text.count(b"\n")
        raise DataError(f"line {number} has more than {LONGEST:,} bytes; write one example a line")


def lines_of(blocks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line, without its line feed."""
    for first, text in line_blocks(blocks):
        yield from numbered(first, text)


def numbered(first: int, text: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines of `text` and their numbers, the first of which is given."""
    return enumerate(text.removesuffix(b"\n").split(b"\n"), first)
