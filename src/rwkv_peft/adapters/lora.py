"""LoRA: a product of two thin matrices beside a frozen one (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import AdapterConfig
from .base import AdaptedLinear


class LoraLinear(AdaptedLinear):
    """y = W x + alpha/rank · B A x, with A (rank, in) random and B (out, rank) zero at first; both float32."""

    tensors = ("lora_A.weight", "lora_B.weight")
    peft_type = "LORA"

    def __init__(self, base: nn.Linear, config: AdapterConfig) -> None:
        super().__init__(base, config)
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, config.rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(config.rank, base.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.scale, self.dropout = scale_of(config), config.dropout

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.weight.to(x.dtype))
        product: Tensor = self.base(x)
        return product + F.linear(inner, self.lora_B.weight.to(x.dtype)) * self.scale

    @staticmethod
    def merged(weight: Tensor, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
        A, B = (tensors[name].float() for name in LoraLinear.tensors)
        return torch.addmm(weight.float(), B, A, alpha=scale_of(config))

    @staticmethod
    def to_peft(config: AdapterConfig) -> dict[str, Any]:
        return {
            "r": config.rank,
            "lora_alpha": scale_of(config) * config.rank,
            "lora_dropout": config.dropout,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }

    @staticmethod
    def from_peft(settings: Mapping[str, Any]) -> AdapterConfig:
        for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out"):
            if settings.get(key):
                raise ValueError(f"{key} is not supported yet")
        if settings.get("bias", "none") != "none":
            raise ValueError("bias is not supported yet")
        dropout = float(settings.get("lora_dropout", 0))
        return AdapterConfig("lora", int(settings["r"]), float(settings["lora_alpha"]), dropout)


def scale_of(config: AdapterConfig) -> float:
    """alpha/rank; alpha is twice the rank where it is not given."""
    return 2.0 if config.alpha is None else config.alpha / config.rank
