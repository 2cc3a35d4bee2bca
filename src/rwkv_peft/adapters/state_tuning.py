"""State tuning: the state that every document begins with is learned, and nothing else need be."""

from __future__ import annotations

import torch
from torch import nn

from ..models import Rwkv


def add_state(model: nn.Module) -> None:
    """Give each layer an initial wkv state to learn, `time_state` (H,N,N) float32, from zero; those there are kept."""
    assert isinstance(model, Rwkv)
    s = model.sizes
    for att in (block.att for block in model.layers() if block.att.time_state is None):
        att.time_state = nn.Parameter(_zeros(model, s.heads, s.head_size, s.head_size))


def add_shift(model: nn.Module) -> None:
    """Give each layer initial token shifts to learn, two `shift_state` (D,) float32, from zero."""
    assert isinstance(model, Rwkv)
    for block in model.layers():
        for mix in (block.att, block.ffn):
            if mix.shift_state is None:
                mix.shift_state = nn.Parameter(_zeros(model, model.sizes.width))


def _zeros(model: Rwkv, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.promote_types(model.dtype, torch.float32), device=model.like.device)
