"""What RWKV-5 and RWKV-6 share: gates, and a recurrence with a bonus `time_faaaa` for the current token.

`y_t = (S_{t-1} + v_t (u·k_t)ᵀ) r_t` and `S_t = S_{t-1}·diag(decay) + v_t k_tᵀ`. A version mixes a token with the one
before in its own way, and has its own decay.

Axes: B rows, T tokens, D width, H heads, N head size, S documents. Source: "Eagle and Finch: RWKV with Matrix-Valued
States and Dynamic Recurrence" (arXiv 2404.05892).
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from ..ops import Backend, Wkv
from ..ops.matrix import Linear
from ..ops.pieces import GroupNorm
from .base import LN_X_EPS, ChannelMix, Inputs, Shared, TimeMix, vector
from .layers import Documents
from .state import Sizes


class GatedTimeMix(TimeMix):
    """The matrices, the recurrence and its output, times a gate."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        D, H, N = sizes.width, sizes.heads, sizes.head_size
        self.heads = H
        self.time_faaaa = vector(H, N)
        self.receptance, self.key, self.value, self.gate, self.output = (Linear(D, D) for _ in range(5))
        self.ln_x = GroupNorm(H, D, eps=LN_X_EPS)

    @abstractmethod
    def inputs(
        self, mixed: Inputs, before: Tensor, documents: Documents, op: Backend
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """mixed (B,T,D), before (S,D) → what receptance, key, value and gate see (B,T,D), and w of the decay."""

    @staticmethod
    @abstractmethod
    def recurrence(op: Backend) -> Wkv:
        """The version's operator."""

    def forward(
        self, mixed: Inputs, wkv: Tensor | None, before: Tensor, shared: Shared, documents: Documents, op: Backend
    ) -> tuple[Tensor, Tensor, Shared]:
        xr, xk, xv, xg, w = self.inputs(mixed, before, documents, op)
        r, k, v = (self.split(y) for y in (self.receptance(xr), self.key(xk), self.value(xv)))
        u = self.time_faaaa.to(w.dtype)
        y, wkv = self.recurrence(op)(r, w, k, v, u, wkv, documents.cu_seqlens)
        return self.output(op.pieces.gated_output(y.flatten(2), self.gate(xg), self.ln_x)), wkv, shared


class GatedChannelMix(ChannelMix):
    """Two matrices with a squared ReLU between, times a gate that `receptance` makes."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        for name in self.time_parameters:
            self.register_parameter(name, vector(1, 1, sizes.width))
        self.key = Linear(sizes.width, sizes.ffn)
        self.receptance = Linear(sizes.width, sizes.width)
        self.value = Linear(sizes.ffn, sizes.width)

    def forward(self, mixed: Inputs, shared: Shared, documents: Documents, op: Backend) -> Tensor:
        xk, xr = mixed
        return op.pieces.gated(self.receptance(xr), self.value(op.pieces.relu2(self.key(xk))))
