"""What data would be as training sees it. D examples, N tokens of all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from ..config import MICRO_BATCH, InspectConfig
from ..data.corpus import Corpus, Record
from ..data.dataset import DEEDS, Dataset, count_targets, load_dataset, plural
from ..data.masking import Encoder, encoder_for
from ..data.sampling import Sampler
from ..data.templates import find_template
from ..data.tokenizer import BYTE_VOCAB_SIZES, WORLD_VOCAB_SIZE, Tokenizer, tokenizer_for
from ..loading import read_sizes
from .lengths import statistics

Row = tuple[str, str]
"""A label and what stands behind it; no label is more of the line above."""

MOST_REASONS = 5
STOPS = "hold the stop token"  # in the note of the encoder, which does not say where
EMPTY = re.compile(
    "no answer tokens(?!: no (?:message is by|answer is to be))"
)  # in messages of items that have an empty answer
# What differs between messages of one kind: quoted texts and numbers
DETAILS = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|0x[0-9a-f]+|\d+")


@dataclass(frozen=True, eq=False)
class View:
    """Data with its tokenizer, laid out as training would."""

    config: InspectConfig
    tokenizer: Tokenizer
    encoder: Encoder
    data: Dataset
    sampler: Sampler

    def origin(self, example: int) -> str:
        """Where an example stands."""
        place = self.data.examples
        corpus = self.data.corpora[int(place.corpus[example])]
        number = int(np.flatnonzero(corpus.starts == place.start[example])[0])
        return f"{corpus.title}: document {number + 1}" if corpus.record is None else corpus.record.origins[number]


def tokenizer_of(config: InspectConfig) -> Tokenizer:
    """The tokenizer of the settings, for the model that they name or else the largest vocabulary that there is."""
    size = BYTE_VOCAB_SIZES[-1] if config.tokenizer == "byte" else WORLD_VOCAB_SIZE
    if config.model:
        size = read_sizes(config.model).vocab_size
    tokenizer = tokenizer_for(config.tokenizer, size)
    return tokenizer.with_special(config.special_tokens, size) if config.special_tokens else tokenizer


def view_of(config: InspectConfig, tokenizer: Tokenizer) -> View:
    """Read and lay out all data.

    Raises ConfigError and DataError, which is a NoneLeftError where no example of a source can be used.
    """
    data = load_dataset(config, tokenizer)
    rows = MICRO_BATCH[config.sampling]
    sampler = Sampler(data, config.sampling, rows, windows=config.windows, pad_side=config.pad_side)
    return View(config, tokenizer, encoder_for(config, tokenizer, find_template(config.template)), data, sampler)


def rows_of(view: View) -> Iterator[Row]:
    """All that is told of data, in this order."""
    data, records = view.data, [corpus.record for corpus in view.data.corpora if corpus.record is not None]
    yield from source_rows(data)
    yield from form_rows(records)
    chosen = f" (--split {data.split} of {len(data.examples) + data.left_out:,})" if data.left_out else ""
    yield "examples", f"{len(data.examples):,}{chosen}"
    yield from problem_rows(records)
    yield from duplicate_rows(view)
    yield from token_rows(data, is_stream=view.sampler.stream is not None)
    stops = list(chain.from_iterable(record.stops for record in records))
    if stops:
        yield (
            "stop token",
            f"{view.encoder.stop} is inside the text of {plural(len(stops), 'example')}, first {stops[0]}",
        )
    yield from (("note", note) for note in data.notes if STOPS not in note)
    yield "lengths", statistics(data.examples.inputs)


def source_rows(data: Dataset) -> Iterator[Row]:
    """What each source has."""
    counts = np.bincount(data.examples.corpus, minlength=len(data.corpora))
    tokens = np.bincount(data.examples.corpus, data.examples.inputs, len(data.corpora)).astype(np.int64)
    label = "data"
    for number, corpus in enumerate(data.corpora):
        kind = "document" if corpus.record is None else "example"
        text = f"{corpus.title}: {plural(int(counts[number]), kind)}, {plural(int(tokens[number]), 'token')}"
        if corpus.record is None:
            text += f"; binidx, {corpus.ids.dtype}, largest id {largest_id(corpus):,}"
        yield label, text
        label = ""
    if data.shares:
        yield "shares", ", ".join(f"{share:.1%}" for share in data.shares)


def largest_id(corpus: Corpus) -> int:
    """The largest id of a corpus, read in pieces."""
    step = 2**24
    return max(int(corpus.ids[at : at + step].max()) for at in range(0, len(corpus.ids), step))


def form_rows(records: list[Record]) -> Iterator[Row]:
    """The fields by which items were read."""
    forms = sum((record.forms for record in records), Counter[str]())
    if forms:
        yield "forms", ", ".join(f"{form} ({count:,})" for form, count in forms.most_common())


def problem_rows(records: list[Record]) -> Iterator[Row]:
    """How many items cannot be used, and why."""
    problems = [problem for record in records for problem in record.problems]
    if not problems:
        return
    usable = sum(record.forms.total() for record in records)
    kinds: dict[str, list[tuple[str, str]]] = {}
    for origin, message in problems:
        kinds.setdefault(DETAILS.sub("…", message.partition(";")[0]), []).append((origin, message))
    yield "unusable", f"{len(problems):,} of {len(problems) + usable:,} cannot be used; the first of each kind:"
    most = sorted(kinds.values(), key=len, reverse=True)
    for members in most[:MOST_REASONS]:
        yield "", f"{len(members):,}x {': '.join(members[0])}"
    if len(most) > MOST_REASONS:
        left = sum(map(len, most[MOST_REASONS:]))
        yield "", f"{left:,}x of {plural(len(most) - MOST_REASONS, 'other kind')}"
    empty = sum(bool(EMPTY.search(message)) for _, message in problems)
    if empty:
        yield "empty", f"{plural(empty, 'answer')}, among these"


def duplicate_rows(view: View) -> Iterator[Row]:
    """How many examples are the same as an earlier one."""
    same = earlier(view.data)
    found = np.flatnonzero(same < np.arange(len(same)))
    if len(found):
        first, again = view.origin(int(same[found[0]])), view.origin(int(found[0]))
        share = len(found) / len(same)
        yield "duplicates", f"{plural(len(found), 'example')} ({share:.1%}), first {again}, the same as {first}"


def earlier(data: Dataset) -> npt.NDArray[np.int64]:
    """(D,) the first example that has the same tokens, for each; by a hash of 64 bits."""
    hashes = np.empty(len(data.examples), np.int64)
    places = zip(
        data.examples.corpus.tolist(), data.examples.start.tolist(), data.examples.inputs.tolist(), strict=True
    )
    for number, (corpus, start, inputs) in enumerate(places):
        ids = data.corpora[corpus].ids[start : start + inputs + 1]
        hashes[number] = hash(ids.astype(np.int32).tobytes())
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    return first[which]


def token_rows(data: Dataset, is_stream: bool) -> Iterator[Row]:
    """Tokens, how many are trained on, and what the context length takes away; of a stream, nothing."""
    tokens, wanted = int(data.examples.inputs.sum()), int(count_targets(data.corpora, data.examples).sum())
    yield "tokens", f"{tokens:,}, of which {data.target_tokens:,} ({data.target_tokens / tokens:.1%}) are trained on"
    if data.long and not is_stream:
        lost = wanted - data.target_tokens
        told = f"{lost:,} tokens to train on ({lost / wanted:.1%}) of {plural(data.lost, 'example')} are lost"
        yield (
            "too long",
            (
                f"{plural(data.long, 'example')} ({data.long / len(data.examples):.1%}) for --ctx-len {data.ctx_len}: "
                f"{DEEDS[data.overlong]}; {told if lost else 'nothing is lost'}"
            ),
        )


def layout_row(view: View) -> Row:
    """How full the rows are, and how many steps they make."""
    sampler, rows = view.sampler, len(view.sampler.rows(0))
    return "rows", (
        f"{rows:,} an epoch with --sampling {sampler.sampling}, {sampler.fill():.1%} full; "
        f"{plural(sampler.steps(0), 'step')} with --micro-batch {sampler.micro_batch}"
    )
