"""Examples to rows, rows to the micro-batches of a step. B rows of a batch, T tokens of its longest row, n targets.

What a step sees is a pure function of the data, the seed and the step's number, so that a run can resume anywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..config import Overlong, TrainConfig
from ..errors import ConfigError, DataError
from .masking import Encoded, encode_example
from .text import read_examples
from .tokenizer import Tokenizer

SPLIT = re.compile(r"train(?:\[(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?\])?")


@dataclass(frozen=True)
class Counts:
    """What became of the data."""

    examples: int
    """Examples read, and chosen by --split."""
    rows: int
    tokens: int
    """Tokens that the model reads in one epoch."""
    target_tokens: int
    """Tokens that it is trained to predict in one epoch."""
    skipped: int
    """Lines that could not be used."""
    overlong: int
    """Examples longer than the context length."""
    lost: int
    """Examples of which some or all targets are not trained on, because they are too long."""
    left_out: int = 0
    """Examples read that --split does not choose."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Every row of an epoch, and what became of the examples that they come from."""

    rows: list[Encoded]
    counts: Counts
    ctx_len: int
    overlong: Overlong
    split: str = "train"

    def summary(self) -> str:
        """One line that tells what is trained on and hides no loss."""
        count = self.counts
        examples = _count(count.examples, "example")
        if self.split != "train":
            examples = f"{count.examples:,} of {_count(count.examples + count.left_out, 'example')} ({self.split})"
        parts = [
            f"{examples}, {_count(count.rows, 'row')}, {_count(count.tokens, 'token')} "
            f"({count.target_tokens:,} trained on)"
        ]
        if count.overlong:
            deed = {"split": "split into rows", "truncate": "truncated", "drop": "dropped"}[self.overlong]
            loss = f" ({count.lost:,} lost answer tokens)" if count.lost else ""
            parts.append(f"{count.overlong:,} longer than --ctx-len {self.ctx_len}: {deed}{loss}")
        if count.skipped:
            parts.append(f"{_count(count.skipped, 'bad line')} skipped")
        return "; ".join(parts)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows computed at once, on the CPU."""

    tokens: Tensor
    """(B, T) int64, padded with 0 on the right, where the padding comes after all that counts."""
    positions: Tensor
    """(n,) int64: indices into B·T of the tokens after which a target is predicted."""
    labels: Tensor
    """(n,) int64: the targets."""
    inputs: int
    """Tokens that are no padding."""


def load_dataset(config: TrainConfig, tokenizer: Tokenizer) -> Dataset:
    """Read, encode and fit all of `config.data`.

    Raises:
        ConfigError: --split has no known form.
        DataError: what `read_examples` raises, that --split chooses nothing, or that no row is left.
    """
    choose(config.split, 0)  # its form is wrong before anything is read
    examples = read_examples(config.data, config.fields, config.on_bad_line)
    chosen = examples.items[choose(config.split, len(examples.items))]
    if not chosen:
        raise DataError(
            f"--split {config.split}: none of the {_count(len(examples.items), 'example')}; choose a wider one"
        )
    rows: list[Encoded] = []
    overlong = lost = 0
    for segments in chosen:
        encoded = encode_example(segments, tokenizer)
        fitted = fit(encoded, config.ctx_len, config.overlong)
        overlong += encoded.inputs > config.ctx_len
        lost += sum(row.targets for row in fitted) < encoded.targets
        rows += fitted
    if not rows:
        raise DataError(
            f"{', '.join(map(str, config.data))}: no row is left: with --ctx-len {config.ctx_len} and --overlong "
            f"{config.overlong}, no example keeps an answer token; use --overlong split or a longer --ctx-len"
        )
    counts = Counts(
        examples=len(chosen),
        rows=len(rows),
        tokens=sum(row.inputs for row in rows),
        target_tokens=sum(row.targets for row in rows),
        skipped=examples.skipped,
        overlong=overlong,
        lost=lost,
        left_out=len(examples.items) - len(chosen),
    )
    return Dataset(rows, counts, config.ctx_len, config.overlong, config.split)


def choose(split: str, count: int) -> slice:
    """Which of `count` examples `split` names, in Hugging Face's form: `train[:1000]`, `train[10%:90%]`, `train[-50:]`.

    Shares are rounded to the nearest example; what is beyond the last one is left away. Raises ConfigError if it has
    another form.
    """
    form = SPLIT.fullmatch(split.strip())
    if form is None:
        raise ConfigError(f"--split {split}: no known form; write train, train[:1000], train[1000:] or train[10%:90%]")
    bounds = ((form[1], form[2]), (form[3], form[4]))
    return slice(*(None if not n else round(int(n) * count / 100) if share else int(n) for n, share in bounds))


def fit(encoded: Encoded, ctx_len: int, overlong: Overlong) -> list[Encoded]:
    """Rows of at most `ctx_len` input tokens, that is `ctx_len` + 1 ids, each with a target.

    `split` keeps every target in exactly one row: a row begins with the last id of the one before. `truncate` keeps the
    first row, `drop` none.
    """
    if encoded.inputs <= ctx_len:
        return [encoded]
    if overlong == "drop":
        return []
    starts = range(0, encoded.inputs, ctx_len) if overlong == "split" else (0,)
    rows = (_cut(encoded, start, start + ctx_len + 1) for start in starts)
    return [row for row in rows if row.targets]


def _cut(encoded: Encoded, start: int, end: int) -> Encoded:
    target = encoded.target[start:end].copy()
    target[0] = False
    return Encoded(encoded.ids[start:end], target)


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """(n,) read-only: the order of the rows in an epoch, a permutation that depends on nothing but the arguments."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.setflags(write=False)  # The cache saves each step a permutation of all rows, and hands out the same array.
    return order


def steps_per_epoch(dataset: Dataset, micro_batch: int, grad_accum: int) -> int:
    """Steps in which every row is seen once; the last one may be smaller."""
    return ceil(len(dataset.rows) / (micro_batch * grad_accum))


def step_batches(dataset: Dataset, step: int, micro_batch: int, grad_accum: int, seed: int) -> list[Batch]:
    """The micro-batches of an optimiser step, which counts from 0: at most `grad_accum` of at most `micro_batch` rows.

    Which rows a step sees depends on the product of the two only. They are sorted, longest first, so that rows of like
    length share a batch with little padding, and so that memory runs out at once if it does.
    """
    epoch, index = divmod(step, steps_per_epoch(dataset, micro_batch, grad_accum))
    size = micro_batch * grad_accum
    order = epoch_order(len(dataset.rows), seed, epoch)[index * size : (index + 1) * size]
    rows = sorted((dataset.rows[row] for row in order), key=lambda row: -row.inputs)
    return [collate(rows[start : start + micro_batch]) for start in range(0, len(rows), micro_batch)]


def collate(rows: list[Encoded]) -> Batch:
    """One batch of `rows`, as wide as the longest."""
    shape = (len(rows), max(row.inputs for row in rows))
    tokens, labels, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    for index, row in enumerate(rows):
        tokens[index, : row.inputs] = row.ids[:-1]
        labels[index, : row.inputs] = row.ids[1:]
        targets[index, : row.inputs] = row.target[1:]
    positions = np.flatnonzero(targets)
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.from_numpy(labels.ravel()[positions]),
        inputs=sum(row.inputs for row in rows),
    )


def _count(number: int, noun: str) -> str:
    """`1 row`, `1,204 rows`."""
    return f"{number:,} {noun}" + ("s" if number != 1 else "")
