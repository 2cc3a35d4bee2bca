"""The output of RWKV-5's and RWKV-6's recurrence: heads normalised, times a gate; one pass each way.

A program takes one head and walks over a run of tokens, ROWS of them at a time; backward it holds the gradients of
`ln_x` meanwhile and leaves one partial sum of each. What normalises a head is computed again in backward.

Axes: B rows, T tokens, H heads, N head size, D width, P programs of a head. Formula: `pieces.gated_output`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import pieces
from .activations import fits

ELEMENTS = 2048  # of a tile
PROGRAMS = 2112  # 16 for each of an H100's processors


def gated_output(y: Tensor, gate: Tensor, ln_x: nn.Module) -> Tensor:
    """The same function as `pieces.gated_output`: arguments, shapes and results are described there."""
    if not (pieces.is_plain(ln_x) and fits(y, gate)):
        return pieces.gated_output(y, gate, ln_x)
    return _GatedOutput.apply(y, gate, ln_x.weight, ln_x.bias, ln_x.num_groups, ln_x.eps)  # type: ignore[no-any-return]


class _GatedOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float) -> Tensor:
        y, gate = y.contiguous(), gate.contiguous()
        out = torch.empty_like(y)
        walk, grid, sizes = _layout(y, heads)
        _gated_output[grid](y, gate, weight, bias, out, y.numel() // y.shape[-1], walk, eps, **sizes)
        ctx.save_for_backward(y, gate, weight, bias)
        ctx.heads, ctx.eps = heads, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, weight, bias = ctx.saved_tensors
        dy, dgate = torch.empty_like(y), torch.empty_like(gate)
        D, trains = y.shape[-1], any(ctx.needs_input_grad[2:4])
        walk, grid, sizes = _layout(y, ctx.heads)
        partial = y.new_empty(grid[0], 2, D, dtype=torch.float32) if trains else None
        pointers = (y, gate, weight, bias, dout.contiguous(), dy, dgate, partial)
        _gated_output_backward[grid](*pointers, y.numel() // D, walk, ctx.eps, **sizes)
        dweight, dbias = (None, None) if partial is None else partial.sum(0).to(weight.dtype)
        return dy, dgate, dweight, dbias, None, None


def _layout(y: Tensor, heads: int) -> tuple[int, tuple[int, int], dict[str, int]]:
    """Tokens that a program walks over, the programs (P,H), and the sizes that are compiled in."""
    tokens, N = y.numel() // y.shape[-1], y.shape[-1] // heads
    block = triton.next_power_of_2(N)
    rows = max(1, ELEMENTS // block)
    tiles = triton.cdiv(tokens, rows)
    steps = triton.cdiv(tiles * heads, PROGRAMS)
    sizes = {"H": heads, "N": N, "ROWS": rows, "BLOCK": block, "num_warps": 4}
    return steps * rows, (triton.cdiv(tiles, steps), heads), sizes


@triton.jit
def _normalised(y, inside, eps, N: tl.constexpr):
    """Rows (ROWS,BLOCK) with mean 0 and variance 1 over N columns, and what they were multiplied by."""
    centred = tl.where(inside, y - tl.sum(y, 1)[:, None] / N, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)[:, None]
    return centred * rstd, rstd


@triton.jit(do_not_specialize=["tokens", "walk"])
def _gated_output(
    y_ptr, gate_ptr, weight_ptr, bias_ptr, out_ptr, tokens, walk, eps,
    H: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin, head = tl.program_id(0).to(tl.int64) * walk, tl.program_id(1)
    columns = tl.arange(0, BLOCK)[None]
    weight = tl.load(weight_ptr + head * N + columns, mask=columns < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + head * N + columns, mask=columns < N, other=0.0).to(tl.float32)
    for start in range(begin, min(begin + walk, tokens), ROWS):
        rows = (start + tl.arange(0, ROWS))[:, None]
        inside = (rows < tokens) & (columns < N)
        at = rows * (H * N) + head * N + columns
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        xhat, _ = _normalised(y, inside, eps, N)
        tl.store(out_ptr + at, (xhat * weight + bias) * gate * tl.sigmoid(gate), mask=inside)


@triton.jit(do_not_specialize=["tokens", "walk"])
def _gated_output_backward(
    y_ptr, gate_ptr, weight_ptr, bias_ptr, dout_ptr, dy_ptr, dgate_ptr, partial_ptr, tokens, walk, eps,
    H: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin, head = tl.program_id(0).to(tl.int64) * walk, tl.program_id(1)
    columns = tl.arange(0, BLOCK)[None]
    weight = tl.load(weight_ptr + head * N + columns, mask=columns < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + head * N + columns, mask=columns < N, other=0.0).to(tl.float32)
    dweight = tl.zeros((1, BLOCK), tl.float32)
    dbias = tl.zeros((1, BLOCK), tl.float32)
    for start in range(begin, min(begin + walk, tokens), ROWS):
        rows = (start + tl.arange(0, ROWS))[:, None]
        inside = (rows < tokens) & (columns < N)
        at = rows * (H * N) + head * N + columns
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
        xhat, rstd = _normalised(y, inside, eps, N)
        open_ = tl.sigmoid(gate)
        dz = dout * gate * open_
        dgate = dout * (xhat * weight + bias) * open_ * (1.0 + gate * (1.0 - open_))
        g = dz * weight
        mean_g, mean_gx = tl.sum(g, 1)[:, None] / N, tl.sum(g * xhat, 1)[:, None] / N
        tl.store(dy_ptr + at, rstd * (g - mean_g - xhat * mean_gx), mask=inside)
        tl.store(dgate_ptr + at, dgate, mask=inside)
        if partial_ptr is not None:
            dweight += tl.sum(dz * xhat, 0)[None]
            dbias += tl.sum(dz, 0)[None]
    if partial_ptr is not None:
        place = partial_ptr + tl.program_id(0) * (2 * H * N) + head * N + columns
        tl.store(place, dweight, mask=columns < N)
        tl.store(place + H * N, dbias, mask=columns < N)
