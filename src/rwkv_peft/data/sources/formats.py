"""Structured files to values: JSON lines, JSON and CSV, read in pieces.

Each reader takes the bytes of a file in blocks and yields (place, value): where in the file, as it is put behind the
file's name (`:12`, `: item 3`, `: row 7`), and an object, a text, or the `DataError` that says why there is none; or
else much at once, as `Part` or `Lines`. Errors that end the reading are raised as `DataError`; none has the file's
name, which the caller knows.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ...errors import DataError
from .streams import LONGEST, DamagedError, line_blocks, lines_of, numbered

Value = dict[str, Any] | str | DataError


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a document that is too long to be in memory as a whole."""

    text: str
    continues: bool
    """Whether it goes on with the part before."""
    more: bool
    """Whether another part goes on with it."""


@dataclass(frozen=True, slots=True)
class Lines:
    """Whole lines of a file of JSON lines, not parsed yet."""

    first: int
    """The number of the first, from 1."""
    data: bytes

    def objects(self) -> Iterator[tuple[str, Value]]:
        """Place of each line that is not blank, and its object or what is wrong with it."""
        for number, raw in numbered(self.first, self.data):
            if line := raw.rstrip():
                yield f":{number}", _object(line)


Found = Iterator[tuple[str, Value | Part | Lines]]

JSON_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
JSON_BLANKS = re.compile(r"[ \t\r\n]*")


def json_lines(blocks: Iterator[bytes]) -> Iterator[tuple[str, Value]]:
    """One JSON object a line; blank lines are ignored."""
    for _, lines in unparsed_lines(blocks):
        yield from lines.objects()


def unparsed_lines(blocks: Iterator[bytes]) -> Iterator[tuple[str, Lines]]:
    """The same as blocks of lines, whose place is that of the last of them."""
    found = False
    for number, data in line_blocks(blocks):
        if not data.isspace():
            found = True
            last = number + data.rstrip().count(b"\n")
            yield f":{last}", Lines(number, data)
    if not found:
        raise DataError("has no lines that are not blank; write one JSON object a line")


def _object(line: bytes) -> dict[str, Any] | DataError:
    """The JSON object of a line, or what is wrong with it."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _not_utf8(line, error)
    except json.JSONDecodeError as error:
        return DataError(f"broken JSON at column {error.pos + 1}: {error.msg}; each line must be one whole JSON object")
    except (ValueError, RecursionError) as error:  # A number of more than 4300 digits; brackets thousands deep.
        return DataError(f"broken JSON: {error}; each line must be one whole JSON object")
    if isinstance(value, dict):
        return value
    return DataError(f"got {_type(value)}, must be a JSON object; write one object a line, without a list around them")


def _not_utf8(line: bytes, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line); save the file as UTF-8"
    )


def _type(value: Any) -> str:
    """The JSON type of a value, for a message."""
    return JSON_TYPES.get(type(value), "a number")


def json_file(blocks: Iterator[bytes]) -> Found:
    """A list of objects, one object, or one object a line, which many files called `.json` hold."""
    begin = _first_line(blocks)
    line = begin.lstrip().partition(b"\n")[0]
    if not line:
        raise DataError("is empty or blank; write a list of JSON objects")
    if line.startswith(b"{") and isinstance(_object(line), dict):
        yield from json_lines(chain([begin], blocks))
        return
    text = _JsonText(chain([begin], blocks))
    if line.startswith(b"["):
        yield from _elements(text)
        return
    value = text.value()
    if text.peek():
        raise text.broken("more follows the first object")
    yield "", value


def _first_line(blocks: Iterator[bytes]) -> bytes:
    """All up to the block that ends the first line that is not blank; of a list, just the first block of it."""
    parts: list[bytes] = []
    begun, size = b"", 0
    for block in blocks:
        parts.append(block)
        size += len(block)
        line = block if begun else block.lstrip()
        begun = begun or line[:1]
        if (begun and begun != b"{") or b"\n" in line or size > LONGEST:
            break
    return b"".join(parts)


def _elements(text: _JsonText) -> Found:
    """The elements of a JSON list."""
    text.peek()
    text.at += 1
    if text.peek() == "]":
        raise DataError("holds an empty list; write objects into it")
    number = 0
    while True:
        number += 1
        try:
            value = text.value()
            end = text.peek()
            if end not in (",", "]"):
                raise text.broken("a comma or the list's end is missing" if end else "the list is never closed")
        except DamagedError:
            raise
        except DataError as error:
            raise DataError(f"item {number}: {error}") from None
        text.at += 1
        yield f": item {number}", value
        if end == "]":
            break
    if text.peek():
        raise text.broken("more follows the list")


class _JsonText:
    """JSON of any length, of which only the value that is being read is in memory."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        # Bytes that are not UTF-8 become lone surrogates, so that only the element that holds them is lost.
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text, self._lines, self._columns = "", 0, 0  # what was dropped in front: lines, and columns of the last
        self._ended = False
        self.at = 0

    def peek(self) -> str:
        """The next character that is not blank, or "" at the end."""
        while True:
            blanks = JSON_BLANKS.match(self._text, self.at)
            self.at = blanks.end() if blanks else self.at
            if self.at < len(self._text) or not self._more():
                return self._text[self.at : self.at + 1]

    def value(self) -> dict[str, Any] | DataError:
        """The next value, or what is wrong with it alone. Raises `DataError` if what follows it cannot be read."""
        self.peek()
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                # In a text that is cut off, the error is at its end, or at the beginning of an unfinished string.
                unfinished = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                offset = error.pos - self.at
                if not (unfinished and self._more()):
                    raise self.broken(error.msg, self.at + offset) from None
            except (ValueError, RecursionError) as error:
                raise self.broken(str(error)) from None
            else:
                length = end - self.at
                if end < len(self._text) or not self._more():  # or a number might go on
                    break
        raw = self._text[self.at : self.at + length]
        self.at += length
        if not isinstance(value, dict):
            return DataError(f"got {_type(value)}, must be a JSON object; write {{...}} around its fields")
        try:
            raw.encode()
        except UnicodeEncodeError as error:
            byte, where = ord(raw[error.start]) - 0xDC00, len(raw[: error.start].encode())
            return DataError(f"not UTF-8 (byte 0x{byte:02x} at byte {where + 1} of the object); save the file as UTF-8")
        return value

    def broken(self, reason: str, at: int | None = None) -> DataError:
        """The error of what stands at `at`, or where the reading is."""
        at = self.at if at is None else at
        last = self._text.rfind("\n", 0, at)
        line = 1 + self._lines + self._text.count("\n", 0, at)
        column = at - last if last >= 0 else at + 1 + self._columns
        return DataError(
            f"broken JSON at line {line} column {column}: {reason}; must be a list of objects, one object, or one "
            "object a line"
        )

    def _more(self) -> bool:
        """Drop what was read and add at least as much as is left, so that reading a long value again stays cheap."""
        kept = self._text[self.at :]
        if len(kept) > LONGEST:
            raise self.broken(f"a value of more than {LONGEST:,} characters")
        last = self._text.rfind("\n", 0, self.at)
        self._columns = self.at - last - 1 if last >= 0 else self._columns + self.at
        self._lines += self._text.count("\n", 0, self.at)
        pieces, size = [kept], 0
        while not self._ended and size < max(len(kept), 1):
            block = next(self._blocks, None)
            self._ended = block is None
            pieces.append(self._decode(block or b"", final=self._ended))
            size += len(pieces[-1])
        self._text, self.at = "".join(pieces), 0
        return size > 0


def csv_file(blocks: Iterator[bytes], delimiter: str) -> Found:
    """The rows of a table whose first row names the fields, each an object of texts; blank lines are ignored.

    Where a `,` should delimit but the header has none, a `;` or tab in it does, as in the files of many spreadsheets.
    """
    csv.field_size_limit(max(LONGEST, csv.field_size_limit()))
    text = _CsvLines(lines_of(blocks))
    first = next((line for line in text if line.strip()), "")
    if delimiter not in first:
        delimiter = next((other for other in ";\t" if other in first), delimiter)
    rows = csv.reader(chain([first], text), delimiter=delimiter, strict=True)
    header: list[str] = []
    number = 0
    while True:
        problem: DataError | None
        line = text.number + bool(header)
        try:
            row = next(rows, None)
            problem = text.taken_problem()
        except csv.Error as error:
            if text.ended:
                raise DataError(f"the quote that opens at line {line} is never closed; close or double it") from None
            row, problem = [], text.taken_problem() or DataError(f"broken CSV ({error}); mend its quotes")
        if row is None:
            break
        if not header and (row or problem):
            header = _header(row, problem)
        elif row or problem:
            number += 1
            if not problem and len(row) != len(header):
                counts = f"{len(row)} {'field' if len(row) == 1 else 'fields'}, must have {len(header)} as the header"
                problem = DataError(f"has {counts} (line {line}); quote fields that hold a {delimiter!r}")
            yield f": row {number}", problem or dict(zip(header, row, strict=True))
    if not number:
        raise DataError("has no rows; write the names of the fields into the first line, and one example a row below")


def _header(names: list[str], problem: DataError | None) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if problem or twice:
        raise DataError(f"the header: {problem or f'names the field {twice[0]!r} twice; rename one'}")
    return names


class _CsvLines(Iterator[str]):
    """Lines as `csv` wants them; it reads several of them for a row that has line breaks in its fields."""

    def __init__(self, lines: Iterator[tuple[int, bytes]]) -> None:
        self._lines = lines
        self._problem: DataError | None = None
        self.number = 0
        self.ended = False

    def __next__(self) -> str:
        try:
            self.number, line = next(self._lines)
        except StopIteration:
            self.ended = True
            raise
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            self._problem = self._problem or _not_utf8(line, error)
            text = line.decode(errors="replace")
        if "\0" in text:
            self._problem = self._problem or DataError(f"a NUL byte (line {self.number}); save the file as UTF-8 text")
            text = text.replace("\0", "\ufffd")
        return text + "\n"

    def taken_problem(self) -> DataError | None:
        """What was wrong with the lines since the last call."""
        problem, self._problem = self._problem, None
        return problem
