"""Layers that the versions share.

A weight is used in the dtype of the activations, whatever it is stored in: weights that train may be float32 in a bf16
model. Axes: B rows, T tokens, D width, S documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A matrix without bias; (…, in) → (…, out)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Normalises the last axis; computed in float32 inside."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class GroupNorm(nn.GroupNorm):
    """Normalises each head; (B,T,D) → (B,T,D)."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        return F.group_norm(rows, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps).view_as(x)


class Documents:
    """The tokens, and where documents begin and end: B rows of T tokens, or one row that holds S documents."""

    def __init__(self, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens {tuple(tokens.shape)}: must be (B,T) with T at least 1")
        self.tokens = tokens
        # on the CPU, so that the layers can read the offsets without waiting for a GPU
        self.cu_seqlens = None if cu_seqlens is None else torch.as_tensor(cu_seqlens).cpu()
        if self.cu_seqlens is None:
            self.count = tokens.shape[0]
            return
        bounds = self.cu_seqlens.tolist()
        if tokens.shape[0] != 1 or bounds[0] != 0 or bounds[-1] != tokens.shape[1] or bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens from {bounds[0]} to {bounds[-1]} with tokens {tuple(tokens.shape)}: "
                "must rise from 0 to T, and B be 1"
            )
        self.count = len(bounds) - 1
        filled = [i for i in range(self.count) if bounds[i] < bounds[i + 1]]
        self.filled = torch.tensor(filled, device=tokens.device)
        self.first = torch.tensor([bounds[i] for i in filled], device=tokens.device)
        self.last = torch.tensor([bounds[i + 1] - 1 for i in filled], device=tokens.device)

    def shift(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The token before each token, and the last token of each document.

        Arguments: x (B,T,D); before (S,D), what precedes each document (S = B without `cu_seqlens`).
        Returns (B,T,D) and (S,D).
        """
        if self.cu_seqlens is None:
            return torch.cat((before[:, None].to(x.dtype), x[:, :-1]), dim=1), x[:, -1]
        shifted = F.pad(x[:, :-1], (0, 0, 1, 0))
        shifted = shifted.index_copy(1, self.first, before[self.filled][None].to(x.dtype))
        return shifted, before.to(x.dtype).index_copy(0, self.filled, x[0, self.last])


def float32_at_least(dtype: torch.dtype) -> torch.dtype:
    """What the decay is computed in: errors of `w` grow exponentially in `exp(-exp(w))`."""
    return torch.promote_types(dtype, torch.float32)
