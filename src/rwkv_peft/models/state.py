"""The recurrent state of a model, in one layout for every version and backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Names of a state's tensors in files and of a learned state's parameters: (H,N,N), and two of (D,)
WKV = "blocks.{}.att.time_state"
STATES = (".time_state", ".shift_state")  # how they end
SHIFT = ("blocks.{}.att.shift_state", "blocks.{}.ffn.shift_state")


@dataclass(frozen=True)
class Sizes:
    """What the sizes of every version have."""

    layers: int
    width: int
    head_size: int
    vocab_size: int
    ffn: int

    @property
    def heads(self) -> int:
        return self.width // self.head_size


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

    def to(self, device: torch.device | str) -> ModelState:
        """The state on a device."""
        return ModelState(self.wkv.to(device), self.shift.to(device))
