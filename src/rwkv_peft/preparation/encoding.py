"""Items of a source to documents of tokens, in blocks that processes can share. n documents, N tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import OnBadLine, PrepareConfig
from ..data.examples import segments_of
from ..data.sources import Item, Piece, items_of
from ..data.templates import find_template
from ..data.tokenizer import BYTE_VOCAB_SIZES, WORLD_VOCAB_SIZE, Tokenizer
from ..errors import DataError

BLOCK = 4 << 20  # characters or bytes of the pieces that go to a process at once
ITEM = 64  # what an item takes besides its characters


@dataclass(frozen=True)
class Recipe:
    """What makes documents of items, as it is sent to other processes."""

    tokenizer: str
    special_tokens: tuple[str, ...]
    template: str
    stop_token: str | None
    fields: tuple[str, str] | None
    on_bad_line: OnBadLine

    @classmethod
    def of(cls, config: PrepareConfig) -> Recipe:
        """The recipe that the settings ask for; without a model, the tokenizer `auto` is World."""
        return cls(
            tokenizer="byte" if config.tokenizer == "byte" else "world",
            special_tokens=tuple(config.special_tokens),
            template=config.template,
            stop_token=config.stop_token,
            fields=config.fields,
            on_bad_line=config.on_bad_line,
        )

    def build_tokenizer(self) -> Tokenizer:
        """Raises ConfigError if it has no room for the special tokens."""
        if self.tokenizer == "byte":
            return Tokenizer.byte().with_special(self.special_tokens, BYTE_VOCAB_SIZES[-1])
        return Tokenizer.world().with_special(self.special_tokens, WORLD_VOCAB_SIZE)


@dataclass(frozen=True)
class Counts:
    """What became of pieces of the sources."""

    pieces: int = 0
    """Those that are done."""
    bytes: int = 0
    """Of text, as UTF-8."""
    skipped: int = 0
    """Items that could not be used."""
    problem: str = ""
    """The first of them: where it is, and why."""
    stops_inside: int = 0
    """Texts that hold the stop token."""

    def plus(self, after: Counts) -> Counts:
        """These, and what comes after them."""
        return Counts(
            pieces=self.pieces + after.pieces,
            bytes=self.bytes + after.bytes,
            skipped=self.skipped + after.skipped,
            problem=self.problem or after.problem,
            stops_inside=self.stops_inside + after.stops_inside,
        )


@dataclass
class Block:
    """Documents that come one after the other; the first may be the end of one, and the beginning of one may follow."""

    ids: npt.NDArray[np.uint16]
    """(N,) side by side."""
    sizes: npt.NDArray[np.int32]
    """(n,) tokens of each; what of the ids is behind them is of a document that goes on in the next block."""
    counts: Counts


class BlockEncoder:
    """Pieces of sources to blocks of documents."""

    def __init__(self, recipe: Recipe) -> None:
        """Raises ConfigError if a setting cannot be honoured."""
        self.recipe = recipe
        self.tokenizer = recipe.build_tokenizer()
        self.template = find_template(recipe.template)
        stop = self.template.stop if recipe.stop_token is None else recipe.stop_token
        self.stop = self.tokenizer.end_token if stop is None else self.tokenizer.stop_id(stop)

    def __call__(self, pieces: list[Piece]) -> Block:
        """The documents of `pieces`. Where a bad item must not be skipped, it is the last that is looked at."""
        ids, sizes = array("H"), array("i")
        counts = Counts(len(pieces))
        for item in chain.from_iterable(map(items_of, pieces)):
            before, documents = len(ids), len(sizes)
            try:
                counts = counts.plus(self._add(item, ids, sizes))
            except DataError as error:
                del ids[before:], sizes[documents:]
                counts = counts.plus(Counts(skipped=1, problem=f"{item.origin}: {error}"))
                if self.recipe.on_bad_line == "stop":
                    break
        return Block(np.array(ids, np.uint16), np.array(sizes, np.int32), counts)

    def _add(self, item: Item, ids: array[int], sizes: array[int]) -> Counts:
        """Add the documents of one item, each ending with the stop token or with token 0, as in training.

        Each segment is encoded by itself; a single one is plain text, which ends with token 0.
        """
        if isinstance(item.value, DataError):
            raise item.value
        if isinstance(item.value, str) and (item.continues or item.more):
            return self._add_part(item.value, item.more, ids, sizes)
        end = self.tokenizer.end_token
        size = stops_inside = 0
        for segments in segments_of(item.value, self.recipe.fields, self.template, self.recipe.stop_token is not None):
            start = len(ids)
            stop = end if len(segments) == 1 else self.stop
            for segment in segments:
                begin = len(ids)
                size += self._add_text(segment.text, ids)
                stops_inside += stop != end and stop in ids[begin:]
                ids.extend([stop] * segment.ends)
            ids.extend([end] * (not segments[-1].ends))
            sizes.append(len(ids) - start)
        return Counts(bytes=size, stops_inside=stops_inside)

    def _add_part(self, text: str, more: bool, ids: array[int], sizes: array[int]) -> Counts:
        """Add a part of a plain text, of which there may be `more`."""
        size = self._add_text(text, ids)
        if not more:
            ids.append(self.tokenizer.end_token)
            sizes.append(len(ids) - sum(sizes))
        return Counts(bytes=size)

    def _add_text(self, text: str, ids: array[int]) -> int:
        """Add the tokens of a text; returns its bytes."""
        size = 0
        for stretch in self.tokenizer.stretches(text):
            ids.fromlist(self.tokenizer.encode(stretch))
            size += len(stretch) if stretch.isascii() else len(stretch.encode())
        return size


def blocks_of(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Lists of pieces of about as many characters, so that memory does not grow with the source."""
    block: list[Piece] = []
    size = 0
    for piece in pieces:
        block.append(piece)
        size += ITEM + (_characters(piece.value) if isinstance(piece, Item) else len(piece.lines.data))
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_characters, value))
    return 8
