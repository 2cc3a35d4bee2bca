"""Gradient checkpointing: what each layer computes anew in the backward pass, so that training fits into memory."""

from __future__ import annotations

from itertools import pairwise

import torch

from ..models import Rwkv

# What a layer keeps for the backward pass, in numbers a token and channel; measured with LoRA
KEPT = {"block": 2.0, "selective": 6.5, "operator": 17.0, "none": 22.0}
PASSING = 34.0  # what is there besides while a layer is computed anew and backward
LOSS = 2**29  # bytes of the loss's logits and the like
AVERAGES = 8  # bytes of AdamW's for a parameter that trains, which has a gradient of its own size besides


def choose_checkpoint(model: Rwkv, tokens: int, free: float, averages: float = AVERAGES) -> tuple[str, ...]:
    """For each layer the least to compute anew with which micro-batches of so many `tokens` fit into `free` bytes.

    A layer's channel-mix is worth keeping before its time-mix: it saves more time a byte. Only RWKV-7's operator keeps
    much. `averages` are the bytes that the optimiser keeps there for a parameter.
    """
    unit = tokens * model.sizes.width * model.like.element_size()
    trained = sum(p.nbytes + averages * p.numel() for p in model.parameters() if p.requires_grad)
    room = (free - trained - LOSS) / unit - PASSING
    modes = ["block"] * model.sizes.layers
    room -= KEPT["block"] * len(modes)
    for before, mode in pairwise(mode for mode in KEPT if mode != "operator" or model.wkv == 7):
        more = KEPT[mode] - KEPT[before]
        for i in range(len(modes)):
            if room < more:
                return tuple(modes)
            modes[i], room = mode, room - more
    return tuple(modes)


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU that a run may plan with: a tenth is left for what nobody counts."""
    return 0.9 * torch.cuda.mem_get_info(device)[0]
