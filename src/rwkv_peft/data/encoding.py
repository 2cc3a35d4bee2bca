"""Items of a source to documents of tokens, in blocks that processes can share. n documents, N tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import OnBadLine, PrepareConfig
from ..errors import DataError
from .examples import segments_of
from .sources import Item
from .templates import Segment, find_template
from .tokenizer import BYTE_VOCAB_SIZES, WORLD_VOCAB_SIZE, Tokenizer

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
    counts: Counts = field(default_factory=Counts)


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
        """The documents of `items`. Where one must not be skipped, it is the last that is counted."""
        counts = Counts()
        ids, sizes = array("H"), array("i")
        for item in items:
            counts.items += 1
            before, documents = len(ids), len(sizes)
            try:
                if isinstance(item.value, DataError):
                    raise item.value
                every_turn = self.recipe.stop_token is not None
                for segments in segments_of(item.value, self.recipe.fields, self.template, every_turn):
                    start = len(ids)
                    self.add_document(ids, segments, counts)
                    sizes.append(len(ids) - start)
            except DataError as error:
                del ids[before:], sizes[documents:]
                counts.problem = counts.problem or f"{item.origin}: {error}"
                counts.skipped += 1
                if self.recipe.on_bad_line == "stop":
                    break
        return Block(np.array(ids, np.uint16), np.array(sizes, np.int32), counts)

    def add_document(self, ids: array[int], segments: list[Segment], counts: Counts) -> None:
        """Add the tokens of a document to `ids`; it ends with the stop token or with token 0, as in training.

        Each segment is encoded by itself; a single one is plain text, which ends with token 0.
        """
        end = self.tokenizer.end_token
        stop = end if len(segments) == 1 else self.stop
        for segment in segments:
            holds_stop = False
            for stretch in self.tokenizer.stretches(segment.text):
                found = self.tokenizer.encode(stretch)
                ids.extend(found)
                counts.bytes += len(stretch) if stretch.isascii() else len(stretch.encode())
                holds_stop = holds_stop or (stop != end and stop in found)
            counts.stops_inside += holds_stop
            if segment.ends:
                ids.append(stop)
        if not segments[-1].ends:
            ids.append(end)


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
