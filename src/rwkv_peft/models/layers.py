"""Layers that the versions share.

A weight is used in the dtype of the activations, whatever it is stored in: weights that train may be float32 in a bf16
model. Axes: B rows, T tokens, D width, S documents.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import triton


class Embedding(nn.Embedding):
    """A row of the weight for each token. The weight may lie in the CPU's memory, where a GPU reads the rows."""

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self.weight
        if weight.device == tokens.device:
            return F.embedding(tokens, weight)
        if tokens.is_cuda and weight.is_pinned() and not weight.requires_grad and triton.is_installed():
            rows: Tensor = triton.rows_of(weight, tokens)
            return rows
        return F.embedding(tokens.to(weight.device), weight).to(tokens.device)


class Documents:
    """The tokens, and where documents begin and end: B rows of T tokens, or one row that holds S documents."""

    def __init__(self, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens {tuple(tokens.shape)}: must be (B,T) with T at least 1")
        self.tokens = tokens
        # on the CPU, so that the layers can read the offsets without waiting for a GPU
        self.cu_seqlens = None if cu_seqlens is None else torch.as_tensor(cu_seqlens).cpu()
        self.bounds: tuple[int, ...] = ()
        self.count = tokens.shape[0]
        if self.cu_seqlens is None:
            return
        bounds = self.cu_seqlens.tolist()
        if tokens.shape[0] != 1 or bounds[0] != 0 or bounds[-1] != tokens.shape[1] or bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens from {bounds[0]} to {bounds[-1]} with tokens {tuple(tokens.shape)}: "
                "must rise from 0 to T, and B be 1"
            )
        self.bounds = tuple(bounds)
        self.count = len(bounds) - 1

    @classmethod
    def placed(cls, tokens: Tensor, cu_seqlens: Tensor, marks: Tensor) -> Documents:
        """Of tensors that lie on a GPU and are not looked at, as a CUDA graph needs it: marks (2,T) as of `marks`."""
        documents = cls(tokens, None)
        documents.cu_seqlens, documents.count, documents._marks = cu_seqlens, len(cu_seqlens) - 1, marks
        return documents

    @property
    def starts(self) -> Tensor:
        """(B*T,) int32, on the device of the tokens: the document whose first token this is, else -1."""
        return self._marks[0]

    @property
    def ends(self) -> Tensor:
        """(B*T,) int32: the same of last tokens."""
        return self._marks[1]

    @cached_property
    def _marks(self) -> Tensor:
        """(2,B*T) int32: starts and ends."""
        if self.bounds:
            return marks(self.bounds, self.tokens.device)
        # made on the device, so that a CUDA graph can hold this as well
        (B, T), device = self.tokens.shape, self.tokens.device
        made = torch.full((2, B, T), -1, dtype=torch.int32, device=device)
        rows = torch.arange(B, dtype=torch.int32, device=device)
        made[0, :, 0] = made[1, :, -1] = rows
        return made.flatten(1)

    def shift(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The token before each token, and the last token of each document.

        Arguments: x (B,T,D); before (S,D), what precedes each document (S = B without `cu_seqlens`).
        Returns (B,T,D) and (S,D).
        """
        if not self.bounds:
            return torch.cat((before[:, None].to(x.dtype), x[:, :-1]), dim=1), x[:, -1]
        filled, first, last = edges(self.bounds, x.device)
        shifted = F.pad(x[:, :-1], (0, 0, 1, 0))
        shifted = shifted.index_copy(1, first, before[filled][None].to(x.dtype))
        return shifted, before.to(x.dtype).index_copy(0, filled, x[0, last])


@lru_cache(maxsize=8)  # every layer of a model asks for the same
def edges(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """(3, documents that are not empty) int64: each one, its first token and its last one."""
    pairs = enumerate(pairwise(bounds))
    filled = [(document, start, end - 1) for document, (start, end) in pairs if start < end]
    return move(torch.tensor(filled).T.contiguous(), device)


@lru_cache(maxsize=8)
def marks(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """(2,T) int32: for each token the document that starts with it, and the one that ends with it, else -1."""
    filled, first, last = edges(bounds, torch.device("cpu"))
    made = torch.full((2, bounds[-1]), -1, dtype=torch.int32)
    made[0, first] = made[1, last] = filled.int()
    return move(made, device)


def move(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what that has still to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def float32_at_least(dtype: torch.dtype) -> torch.dtype:
    """What the decay is computed in: errors of `w` grow exponentially in `exp(-exp(w))`."""
    return torch.promote_types(dtype, torch.float32)
