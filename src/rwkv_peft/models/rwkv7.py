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
import torch.nn.functional as F
from torch import Tensor

from ..ops import Backend
from .base import LN_X_EPS, ChannelMix, Rwkv, Shapes, Shared, TimeMix, common_sizes, shape_of, vector
from .layers import Documents, GroupNorm, Linear, float32_at_least
from .state import Sizes


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

    time_parameters = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a", "r_k")

    def __init__(self, sizes: Rwkv7Sizes, layer: int) -> None:
        super().__init__()
        D, H, N = sizes.width, sizes.heads, sizes.head_size
        self.heads, self.is_first = H, layer == 0
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a"):
            self.register_parameter(name, vector(1, 1, D))
        self.w1, self.w2 = vector(D, sizes.rank_w), vector(sizes.rank_w, D)
        self.a1, self.a2 = vector(D, sizes.rank_a), vector(sizes.rank_a, D)
        self.g1, self.g2 = vector(D, sizes.rank_g), vector(sizes.rank_g, D)
        if not self.is_first:
            self.v0, self.v1, self.v2 = vector(1, 1, D), vector(D, sizes.rank_v), vector(sizes.rank_v, D)
        self.r_k = vector(H, N)
        self.receptance, self.key, self.value, self.output = (Linear(D, D) for _ in range(4))
        self.ln_x = GroupNorm(H, D, eps=LN_X_EPS)

    def forward(
        self, x: Tensor, wkv: Tensor, before: Tensor, shared: Shared, documents: Documents, op: Backend
    ) -> tuple[Tensor, Tensor, Tensor, Shared]:
        p = self.cast(x.dtype)
        shifted, last = documents.shift(x, before)
        delta = shifted - x
        xr, xw, xk, xv, xa, xg = (x + delta * p[name] for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"))
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        raw_w = p["w0"] + torch.tanh(xw @ p["w1"]) @ p["w2"]
        w = -F.softplus(-raw_w.to(float32_at_least(x.dtype))) - 0.5
        iclr = torch.sigmoid(p["a0"] + (xa @ p["a1"]) @ p["a2"])
        gate = torch.sigmoid(xg @ p["g1"]) @ p["g2"]
        if self.is_first:
            shared = shared._replace(v_first=v)
        else:
            v = v + (shared.v_first - v) * torch.sigmoid(p["v0"] + (xv @ p["v1"]) @ p["v2"])
        kk = F.normalize(self.split(k * p["k_k"]), dim=-1)
        k = k * (1 + (iclr - 1) * p["k_a"])
        r, w, k, v_heads, iclr = (self.split(y) for y in (r, w, k, v, iclr))
        y, wkv = op.wkv7(r, w, k, v_heads, kk, iclr, wkv, documents.cu_seqlens)
        bonus = (r * k * p["r_k"]).sum(-1, keepdim=True) * v_heads  # (B,T,H,N)
        y = self.ln_x(y.flatten(2)) + bonus.flatten(2)
        return self.output(y * gate), wkv, last, shared


class ChannelMix7(ChannelMix):
    """Two matrices with a squared ReLU between."""

    time_parameters = ("x_k",)

    def __init__(self, sizes: Rwkv7Sizes) -> None:
        super().__init__()
        self.x_k = vector(1, 1, sizes.width)
        self.key = Linear(sizes.width, sizes.ffn)
        self.value = Linear(sizes.ffn, sizes.width)

    def forward(self, x: Tensor, before: Tensor, shared: Shared, documents: Documents) -> tuple[Tensor, Tensor]:
        shifted, last = documents.shift(x, before)
        k = self.key(x + (shifted - x) * self.x_k.to(x.dtype))
        return self.value(torch.relu(k).square()), last
