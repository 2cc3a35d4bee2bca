"""RWKV-5.2 "Eagle", x052: each channel has a fixed decay `exp(-exp(time_decay))` and fixed mixes with the token before.

A `time_mix_*` is the share of the token itself. Source: arXiv 2404.05892, section "Eagle".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import CheckpointError
from ..ops import Backend, Wkv
from ..ops.pieces import Vectors
from .base import Inputs, Rwkv, Shapes, common_sizes, vector
from .gated import GatedChannelMix, GatedTimeMix
from .layers import Documents, float32_at_least
from .state import Sizes


@dataclass(frozen=True)
class Rwkv5Sizes(Sizes):
    """Every size of a model, as its tensors have them."""

    @staticmethod
    def of(shapes: Shapes) -> Rwkv5Sizes:
        """The sizes of the model whose tensors have these shapes. Raises CheckpointError if it is an earlier form."""
        decay = shapes.get("blocks.0.att.time_decay", ())
        if len(decay) == 1 or decay[-1:] == (1,):
            raise CheckpointError(f"holds an early RWKV-5 model (time_decay {decay}, not (H,N)); get an RWKV-5.2 file")
        return Rwkv5Sizes(**common_sizes(shapes, "blocks.0.att.time_faaaa"))


class Rwkv5(Rwkv):
    """The model."""

    version = "x052"
    wkv = 5
    title = "RWKV-5.2"
    mark = ".att.time_faaaa"

    sizes_of = staticmethod(Rwkv5Sizes.of)

    @staticmethod
    def mixes(sizes: Sizes, layer: int) -> tuple[TimeMix5, ChannelMix5]:
        return TimeMix5(sizes), ChannelMix5(sizes)


class TimeMix5(GatedTimeMix):
    """The recurrence and what prepares its inputs."""

    time_parameters = ("time_mix_r", "time_mix_k", "time_mix_v", "time_mix_g", "time_decay", "time_faaaa")

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        for name in "rkvg":
            self.register_parameter(f"time_mix_{name}", vector(1, 1, sizes.width))
        self.time_decay = vector(sizes.heads, sizes.head_size)

    def shares(self) -> Vectors:
        return [1 - getattr(self, f"time_mix_{name}") for name in "rkvg"]

    def inputs(
        self, mixed: Inputs, before: Tensor, documents: Documents, op: Backend
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        xr, xk, xv, xg = mixed
        return xr, xk, xv, xg, self.time_decay.to(float32_at_least(xr.dtype))

    @staticmethod
    def recurrence(op: Backend) -> Wkv:
        return op.wkv5


class ChannelMix5(GatedChannelMix):
    """The channel-mix."""

    time_parameters = ("time_mix_k", "time_mix_r")
    time_mix_k: Tensor
    time_mix_r: Tensor

    def shares(self) -> Vectors:
        return 1 - self.time_mix_k, 1 - self.time_mix_r
