"""RWKV-6 "Finch", x060: as RWKV-5, but the decay and the mixes with the token before depend on the token.

A `time_maa_*` is the share of the token before; `time_maa_w1 time_maa_w2` add to five of them a low-rank function of
the token mixed by `time_maa_x`, and `time_decay_w1 time_decay_w2` add one to the decay of the token mixed by
`time_maa_w`. Source: arXiv 2404.05892, section "Finch".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import Backend, Wkv
from ..ops.pieces import Vectors
from .base import Inputs, Rwkv, Shapes, common_sizes, shape_of, vector
from .gated import GatedChannelMix, GatedTimeMix
from .layers import Documents, float32_at_least
from .state import Sizes

MIXED = "wkvrg"  # the order in which time_maa_w1 and time_maa_w2 hold the five mixes


@dataclass(frozen=True)
class Rwkv6Sizes(Sizes):
    """Every size of a model, as its tensors have them."""

    rank_mix: int
    rank_decay: int

    @staticmethod
    def of(shapes: Shapes) -> Rwkv6Sizes:
        """The sizes of the model whose tensors have these shapes. Raises CheckpointError if one is missing."""
        rank_mix = shape_of(shapes, "blocks.0.att.time_maa_w2", 3)[1]
        rank_decay = shape_of(shapes, "blocks.0.att.time_decay_w1", 2)[1]
        return Rwkv6Sizes(**common_sizes(shapes, "blocks.0.att.time_faaaa"), rank_mix=rank_mix, rank_decay=rank_decay)


class Rwkv6(Rwkv):
    """The model."""

    version = "x060"
    wkv = 6
    title = "RWKV-6"
    mark = ".att.time_maa_x"
    sizes: Rwkv6Sizes

    sizes_of = staticmethod(Rwkv6Sizes.of)

    @staticmethod
    def mixes(sizes: Rwkv6Sizes, layer: int) -> tuple[TimeMix6, ChannelMix6]:  # type: ignore[override]
        return TimeMix6(sizes), ChannelMix6(sizes)


class TimeMix6(GatedTimeMix):
    """The recurrence and what prepares its inputs."""

    time_parameters = (
        *("time_maa_x", "time_maa_w", "time_maa_k", "time_maa_v", "time_maa_r", "time_maa_g"),
        *("time_maa_w1", "time_maa_w2", "time_decay", "time_decay_w1", "time_decay_w2", "time_faaaa"),
    )
    time_maa_x: Tensor

    def __init__(self, sizes: Rwkv6Sizes) -> None:
        super().__init__(sizes)
        D = sizes.width
        for name in ("x", *MIXED):
            self.register_parameter(f"time_maa_{name}", vector(1, 1, D))
        self.time_maa_w1 = vector(D, len(MIXED) * sizes.rank_mix)
        self.time_maa_w2 = vector(len(MIXED), sizes.rank_mix, D)
        self.time_decay = vector(1, 1, D)
        self.time_decay_w1, self.time_decay_w2 = vector(D, sizes.rank_decay), vector(sizes.rank_decay, D)

    def shares(self) -> Vectors:
        return None, self.time_maa_x

    def inputs(
        self, mixed: Inputs, before: Tensor, documents: Documents, op: Backend
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x, xx = mixed
        low = torch.tanh(xx @ self.time_maa_w1.to(x.dtype))  # (B,T,5·rank)
        outer = self.time_maa_w2.to(x.dtype)
        more = torch.einsum("btmr,mrd->mbtd", low.view(*x.shape[:2], len(MIXED), -1), outer)
        vectors = [getattr(self, f"time_maa_{name}") for name in MIXED]
        xw, xk, xv, xr, xg = op.pieces.mix_more(x, before, documents, vectors, more)
        exact = float32_at_least(x.dtype)
        w = self.time_decay.to(exact) + self.low_rank(xw, "time_decay_w", torch.tanh).to(exact)
        return xr, xk, xv, xg, self.split(w)

    @staticmethod
    def recurrence(op: Backend) -> Wkv:
        return op.wkv6


class ChannelMix6(GatedChannelMix):
    """The channel-mix."""

    time_parameters = ("time_maa_k", "time_maa_r")
    time_maa_k: Tensor
    time_maa_r: Tensor

    def shares(self) -> Vectors:
        return self.time_maa_k, self.time_maa_r
