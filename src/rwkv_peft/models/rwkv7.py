"""RWKV-7 "x070".

`x_*` mix a token with the one before; `receptance key value output` are the matrices; `w* a* v* g*` are low-rank
functions of the token for the decay, the in-context learning rate, the value residual and the gate
(`w0 + act(x @ w1) @ w2`); `k_k k_a` make the removal key and the replacement key, `r_k` is the bonus of the current
token, `ln_x` normalises heads.

Axes: B rows, T tokens, D width, H heads, N head size, S documents. Source: "RWKV-7 Goose" (arXiv 2503.14456).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import Backend
from ..ops.matrix import Linear
from ..ops.pieces import GroupNorm, Vectors, Vectors7
from .base import LN_X_EPS, ChannelMix, Inputs, Rwkv, Shapes, Shared, TimeMix, common_sizes, shape_of, vector
from .layers import Documents
from .state import Sizes

MIXES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")


@dataclass(frozen=True)
class Rwkv7Sizes(Sizes):
    """Every size of a model, as its tensors have them."""

    rank_w: int
    rank_a: int
    rank_v: int
    rank_g: int

    @staticmethod
    def of(shapes: Shapes) -> Rwkv7Sizes:
        """The sizes of the model whose tensors have these shapes. Raises CheckpointError if one is missing."""
        common = common_sizes(shapes, "blocks.0.att.r_k")
        ranks = {f"rank_{x}": shape_of(shapes, f"blocks.0.att.{x}1", 2)[1] for x in "wag"}
        # layer 0 has no value residual
        rank_v = shape_of(shapes, "blocks.1.att.v1", 2)[1] if common["layers"] > 1 else 1
        return Rwkv7Sizes(**common, **ranks, rank_v=rank_v)


class Rwkv7(Rwkv):
    """The model."""

    version = "x070"
    wkv = 7
    title = "RWKV-7"
    mark = ".att.r_k"
    unused = frozenset({"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"})  # layer 0 has no value residual
    sizes: Rwkv7Sizes

    sizes_of = staticmethod(Rwkv7Sizes.of)

    @staticmethod
    def mixes(sizes: Rwkv7Sizes, layer: int) -> tuple[TimeMix, ChannelMix]:  # type: ignore[override]
        return TimeMix7(sizes, layer), ChannelMix7(sizes)


class TimeMix7(TimeMix):
    """The recurrence and what prepares its inputs."""

    time_parameters = (*MIXES, "w0", "a0", "v0", "k_k", "k_a", "r_k")
    w0: Tensor
    a0: Tensor
    k_k: Tensor
    k_a: Tensor

    def __init__(self, sizes: Rwkv7Sizes, layer: int) -> None:
        super().__init__()
        D, H, N = sizes.width, sizes.heads, sizes.head_size
        self.heads, self.is_first = H, layer == 0
        for name in (*MIXES, "w0", "a0", "k_k", "k_a"):
            self.register_parameter(name, vector(1, 1, D))
        self.w1, self.w2 = vector(D, sizes.rank_w), vector(sizes.rank_w, D)
        self.a1, self.a2 = vector(D, sizes.rank_a), vector(sizes.rank_a, D)
        self.g1, self.g2 = vector(D, sizes.rank_g), vector(sizes.rank_g, D)
        if not self.is_first:
            self.v0, self.v1, self.v2 = vector(1, 1, D), vector(D, sizes.rank_v), vector(sizes.rank_v, D)
        self.r_k = vector(H, N)
        self.receptance, self.key, self.value, self.output = (Linear(D, D) for _ in range(4))
        self.ln_x = GroupNorm(H, D, eps=LN_X_EPS)

    def shares(self) -> Vectors:
        return [getattr(self, name) for name in MIXES]

    def forward(
        self, mixed: Inputs, wkv: Tensor | None, before: Tensor, shared: Shared, documents: Documents, op: Backend
    ) -> tuple[Tensor, Tensor, Shared]:
        xr, xw, xk, xv, xa, xg = mixed
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w_low, a_low = self.low_rank(xw, "w", torch.tanh), self.low_rank(xa, "a")
        v_low = None if self.is_first else self.low_rank(xv, "v")
        gate = self.low_rank(xg, "g", torch.sigmoid)
        vectors = Vectors7(self.w0, self.a0, None if self.is_first else self.v0, self.k_k, self.k_a, self.r_k)
        inputs = (r, k, v, w_low, a_low, v_low, gate, shared.v_first)
        out, wkv, v_first = op.pieces.core7(op.wkv7, *inputs, vectors, self.ln_x, wkv, documents)
        return self.output(out), wkv, shared._replace(v_first=v_first)


class ChannelMix7(ChannelMix):
    """Two matrices with a squared ReLU between."""

    time_parameters = ("x_k",)

    def __init__(self, sizes: Rwkv7Sizes) -> None:
        super().__init__()
        self.x_k = vector(1, 1, sizes.width)
        self.key = Linear(sizes.width, sizes.ffn)
        self.value = Linear(sizes.ffn, sizes.width)

    def shares(self) -> Vectors:
        return (self.x_k,)

    def forward(self, mixed: Inputs, shared: Shared, documents: Documents, op: Backend) -> Tensor:
        return self.value(op.pieces.relu2(self.key(mixed[0])))  # type: ignore[no-any-return]
