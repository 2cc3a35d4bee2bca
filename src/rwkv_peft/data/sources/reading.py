"""Where examples come from: a file, a folder of files, or a dataset, read one item after the other.

`read_items` yields what stands there, each with its origin; what it means is for `examples.py`. Only a block or batch
is in memory at a time, whatever the size of the source.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError
from . import hub
from .formats import Found, Lines, Part, csv_file, json_file, unparsed_lines
from .places import SUFFIXES, TEXTS, Split, files_of, form_of, kind_of, readable
from .streams import PACKERS, DamagedError, Watch, blocks_of, text_blocks
from .texts import text_file, whole_text_file


@dataclass(frozen=True, slots=True)
class Item:
    """One thing read, before it is an example."""

    origin: str
    """Where it stands: `chats.jsonl:12`, `list.json: item 3`, `t.csv: row 7`, `org/name[train]: row 4`."""
    value: dict[str, Any] | str | DataError
    """An object, the text of a document or of a part of it, or why it cannot be used (without the origin)."""
    continues: bool = False
    """Whether it is a part of the document of the item before."""
    more: bool = False
    """Whether the next item is a part of the same document. Parts are encoded each by itself."""


@dataclass(frozen=True, slots=True)
class LineBlock:
    """Lines of a file that are not items yet, so that another process can make them."""

    name: str
    """The file."""
    lines: Lines

    def items(self) -> Iterator[Item]:
        """An item for each line that is not blank."""
        for place, value in self.lines.objects():
            yield Item(self.name + place, value)


Piece = Item | LineBlock


def read_items(
    path: str | Path, split: str = "train", subset: str = "", separator: str = "", special_tokens: Sequence[str] = ()
) -> Iterator[Item]:
    """Read a file, a folder of files, a folder of `save_to_disk`, or a dataset of the hub, in this order.

    `split` is a name; bounds behind it are for the caller. Only folders and datasets have other splits than train.
    `subset` is a configuration of a dataset on the hub, and `separator` stands between the documents of a text file,
    which is one document without it. A long one comes in parts, none of which ends inside one of `special_tokens`.

    An item that cannot be used has a `DataError` as its value, so that the caller may skip and count it.

    Raises:
        ConfigError: `split` has no known form or is not there, or a package is not installed.
        DataError: there is no such source, or it is empty, damaged or unreadable from some place on.
    """
    return chain.from_iterable(map(items_of, read_pieces(path, split, subset, separator, special_tokens)))


def items_of(piece: Piece) -> Iterable[Item]:
    """The items in a piece of a source."""
    return [piece] if isinstance(piece, Item) else piece.items()


def read_pieces(
    path: str | Path,
    split: str = "train",
    subset: str = "",
    separator: str = "",
    special_tokens: Sequence[str] = (),
    watch: Watch | None = None,
) -> Iterator[Piece]:
    """The same as `read_items` with lines of JSON not parsed yet: always in the same pieces.

    `watch` is told of the bytes of `size_of` as they are read.
    """
    part = Split.parse(split)
    name, path = part.name, os.fspath(path)
    kind = kind_of(path)
    if kind == "hub":
        yield from _pieces(path, lambda: hub.hub_rows(path, name, subset, whole=part.most is None))
    elif kind == "saved":
        yield from _pieces(path, lambda: hub.saved_rows(Path(path), name))
    elif kind == "folder":
        files = files_of(path, name)
        if not files.files:
            raise DataError(f"{path}: holds only binidx files; give --data their prefixes, e.g. {files.pairs[0]}")
        for file in files.files:
            yield from _read_file(file, separator, special_tokens, watch)
    else:
        if name != "train":
            raise ConfigError(
                f"--split {split}: {path} is one file, which has no splits; write train, or cut train[a:b]"
            )
        yield from _read_file(Path(path), separator, special_tokens, watch)


def _read_file(
    path: Path, separator: str, special_tokens: Sequence[str] = (), watch: Watch | None = None
) -> Iterator[Piece]:
    """Read one file by its suffix. Raises what `read_items` does."""
    form = form_of(path)
    if not form:
        suffix = "".join(path.suffixes[-2:] if path.suffix.lower() in PACKERS else path.suffixes[-1:])
        raise DataError(
            f"{path}: {f'unknown suffix {suffix!r}' if suffix else 'has no suffix'}; rename it to what it is: "
            f"{', '.join(SUFFIXES)}, each also with {' or '.join(PACKERS)} behind it"
        )
    with readable(str(path)):
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: is not a regular file; write what it gives into one, and give --data that")
    yield from _pieces(str(path), lambda: _reader(path, form, separator, special_tokens, watch))


def _reader(path: Path, form: str, separator: str, special_tokens: Sequence[str], watch: Watch | None) -> Found:
    if form == ".parquet":
        return hub.parquet_rows(path, watch)
    if form in TEXTS and not separator:
        return whole_text_file(lambda ahead: text_blocks(blocks_of(path, None if ahead else watch)), special_tokens)
    blocks = text_blocks(blocks_of(path, watch))
    if form in (".csv", ".tsv"):
        return csv_file(blocks, "\t" if form == ".tsv" else ",")
    if form in TEXTS:
        return text_file(blocks, separator)
    return json_file(blocks) if form == ".json" else unparsed_lines(blocks)


def _pieces(name: str, read: Callable[[], Found]) -> Iterator[Piece]:
    """The pieces of a source, and its name in front of what ends the reading."""
    place = ""
    with readable(name):
        try:
            for place, value in read():
                if isinstance(value, Lines):
                    yield LineBlock(name, value)
                elif isinstance(value, Part):
                    yield Item(name + place, value.text, value.continues, value.more)
                else:
                    yield Item(name + place, value)
        except DamagedError as error:
            reason, _, remedy = str(error).rpartition("; ")
            last = place.strip(": ")
            after = f" after {'line ' if last.isdigit() else ''}{last}" if last else " from its beginning"
            raise DataError(f"{name}: {reason}{after}; {remedy}") from None
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
