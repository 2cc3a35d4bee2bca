"""The optimiser."""

from __future__ import annotations

import torch
from torch import nn

from ..config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over everything that trains; weight decay on matrices (emb and head too), never on vectors."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if name.endswith(".weight") and p.ndim == 2]
    vectors = [p for name, p in trained if not (name.endswith(".weight") and p.ndim == 2)]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.adam_eps,
        fused=trained[0][1].device.type == "cuda",
    )
