"""The recurrent state of a model, in one layout for every version and backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Sizes(Protocol):
    """What the sizes of every version have."""

    @property
    def layers(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...


class Model(Protocol):
    """A model of any version."""

    like: Tensor

    @property
    def sizes(self) -> Sizes: ...


@dataclass
class ModelState:
    """All that a model remembers of the tokens before.

    Axes: L layers, B rows or documents, H heads, N head size, D width.
    """

    wkv: Tensor
    """(L,B,H,N,N) float32: row = value index, column = key index."""
    shift: Tensor
    """(L,2,B,D): the last input of each layer's time-mix and of its channel-mix."""

    @staticmethod
    def zeros(model: Model, batch: int = 1) -> ModelState:
        """The state before any token, for `batch` rows, on the model's device."""
        s, like = model.sizes, model.like
        return ModelState(
            like.new_zeros(s.layers, batch, s.heads, s.head_size, s.head_size, dtype=torch.float32),
            like.new_zeros(s.layers, 2, batch, s.width),
        )

    def __getitem__(self, rows: slice | Tensor) -> ModelState:
        """The state of some of the B rows."""
        return ModelState(self.wkv[:, rows], self.shift[:, :, rows])
