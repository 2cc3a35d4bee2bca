"""All tokens of a source, side by side, and where each example is among them."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..config import DataConfig, InspectConfig
from ..errors import ConfigError, DataError
from ..files import output_errors
from .binidx import Binidx, is_binidx, open_binidx
from .examples import SHAPES, segments_of
from .masking import Encoded, Encoder, Flags, Ids
from .sources import Item, Split, files_of, read_items
from .templates import Template

Integers = npt.NDArray[np.int64]
AT_ONCE = 2**20  # values that are written at once
MOST_IN_MEMORY = 2**28  # bytes of a source's tokens; what is more goes into a temporary file


@dataclass(frozen=True, eq=False)
class Corpus:
    """The examples of one source. D examples, N tokens of all."""

    title: str
    """The source, for messages."""
    ids: Ids
    """(N,) in memory, or mapped from a file."""
    target: Flags | None
    """(N,) which tokens are targets; None where all are but the first of each example."""
    starts: Integers
    """(D,) where each example begins."""
    lengths: Integers
    """(D,) its tokens: the model reads all but the last of them."""
    vocab_size: int
    """Every id must be below it."""
    skipped: int = 0
    """Examples that could not be used."""
    notes: tuple[str, ...] = ()
    """What should be told."""
    record: Record | None = None
    """What became of each item, where they are inspected; of a binidx, none."""


@dataclass
class Record:
    """What became of the items of a source."""

    origins: list[str] = field(default_factory=list)
    """(D,) of each example, where it stands."""
    forms: Counter[str] = field(default_factory=Counter)
    """Items by the fields that they were read by."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Origin of each item that could not be used, and why."""
    stops: list[str] = field(default_factory=list)
    """Origins of the items whose text holds the stop token."""


class NoneLeftError(DataError):
    """No item of a source can be used."""

    def __init__(self, message: str, record: Record | None) -> None:
        super().__init__(message)
        self.record = record


class Spool:
    """An array that grows at its end: in memory, and in a temporary file once it is long (or at once)."""

    def __init__(self, dtype: Any, in_file: bool | None) -> None:
        self.dtype, self.most = np.dtype(dtype), {None: MOST_IN_MEMORY, True: 0, False: 2**63}[in_file]
        self.pieces: list[npt.NDArray[Any]] = []
        self.file: IO[bytes] | None = None
        self.length = self.waiting = 0

    def add(self, values: npt.NDArray[Any]) -> None:
        """Put `values` at the end."""
        values = values.astype(self.dtype, copy=False)
        self.length += len(values)
        self.pieces.append(values)
        if self.file is None and self.length * self.dtype.itemsize > self.most:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as what is mapped from it
        self.waiting += len(values)
        if self.file is not None and self.waiting >= AT_ONCE:
            self._write()

    def array(self) -> npt.NDArray[Any]:
        """All of it; nothing can be added after."""
        if self.file is None:
            whole = np.concatenate(self.pieces) if self.pieces else np.empty(0, self.dtype)
            self.pieces = [whole]
            return whole
        self._write()
        with output_errors(Path(tempfile.gettempdir())):
            self.file.flush()
        if not self.length:
            return np.empty(0, self.dtype)
        return np.memmap(self.file, self.dtype, "r", shape=(self.length,))

    def _write(self) -> None:
        assert self.file is not None
        if self.pieces:
            with output_errors(Path(tempfile.gettempdir())):
                self.file.write(np.concatenate(self.pieces).data)
            self.pieces.clear()
        self.waiting = 0


def read_corpora(source: str, config: DataConfig, template: Template, encoder: Encoder) -> Iterator[Corpus]:
    """The binidx pairs of a source, each by itself, and its other examples together.

    Raises DataError if it cannot be read, if an example cannot be used (unless they are to be skipped), or if none is
    left.
    """
    if is_binidx(source):
        if Split.parse(config.split).name != "train":
            raise ConfigError(f"--split {config.split}: {source} is one pair of files, which has no splits; use train")
        yield from_binidx(open_binidx(source, encoder.vocab_size), encoder, config.streaming)
        return
    notes: tuple[str, ...] = ()
    if Path(source).is_dir():
        found = files_of(Path(source), config.split)
        notes = tuple(found.notes(source))
        for prefix in found.pairs:
            corpus = from_binidx(open_binidx(str(prefix), encoder.vocab_size), encoder, config.streaming)
            yield replace(corpus, notes=(*notes, *corpus.notes))
            notes = ()
        if found.pairs and not found.files:
            return
    items = read_items(source, config.split, config.subset, config.separator, config.special_tokens)
    yield from_items(source, items, config, template, encoder, notes)


def from_binidx(pair: Binidx, encoder: Encoder, in_file: bool | None) -> Corpus:
    """The documents of a binidx pair; documents of one token hold nothing to predict, and are left out."""
    if encoder.mask in ("answers", "last"):
        raise ConfigError(f"--mask {encoder.mask}: {pair.title} is binidx, which has no answers marked; use qa")
    usable = pair.lengths > 1
    starts, lengths, vocab_size = pair.starts[usable], pair.lengths[usable], encoder.vocab_size
    if not len(starts):
        raise DataError(f"{pair.title}: no document has two tokens or more; prepare it again")
    notes: tuple[str, ...] = ()
    if len(starts) < len(usable):
        notes = (f"{pair.title}: {len(usable) - len(starts):,} documents of fewer than two tokens left out",)
    if encoder.mask not in ("qa", "se"):
        return Corpus(pair.title, pair.ids, None, starts, lengths, vocab_size, notes=notes)
    ids, target = Spool(pair.ids.dtype, in_file), Spool(np.bool_, in_file)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        document = pair.ids[start : start + length]
        ids.add(document)
        target.add(encoder.targets(document, np.zeros(length, np.bool_)))
    starts = np.cumsum(lengths) - lengths
    return Corpus(pair.title, ids.array(), target.array(), starts, lengths, vocab_size, notes=notes)


def from_items(
    source: str, items: Iterator[Item], config: DataConfig, template: Template, encoder: Encoder, notes: tuple[str, ...]
) -> Corpus:
    """Encode every example of a source, and put them side by side."""
    vocab_size = encoder.vocab_size
    ids = Spool(np.uint16 if vocab_size <= 2**16 else np.int32, config.streaming)
    target = Spool(np.bool_, config.streaming)
    lengths: list[int] = []
    begun = 0  # tokens of a document of which there is more
    skipped, first_problem = 0, ""
    record = Record() if isinstance(config, InspectConfig) else None
    for origin, examples in encoded_examples(items, config, template, encoder, record):
        if isinstance(examples, DataError):
            problem = f"{origin}: {examples}"
            if config.on_bad_line == "stop":
                raise DataError(problem)
            first_problem = first_problem or problem
            skipped += 1
            continue
        for example in examples:
            ids.add(example.ids)
            target.add(example.target)
            begun += len(example.ids)
            if not example.more:
                lengths.append(begun)
                begun = 0
    if not lengths:
        raise NoneLeftError(f"{first_problem} (the first of {skipped} skipped examples; none is left)", record)
    array = np.array(lengths, np.int64)
    starts = np.cumsum(array) - array
    return Corpus(source, ids.array(), target.array(), starts, array, vocab_size, skipped, notes, record)


def encoded_examples(
    items: Iterator[Item], config: DataConfig, template: Template, encoder: Encoder, record: Record | None = None
) -> Iterator[tuple[str, list[Encoded] | DataError]]:
    """Origin of each item with the examples in it, or why it has none; as many as --split can choose of.

    A long document comes in several items; if it cannot be used, the first of them says so.
    """
    every_turn, most = config.stop_token is not None, Split.parse(config.split).most
    count = 0
    for item in items:
        stops = encoder.stops_inside
        try:
            if isinstance(item.value, DataError):
                raise item.value
            if isinstance(item.value, str) and (item.continues or item.more):
                found = encoder.encode_part(item.value, item.continues, item.more)
            else:
                found = [encoder.encode(e) for e in segments_of(item.value, config.fields, template, every_turn)]
        except DataError as error:
            if item.continues:
                continue
            if record is not None:
                record.problems.append((item.origin, str(error)))
            yield item.origin, error
            continue
        found = found[: most - count if most else None]
        count += 0 if item.more else len(found)
        if record is not None and not item.more:
            record.origins += [item.origin] * len(found)
            record.forms[form_of(item.value, config.fields)] += 1
            record.stops += [item.origin] * (encoder.stops_inside > stops)
        yield item.origin, found
        if most and count >= most:
            return


def form_of(value: dict[str, Any] | str, fields: tuple[str, str] | None) -> str:
    """The fields that a usable item was read by."""
    if isinstance(value, str):
        return "plain text"
    for is_there in (lambda name: value.get(name) is not None, value.__contains__):
        for shape in [fields] if fields else SHAPES:
            if all(map(is_there, shape)):
                return " + ".join(shape)
    raise AssertionError("an item without a form is not usable")
