"""DiSHA (also MiSS): one small block shared by all shards of a matrix's input. Source: arXiv 2409.15371.

W is seen as shards of `rank` columns. Bone adds the same block to every shard; bat adds a block a shard, once as it is
and once through W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import AdapterConfig
from ..errors import ConfigError
from ..ops.linear import bat_linear, bone_linear
from ..ops.matrix import Matrix
from .base import AdaptedLinear


class BoneLinear(AdaptedLinear):
    """y = W x + Dᵀ Σ_b x_b, with D (rank, out) zero at first, and x_b the shards of x; the last may be shorter."""

    tensors = ("miss_block",)
    entries = ("r", "mini_r", "init_weights")
    peft_type = "MISS"

    def __init__(self, base: nn.Linear, config: AdapterConfig, beside: bool = False) -> None:
        super().__init__(base, config, beside)
        device = base.weight.device
        self.miss_block = nn.Parameter(torch.empty(config.rank, base.out_features, device=device, dtype=torch.float32))

    @staticmethod
    def check(config: AdapterConfig, in_features: int, out_features: int) -> None:
        if config.rank > in_features:
            raise ConfigError(f"--rank {config.rank}: bone needs at most {in_features}, the inputs of a matrix")

    def reset(self, original: Callable[[], Tensor] | None = None) -> None:
        nn.init.zeros_(self.miss_block)

    def delta(self, x: Tensor, product: Tensor) -> Tensor:
        rank = self.config.rank
        padded = F.pad(x, (0, -x.shape[-1] % rank))
        shards = padded.view(*x.shape[:-1], -1, rank)  # (…, in/rank, rank)
        return F.linear(shards.sum(-2), self.miss_block.to(x.dtype).T)

    def fused(self, x: Tensor, matrix: Matrix) -> Tensor:
        return bone_linear(x, matrix, self.miss_block)

    @staticmethod
    def merged(weight: Tensor, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
        block = tensors["miss_block"].float().T  # (out, rank)
        shards = -(-weight.shape[1] // config.rank)
        return weight.float() + block.repeat(1, shards)[:, : weight.shape[1]]

    @staticmethod
    def to_peft(config: AdapterConfig) -> dict[str, Any]:
        return {"r": config.rank, "miss_dropout": 0.0, "mini_r": 1, "bias": "none", "init_weights": True}

    @classmethod
    def reads(cls, settings: Mapping[str, Any]) -> bool:
        is_bone = settings.get("init_weights", True) in (True, False)  # else PEFT's own bat, or its mini
        return super().reads(settings) and is_bone

    @staticmethod
    def from_peft(settings: Mapping[str, Any]) -> AdapterConfig:
        return AdapterConfig("bone", int(settings["r"]))


class BatLinear(AdaptedLinear):
    """y = W x + Σ_b (W_b D_b + [D_b; D_b; …]) x_b, with D (in/rank, rank, rank) zero at first.

    W_b are the columns of W that shard b meets, [D_b; …] is D_b under itself out/rank times. With z_b = D_b x_b this
    is W (x + z) and the sum of all z_b: one product with W, whose gradient needs no new matrix of W's size.
    """

    tensors = ("bat_block",)
    peft_type = "BAT"  # PEFT has a method of this name, with another formula: it must not take this one for it

    def __init__(self, base: nn.Linear, config: AdapterConfig, beside: bool = False) -> None:
        super().__init__(base, config, beside)
        shape = (base.in_features // config.rank, config.rank, config.rank)
        self.bat_block = nn.Parameter(torch.empty(shape, device=base.weight.device, dtype=torch.float32))

    @staticmethod
    def check(config: AdapterConfig, in_features: int, out_features: int) -> None:
        if in_features % config.rank or out_features % config.rank:
            best = max(n for n in (64, 32, 16, 8, 4, 2, 1) if in_features % n == 0 and out_features % n == 0)
            raise ConfigError(
                f"--rank {config.rank}: bat needs a divisor of both sides of a matrix, here {out_features} and "
                f"{in_features}; try {best}"
            )

    def reset(self, original: Callable[[], Tensor] | None = None) -> None:
        nn.init.zeros_(self.bat_block)

    def fused(self, x: Tensor, matrix: Matrix) -> Tensor:
        return bat_linear(x, matrix, self.bat_block)

    def by_formula(self, x: Tensor) -> Tensor:
        if len(self.others):
            return super().by_formula(x)
        z = self.shards(x)
        product: Tensor = self.base(x + z.flatten(-2))
        return product + self.tile(z)

    def delta(self, x: Tensor, product: Tensor) -> Tensor:
        z = self.shards(x)
        through: Tensor = self.base(z.flatten(-2))
        return through + self.tile(z)

    def shards(self, x: Tensor) -> Tensor:
        """z (…, in/rank, rank)."""
        x = x.reshape(*x.shape[:-1], -1, self.config.rank)
        return torch.einsum("...bj,bij->...bi", x, self.bat_block.to(x.dtype))

    def tile(self, z: Tensor) -> Tensor:
        """The sum of the shards, out/rank times: (…, out)."""
        return z.sum(-2).repeat(*[1] * (z.ndim - 2), self.out_features // self.config.rank)

    @staticmethod
    def merged(weight: Tensor, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
        D, rank = tensors["bat_block"].float(), config.rank
        W = weight.float().reshape(weight.shape[0] // rank, rank, -1, rank)  # (out/rank, rank, in/rank, rank)
        merged = W + torch.einsum("aibj,bjk->aibk", W, D) + D.transpose(0, 1)
        return merged.reshape(weight.shape)

    @staticmethod
    def to_peft(config: AdapterConfig) -> dict[str, Any]:
        return {"r": config.rank}

    @staticmethod
    def from_peft(settings: Mapping[str, Any]) -> AdapterConfig:
        return AdapterConfig("bat", int(settings["r"]))
