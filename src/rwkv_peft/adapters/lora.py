"""A product of two thin matrices beside a frozen one: LoRA, its variant DoRA, and PiSSA.

Sources: LoRA arXiv 2106.09685, rank stabilisation 2312.03732, DoRA 2402.09353, PiSSA 2404.02948.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import AdapterConfig
from ..errors import ConfigError
from ..ops.linear import add_product, low_rank_linear
from ..ops.matrix import Matrix
from .base import AdaptedLinear, unshortened

STARTS = ("gaussian", "orthogonal")  # init_lora_weights, if it is no bool, that leave the base as it is
TINY = torch.finfo(torch.float32).tiny  # in the place of 0, where a row of W is all zero
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


class LoraLinear(AdaptedLinear):
    """y = W x + scale · B A x, with A (rank, in) random and B (out, rank) zero at first; both float32.

    With DoRA, y = m/|V| · V x for V = W + scale · B A, whose rows have the lengths |V|, and m (out,) trained; |V| is
    taken as constant in the backward pass.
    """

    tensors: ClassVar[tuple[str, ...]] = (A, B, MAGNITUDE)
    entries = (
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"),
        *("megatron_core", "qalora_group_size", "runtime_config"),
    )
    peft_type = "LORA"

    def __init__(self, base: nn.Linear, config: AdapterConfig, beside: bool = False) -> None:
        super().__init__(base, config, beside)
        like: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base.in_features, config.rank, bias=False, **like)
        self.lora_B = nn.Linear(config.rank, base.out_features, bias=False, **like)
        if config.dora:
            self.lora_magnitude_vector = nn.Parameter(torch.empty(base.out_features, **like))

    def reset(self, original: Callable[[], Tensor] | None = None) -> None:
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        if self.config.dora:
            self.lora_magnitude_vector.data = self.row_lengths()

    def delta(self, x: Tensor, product: Tensor) -> Tensor:
        dropped = F.dropout(x, self.config.dropout, self.training)
        inner = F.linear(dropped, self.lora_A.weight.to(x.dtype))
        added = F.linear(inner, self.lora_B.weight.to(x.dtype)) * self.config.scale
        if not self.config.dora:
            return added
        ratio = self.lora_magnitude_vector / self.row_lengths()
        if dropped is not x:
            product = self.base(dropped)
        # what is left of 1 is small, and must be taken in float32
        return (ratio - 1).to(x.dtype) * product + ratio.to(x.dtype) * added

    def fused(self, x: Tensor, matrix: Matrix) -> Tensor | None:
        if self.config.dropout and self.training:
            return None
        y = low_rank_linear(x, matrix, self.lora_A.weight, self.lora_B.weight, self.config.scale, self.start)
        if not self.config.dora:
            return y
        ratio = self.lora_magnitude_vector / self.row_lengths()
        return y.addcmul(y, (ratio - 1).to(x.dtype))  # as in `delta`

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """The frozen A0 and B0 whose product is taken off, where there are any."""
        return None

    @torch.no_grad()
    def row_lengths(self) -> Tensor:
        """|W + scale · B A| of each row (out,), without making that matrix; reads W twice, in its own dtype."""
        a, b = unshortened(self.lora_A.weight), unshortened(self.lora_B.weight)
        W, scale = self.dense(), self.config.scale
        products = torch.empty_like(b)
        add_product(products, W, a.T.to(W.dtype), keep=False)  # W Aᵀ
        squares: Tensor = torch.linalg.vector_norm(W, dim=1, dtype=b.dtype).square()
        squares += scale * (b * products.mul_(2).addmm_(b, a @ a.T, alpha=scale)).sum(1)
        return squares.clamp(min=TINY).sqrt()

    @staticmethod
    def merged(weight: Tensor, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
        sum_ = torch.addmm(weight.float(), tensors[B].float(), tensors[A].float(), alpha=config.scale)
        if not config.dora:
            return sum_
        lengths: Tensor = torch.linalg.vector_norm(sum_, dim=1).clamp(min=TINY**0.5)
        return sum_ * (tensors[MAGNITUDE].float() / lengths)[:, None]

    @staticmethod
    def to_peft(config: AdapterConfig) -> dict[str, Any]:
        root = math.sqrt(config.rank) if config.rank_stabilised else config.rank
        return {
            "r": config.rank,
            "lora_alpha": config.scale * root,
            "lora_dropout": config.dropout,
            "use_rslora": config.rank_stabilised,
            "use_dora": config.dora,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }

    @classmethod
    def reads(cls, settings: Mapping[str, Any]) -> bool:
        return super().reads(settings) and settings.get("init_lora_weights") in (None, True, False, *STARTS, "eva")

    @staticmethod
    def from_peft(settings: Mapping[str, Any]) -> AdapterConfig:
        return AdapterConfig(
            "lora",
            int(settings["r"]),
            float(settings["lora_alpha"]),
            float(settings.get("lora_dropout", 0)),
            rank_stabilised=bool(settings.get("use_rslora")),
            dora=bool(settings.get("use_dora")),
        )


class PissaLinear(LoraLinear):
    """y = (W - scale · B0 A0) x + scale · B A x, where A and B start as A0 and B0: the largest singular values of W.

    The frozen A0 and B0 are kept in the precision of the base, and W is left as it is; where it is quantised, they come
    from the weight before. In a folder it is a plain LoRA
    of twice the rank, [A; A0] and [B, -B0]: any program that knows LoRA loads it on the original base.
    """

    tensors = (A, B)
    start_a: Tensor
    start_b: Tensor

    def __init__(self, base: nn.Linear, config: AdapterConfig, beside: bool = False) -> None:
        super().__init__(base, config, beside)
        like: dict[str, Any] = {"device": base.weight.device, "dtype": self.number}
        self.register_buffer("start_a", torch.empty(config.rank, base.in_features, **like), persistent=False)
        self.register_buffer("start_b", torch.empty(base.out_features, config.rank, **like), persistent=False)

    @staticmethod
    def check(config: AdapterConfig, in_features: int, out_features: int) -> None:
        most = min(in_features, out_features)
        if config.rank > most:
            raise ConfigError(f"--rank {config.rank}: pissa needs at most {most}, the smaller side of a matrix")

    def reset(self, original: Callable[[], Tensor] | None = None) -> None:
        W, rank = (original or self.dense)().to(self.start_a.device, torch.float32), self.config.rank
        if self.config.svd_iterations:
            U, S, V = torch.svd_lowrank(W, min(2 * rank, *W.shape), self.config.svd_iterations)
        else:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            V = Vh.mH
        root = (S[:rank] / self.config.scale).sqrt()
        self.start_a.copy_((V[:, :rank] * root).T)
        self.start_b.copy_(U[:, :rank] * root)
        self.lora_A.weight.data, self.lora_B.weight.data = self.start_a.float().clone(), self.start_b.float().clone()

    def delta(self, x: Tensor, product: Tensor) -> Tensor:
        x = F.dropout(x, self.config.dropout, self.training)
        inner = F.linear(x, torch.cat((self.lora_A.weight.to(x.dtype), self.start_a.to(x.dtype))))
        outer = torch.cat((self.lora_B.weight.to(x.dtype), -self.start_b.to(x.dtype)), dim=1)
        return F.linear(inner, outer) * self.config.scale

    @property
    def start(self) -> tuple[Tensor, Tensor]:
        return self.start_a, self.start_b

    def to_file(self) -> dict[str, Tensor]:
        return {
            A: torch.cat((self.lora_A.weight.data, self.start_a.float())),
            B: torch.cat((self.lora_B.weight.data, -self.start_b.float()), dim=1),
        }

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        device = self.lora_A.weight.device
        a, b = (tensors[name].to(device, torch.float32, copy=True) for name in (A, B))
        rank = self.config.rank
        self.lora_A.weight.data, self.lora_B.weight.data = a[:rank], b[:, :rank].contiguous()
        # in float32, so that they are what the folder says, whatever the precision of this base
        self.start_a, self.start_b = a[rank:], -b[:, rank:]

    @staticmethod
    def to_peft(config: AdapterConfig) -> dict[str, Any]:
        twice = AdapterConfig("lora", 2 * config.rank, config.scale * 2 * config.rank, config.dropout)
        return LoraLinear.to_peft(twice)

    @staticmethod
    def from_peft(settings: Mapping[str, Any]) -> AdapterConfig:
        plain = LoraLinear.from_peft(settings)
        if plain.rank % 2 or plain.dora or plain.rank_stabilised:
            raise ValueError("a PiSSA folder holds a plain LoRA of twice the rank")
        return AdapterConfig("pissa", plain.rank // 2, plain.scale * plain.rank // 2, plain.dropout)
