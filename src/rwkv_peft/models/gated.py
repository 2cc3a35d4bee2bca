"""What RWKV-5 and RWKV-6 share: gates, and a recurrence with a bonus `time_faaaa` for the current token.

`y_t = (S_{t-1} + v_t (u·k_t)ᵀ) r_t` and `S_t = S_{t-1}·diag(decay) + v_t k_tᵀ`. A version mixes a token with the one
before in its own way, and has its own decay.

Axes: B rows, T tokens, D width, H heads, N head size, S documents. Source: "Eagle and Finch: RWKV with Matrix-Valued
States and Dynamic Recurrence" (arXiv 2404.05892).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Backend, Wkv
from .base import LN_X_EPS, ChannelMix, Shared, TimeMix, vector
from .layers import Documents, GroupNorm, Linear
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
    def mix(self, x: Tensor, shifted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x and the tokens before (B,T,D) → what receptance, key, value and gate see (B,T,D), and w of the decay."""

    @staticmethod
    @abstractmethod
    def recurrence(op: Backend) -> Wkv:
        """The version's operator."""

    def forward(
        self, x: Tensor, wkv: Tensor, before: Tensor, shared: Shared, documents: Documents, op: Backend
    ) -> tuple[Tensor, Tensor, Tensor, Shared]:
        shifted, last = documents.shift(x, before)
        xr, xk, xv, xg, w = self.mix(x, shifted)
        r, k, v = (self.split(y) for y in (self.receptance(xr), self.key(xk), self.value(xv)))
        u = self.time_faaaa.to(w.dtype)
        y, wkv = self.recurrence(op)(r, w, k, v, u, wkv, documents.cu_seqlens)
        return self.output(self.ln_x(y.flatten(2)) * F.silu(self.gate(xg))), wkv, last, shared


class GatedChannelMix(ChannelMix):
    """Two matrices with a squared ReLU between, times a gate that `receptance` makes."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        for name in self.time_parameters:
            self.register_parameter(name, vector(1, 1, sizes.width))
        self.key = Linear(sizes.width, sizes.ffn)
        self.receptance = Linear(sizes.width, sizes.width)
        self.value = Linear(sizes.ffn, sizes.width)

    @abstractmethod
    def mix(self, x: Tensor, shifted: Tensor) -> tuple[Tensor, Tensor]:
        """x and the tokens before (B,T,D) → what key and receptance see (B,T,D)."""

    def forward(self, x: Tensor, before: Tensor, shared: Shared, documents: Documents) -> tuple[Tensor, Tensor]:
        shifted, last = documents.shift(x, before)
        xk, xr = self.mix(x, shifted)
        return torch.sigmoid(self.receptance(xr)) * self.value(torch.relu(self.key(xk)).square()), last
