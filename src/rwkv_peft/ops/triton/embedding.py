"""Rows of an embedding that lies in the CPU's memory, which is pinned: the GPU fetches those that it needs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rows_of(weight: Tensor, tokens: Tensor) -> Tensor:
    """weight (V,D), tokens (…) int64 on the GPU → (…,D) there."""
    width = weight.shape[1]
    out = torch.empty((*tokens.shape, width), dtype=weight.dtype, device=tokens.device)
    tokens = tokens.contiguous()
    if tokens.numel():
        embedding_kernel[(tokens.numel(),)](weight, tokens, out, width, triton.next_power_of_2(width), num_warps=4)
    return out


@triton.jit
def embedding_kernel(weight, tokens, out, width, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    row = tl.load(tokens + place) * width
    tl.store(out + place * width + at, tl.load(weight + row + at, mask=at < width), mask=at < width)
