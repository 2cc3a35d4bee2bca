"""Which rows a step sees, and its batches: a pure function of data, settings, seed and the step's number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..config import Sampling, TrainConfig
from ..config import Windows as WindowKind
from .batches import Batch, beside, padded
from .dataset import Dataset
from .epochs import Rows, Stream, rows_of_pieces


class Sampler:
    """The batches of every step of a run.

    An epoch is one pass over every example (for `get`, over every token), whatever the number of processes. Where
    sources have shares, an epoch has as many examples as they have together, and each source gives its share of them:
    some more than once before a small source begins anew, and of a large one the next part.
    """

    def __init__(
        self,
        data: Dataset,
        sampling: Sampling = "pack",
        micro_batch: int = 8,
        grad_accum: int = 1,
        seed: int = 0,
        windows: WindowKind = "tiles",
        pad_side: Literal["right", "left"] = "right",
        shuffle: bool = True,
    ) -> None:
        self.data, self.sampling, self.micro_batch, self.grad_accum = data, sampling, micro_batch, grad_accum
        self.seed, self.pad_side, self.shuffle = seed, pad_side, shuffle
        self.stream = Stream(data, windows) if sampling == "get" else None
        self.rows = lru_cache(2)(self._rows)
        self._row_counts: dict[int, int] = {}

    @staticmethod
    def of(config: TrainConfig, data: Dataset) -> Sampler:
        """As the settings of a run say, which must be resolved."""
        assert config.micro_batch is not None
        return Sampler(
            data, config.sampling, config.micro_batch, config.grad_accum, config.seed, config.windows, config.pad_side
        )

    def steps(self, epoch: int, world_size: int = 1) -> int:
        """Steps in an epoch; the last one may have fewer rows."""
        if epoch not in self._row_counts:
            self._row_counts[epoch] = len(self.rows(epoch))
        return math.ceil(self._row_counts[epoch] / (self.micro_batch * self.grad_accum * world_size))

    def total_steps(self, epochs: float, world_size: int = 1) -> int:
        """Steps that so many epochs take."""
        whole = int(epochs)
        total = sum(self.steps(epoch, world_size) for epoch in range(whole))
        return max(1, total + (round((epochs - whole) * self.steps(whole, world_size)) if epochs > whole else 0))

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """The micro-batches of a process in an optimiser step, which counts from 0.

        Which rows a step sees depends on their number only, not on how they are dealt to micro-batches and processes.
        They are sorted, longest first: rows of like length share a batch, and memory runs out at once if it does.
        """
        epoch = 0
        while step >= self.steps(epoch, world_size):
            step -= self.steps(epoch, world_size)
            epoch += 1
        rows, size = self.rows(epoch), self.micro_batch * self.grad_accum * world_size
        chosen = [rows[row] for row in range(step * size, min((step + 1) * size, len(rows)))]
        chosen.sort(key=lambda row: -self._inputs(row))
        return list(self._batches(chosen[rank::world_size]))

    def fill(self, epoch: int = 0) -> float:
        """The share of the rows' places, of --ctx-len tokens each, that hold a token."""
        rows = self.rows(epoch)
        return sum(self._inputs(rows[row]) for row in range(len(rows))) / (len(rows) * self.data.ctx_len)

    def _rows(self, epoch: int) -> Rows:
        if self.stream is not None:
            return self.stream.rows(self.seed, epoch)
        return rows_of_pieces(self.data, self.sampling, self.seed, epoch, self.shuffle)

    def _inputs(self, row: npt.NDArray[np.int64]) -> int:
        if self.stream is not None:
            return self.stream.length(int(row[0])) - 1
        return int(self.data.pieces.inputs[row].sum())

    def _batches(self, rows: list[npt.NDArray[np.int64]]) -> Iterator[Batch]:
        for at in range(0, len(rows), self.micro_batch):
            members = [member for row in rows[at : at + self.micro_batch] for member in row.tolist()]
            if self.stream is not None:
                yield padded([self.stream.read(start) for start in members])
            elif self.sampling == "pack":
                yield beside([self.data.piece(piece) for piece in members])
            else:
                yield padded([self.data.piece(piece) for piece in members], self.pad_side)
