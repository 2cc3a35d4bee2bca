"""Gradient checkpointing: what each layer computes anew in the backward pass, so that training fits into memory.

What layers keep is told by `plan/activations.py`, which the memory plan uses too.
"""

from __future__ import annotations

import torch

from ..config import TrainConfig
from ..models import Rwkv
from ..ops.matrix import dense_weight
from ..plan.activations import Activations
from ..plan.memory import SPARE
from ..plan.weights import learning_bytes

PLAIN = TrainConfig(model="", data=[], out="")  # type: ignore[arg-type]


def choose_checkpoint(model: Rwkv, tokens: int, free: float, config: TrainConfig = PLAIN) -> tuple[str, ...]:
    """For each layer the least to compute anew with which micro-batches of so many `tokens` fit into `free` bytes.

    Gradients and the averages of `config`'s optimiser will take their part of these.
    """
    is_dense = dense_weight(model.head) is not None
    offloads = config.offload_checkpoints
    found = Activations.of(model, tokens, model.like.element_size(), dense_head=is_dense, offloads=offloads)
    return found.choose(model.wkv, free - learning_bytes(model, config))


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU that a run may plan with: a tenth is left for what nobody counts."""
    return SPARE * torch.cuda.mem_get_info(device)[0]
