"""Plain text files to documents: those between separators, or each file as one, in parts if it is long."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from ...errors import DataError
from .formats import Found, Part

PART = 1 << 22  # bytes of a long text that are handed on at once
# After these bytes a line break always begins a token: the visible ones of ASCII, and last ones of other characters
CUT_AFTER = bytes([*range(0x21, 0x7F), *range(0x90, 0x9F), *range(0xB0, 0xC0)])


def text_file(blocks: Iterator[bytes], separator: str) -> Found:
    """The documents between two separators; blank ones are ignored.

    A line ends in a line feed, whether or not the file has a carriage return before it.
    """
    found = False
    for number, raw in enumerate(_documents(with_line_feeds(blocks), separator.replace("\r\n", "\n").encode()), 1):
        if raw.strip():
            found = True
            yield f": document {number}", _text(raw)
    if not found:
        raise DataError("is empty or blank; write text into it")


def _documents(blocks: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
    kept, pieces, size = b"", [], 0
    for block in chain(blocks, [b""]):
        pieces.append(block)
        size += len(block)
        # Searching again only what has at least doubled keeps the work linear in the length of a document.
        if not block or size > len(kept):
            *documents, kept = (kept + b"".join(pieces)).split(separator)
            yield from documents
            pieces, size = [], 0
    yield kept


def whole_text_file(read: Callable[[bool], Iterator[bytes]], special_tokens: Iterable[str] = ()) -> Found:
    """A file as one document: as a text, or if it is long, in `Part`s whose tokens side by side are those of the whole.

    `read` gives the blocks of the file, and is told whether it is to look ahead: a long file is first read to its end,
    since none of it may be used if some is not UTF-8. The parts of a text that has no place to end one, see `cut_of`,
    are as long as the text.
    """
    cut = cut_of(special_tokens)
    parts = parts_of(with_line_feeds(read(False)), cut)
    first, is_long = next(parts)
    if not is_long:
        if not first.strip():
            raise DataError("is empty or blank; write text into it")
        yield "", _text(first)
        return
    lines = 0
    for ahead, _ in parts_of(with_line_feeds(read(True)), cut):
        if isinstance(problem := _text(ahead, lines), DataError):
            yield "", problem
            return
        lines += ahead.count(b"\n")
    continues = False
    for raw, more in chain([(first, True)], parts):
        text = _text(raw)
        if isinstance(text, DataError):
            raise DataError("changed while it was read; start again when it is complete")
        yield "", Part(text, continues, more)
        continues = True


def cut_of(special_tokens: Iterable[str]) -> re.Pattern[bytes]:
    """Where a part of a text may end: between some bytes and a line break, which no token has side by side.

    None of the World vocabulary, nor of bytes, has one of `CUT_AFTER` before a line break; a special token may.
    The last byte of a character that `str.strip` takes for blank is not among them, so that no part is blank.
    """
    inside = b"".join(re.findall(rb"(?s).(?=\n)", "\0".join(special_tokens).encode(errors="replace")))
    after = re.escape(bytes(byte for byte in CUT_AFTER if byte not in inside))
    return re.compile(b"[" + after + rb"](?=\n)" if after else rb"(?!)")


def parts_of(blocks: Iterator[bytes], cut: re.Pattern[bytes]) -> Iterator[tuple[bytes, bool]]:
    """A text in parts, and whether another one follows: each ends at the first match of `cut` from `PART` bytes on.

    Where the parts end does not depend on where the blocks do. Without a place to cut, a part grows up to the end.
    """
    text, searched = bytearray(), PART - 1
    for block in blocks:
        text += block
        while found := cut.search(text, searched):
            yield bytes(text[: found.end()]), True
            del text[: found.end()]
            searched = PART - 1
        searched = max(searched, len(text) - 1)
    yield bytes(text), False


def with_line_feeds(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks with a line feed where a carriage return stands before one."""
    held = b""
    for block in blocks:
        text = held + block
        held = b"\r" if text.endswith(b"\r") else b""
        yield text.removesuffix(held).replace(b"\r\n", b"\n")
    yield held


def _text(raw: bytes, lines: int = 0) -> str | DataError:
    """The text of some bytes, which have so many lines before them, or what is wrong with it."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, byte = lines + before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        return DataError(
            f"not UTF-8 (byte 0x{raw[error.start]:02x} at line {line} byte {byte}); save the file as UTF-8"
        )
