"""Items of a source to documents of tokens, in blocks that processes can share. n documents, N tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import OnBadLine, PrepareConfig
from ..data.examples import segments_of
from ..data.sources import Item
from ..data.sources.formats import Value
from ..data.templates import find_template
from ..data.tokenizer import BYTE_VOCAB_SIZES, WORLD_VOCAB_SIZE, Tokenizer
from ..errors import DataError

BLOCK = 4 << 20  # characters of the items that go to a process at once
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
    """What became of items."""

    items: int = 0
    """Lines or rows read."""
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
            items=self.items + after.items,
            bytes=self.bytes + after.bytes,
            skipped=self.skipped + after.skipped,
            problem=self.problem or after.problem,
            stops_inside=self.stops_inside + after.stops_inside,
        )


@dataclass
class Block:
    """Documents that come one after the other."""

    ids: npt.NDArray[np.uint16]
    """(N,) side by side."""
    sizes: npt.NDArray[np.int32]
    """(n,) tokens of each."""
    counts: Counts


class BlockEncoder:
    """Items to blocks of documents."""

    def __init__(self, recipe: Recipe) -> None:
        """Raises ConfigError if a setting cannot be honoured."""
        self.recipe = recipe
        self.tokenizer = recipe.build_tokenizer()
        self.template = find_template(recipe.template)
        stop = self.template.stop if recipe.stop_token is None else recipe.stop_token
        self.stop = self.tokenizer.end_token if stop is None else self.tokenizer.stop_id(stop)

    def __call__(self, items: list[Item]) -> Block:
        """The documents of `items`. Where a bad one must not be skipped, it is the last that is counted."""
        ids, sizes = array("H"), array("i")
        counts = Counts()
        for item in items:
            before, documents = len(ids), len(sizes)
            try:
                counts = counts.plus(self._add(item.value, ids, sizes))
            except DataError as error:
                del ids[before:], sizes[documents:]
                counts = counts.plus(Counts(items=1, skipped=1, problem=f"{item.origin}: {error}"))
                if self.recipe.on_bad_line == "stop":
                    break
        return Block(np.array(ids, np.uint16), np.array(sizes, np.int32), counts)

    def _add(self, value: Value, ids: array[int], sizes: array[int]) -> Counts:
        """Add the documents of one item, each ending with the stop token or with token 0, as in training.

        Each segment is encoded by itself; a single one is plain text, which ends with token 0.
        """
        if isinstance(value, DataError):
            raise value
        end = self.tokenizer.end_token
        size = stops_inside = 0
        for segments in segments_of(value, self.recipe.fields, self.template, self.recipe.stop_token is not None):
            start = len(ids)
            stop = end if len(segments) == 1 else self.stop
            for segment in segments:
                begin = len(ids)
                for stretch in self.tokenizer.stretches(segment.text):
                    ids.fromlist(self.tokenizer.encode(stretch))
                    size += len(stretch) if stretch.isascii() else len(stretch.encode())
                stops_inside += stop != end and stop in ids[begin:]
                ids.extend([stop] * segment.ends)
            ids.extend([end] * (not segments[-1].ends))
            sizes.append(len(ids) - start)
        return Counts(items=1, bytes=size, stops_inside=stops_inside)


def blocks_of(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Lists of items of about as many characters, so that memory does not grow with the source."""
    block: list[Item] = []
    size = 0
    for item in items:
        block.append(item)
        size += ITEM + _characters(item.value)
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
