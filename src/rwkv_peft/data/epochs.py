"""Which rows an epoch has, in which order: pure functions of the data, the seed and the epoch's number."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..config import Sampling
from ..config import Windows as WindowKind
from ..errors import ConfigError, DataError
from .binidx import magic_prime
from .dataset import Dataset
from .masking import Encoded
from .packing import best_fit

Integers = npt.NDArray[np.int64]


class Rows:
    """The rows of an epoch: each has some members, which are pieces of the data, or places in its stream."""

    def __init__(self, members: Integers, bounds: Integers | None = None) -> None:
        self.members = members
        self.bounds = np.arange(len(members) + 1) if bounds is None else bounds

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, row: int) -> Integers:
        return self.members[self.bounds[row] : self.bounds[row + 1]]


def rows_of_pieces(data: Dataset, sampling: Sampling, seed: int, epoch: int, shuffle: bool) -> Rows:
    """Every piece in one row: several to a row with `pack`, one else."""
    random = np.random.default_rng([seed, epoch])
    drawn = draw(data, seed, epoch)
    if shuffle:
        random.shuffle(drawn)
    if sampling != "pack":
        return Rows(drawn)
    row_of, count = best_fit(data.pieces.inputs[drawn], data.ctx_len)
    order = np.argsort(row_of, kind="stable")
    sizes = np.bincount(row_of, minlength=count)
    starts = np.cumsum(sizes) - sizes
    rows = random.permutation(count) if shuffle else np.arange(count)
    sizes, starts = sizes[rows], starts[rows]
    bounds = np.concatenate(([0], np.cumsum(sizes)))
    return Rows(drawn[order][np.arange(len(drawn)) - np.repeat(bounds[:-1] - starts, sizes)], bounds)


def draw(data: Dataset, seed: int, epoch: int) -> Integers:
    """The pieces of an epoch: all, or where the sources have shares, those of as many examples by these shares."""
    if not data.shares:
        return np.arange(len(data.pieces))
    first = np.searchsorted(data.source, np.arange(len(data.shares) + 1))
    counts = np.diff(first)
    taken = [
        first[i] + take(int(counts[i]), quota, seed, i, epoch)
        for i, quota in enumerate(quotas(data.shares, len(data.examples)))
    ]
    examples = np.concatenate(taken)
    sizes = data.first[examples + 1] - data.first[examples]
    offset = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    pieces: Integers = np.repeat(data.first[examples], sizes) + offset
    return pieces


def quotas(shares: list[float], total: int) -> list[int]:
    """What each source gives of `total`, at least 1."""
    return [max(1, round(share * total)) for share in shares]


def take(count: int, quota: int, seed: int, source: int, epoch: int) -> Integers:
    """(quota,) the next of `count` things, which are gone through again and again, in a new order each time."""
    at = np.arange(epoch * quota, (epoch + 1) * quota)
    first, last = int(at[0]) // count, int(at[-1]) // count
    passes = [np.random.default_rng([seed, source, n]).permutation(count) for n in range(first, last + 1)]
    taken: Integers = np.concatenate(passes)[at - first * count]
    return taken


class Stream:
    """All examples one behind the other, each ended by its end token, and windows of it."""

    def __init__(self, data: Dataset, kind: WindowKind) -> None:
        self.data, self.kind = data, kind
        self.ends = np.cumsum(data.examples.inputs + 1)
        sources = data.source if data.shares else np.zeros(len(data.source), np.int64)
        last = np.searchsorted(sources, np.arange(1, max(1, len(data.shares)) + 1)) - 1
        self.parts = np.concatenate(([0], self.ends[last]))  # where each source begins and ends
        if kind == "prime" and data.shares:
            raise ConfigError("--windows prime: not where sources have shares; leave the shares out, or take tiles")
        self.prime = magic_prime(int(self.ends[-1]), data.ctx_len) if kind == "prime" else None
        if kind == "prime" and self.prime is None:
            raise ConfigError(
                f"--windows prime: {self.ends[-1]:,} tokens are too few for --ctx-len {data.ctx_len}; take tiles"
            )

    def rows(self, seed: int, epoch: int) -> Rows:
        """One window a row: its place in the stream."""
        ctx_len = self.data.ctx_len
        if self.prime is not None:
            return Rows(self.with_targets(prime_order(self.prime, seed, epoch) * ctx_len))
        random = np.random.default_rng([seed, epoch])
        sizes = np.diff(self.parts)
        counts = [max(1, math.ceil((size - 1) / ctx_len)) for size in sizes.tolist()]
        wanted = quotas(self.data.shares, sum(counts)) if self.data.shares else counts
        starts = []
        for i, (size, count, quota) in enumerate(zip(sizes.tolist(), counts, wanted, strict=True)):
            if self.kind == "random":
                within = random.integers(0, max(1, size - ctx_len), quota)
            else:
                within = take(count, quota, seed, i, epoch) * ctx_len
            starts.append(self.parts[i] + within)
        return Rows(self.with_targets(random.permutation(np.concatenate(starts))))

    def with_targets(self, starts: Integers) -> Integers:
        """Those windows in which something is to be learnt. Raises DataError if there is none."""
        if all(corpus.target is None for corpus in self.data.corpora):
            return starts
        kept = [start for start in starts.tolist() if self.read(start).target.any()]
        if not kept:
            raise DataError(
                f"--sampling get: no window of --ctx-len {self.data.ctx_len} holds anything to be learnt; use pack"
            )
        return np.array(kept, np.int64)

    def length(self, start: int) -> int:
        """Tokens of the window that begins at `start`: one more than the context, or less at the end of a source."""
        end = self.parts[np.searchsorted(self.parts, start, "right")]
        return min(self.data.ctx_len + 1, int(end) - start)

    def read(self, start: int) -> Encoded:
        """The window that begins at `start`."""
        left = self.length(start)
        example = int(np.searchsorted(self.ends, start, "right"))
        parts = []
        while left > 0:
            size = int(self.data.examples.inputs[example]) + 1
            skip = start - (int(self.ends[example]) - size)
            length = min(left, size - skip)
            corpus, begin = int(self.data.examples.corpus[example]), int(self.data.examples.start[example])
            part = self.data.window(corpus, begin + skip, length)
            if skip == 0:
                part.target[0] = self.data.learns_first(corpus, np.array([begin]))[0]
            parts.append(part)
            left, start, example = left - length, start + length, example + 1
        target = np.concatenate([part.target for part in parts])
        target[0] = False
        return Encoded(np.concatenate([part.ids for part in parts]), target)


def prime_order(prime: int, seed: int, epoch: int) -> Integers:
    """(prime,) the windows of an epoch in RWKV-LM's order; there the seed is 0.

    The cube is a permutation modulo a prime p with p % 3 = 2, and so is its product with the golden ratio's part of p.
    Source: `MyDataset` in RWKV-LM's dataset.py.
    """
    n = (1 + seed + epoch * prime + np.arange(prime)) % prime
    factor = int(prime * (math.sqrt(5) - 1) / 2)
    return factor * (n * (n * n % prime) % prime) % prime
