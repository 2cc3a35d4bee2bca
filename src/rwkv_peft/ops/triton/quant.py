"""Quantised matrices on a GPU: dense weights of those in blocks, rows rounded to fp8, and an fp8 matrix turned over.

Formats and formulas: `ops/quant`. Axes: n tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PER_PROGRAM = 4096  # weights
TILE = 128
LARGEST = tl.constexpr(448.0)  # of e4m3


def dense_of_8_bits(index: Tensor, absmax: Tensor, numbers: Tensor, out: Tensor, start: int) -> None:
    """Fill `out` with the weights from `start` on, which is at the beginning of a block."""
    grid = (triton.cdiv(out.numel(), PER_PROGRAM),)
    size = out.numel()
    dense_8_kernel[grid](index, absmax, numbers, out, start, size, PER_PROGRAM, num_warps=8, enable_fp_fusion=False)


def dense_of_4_bits(
    pairs: Tensor,
    absmax: Tensor,
    nested: Tensor,
    offset: Tensor,
    numbers: Tensor,
    map8: Tensor,
    out: Tensor,
    start: int,
) -> None:
    """The same of two weights in a byte, whose magnitudes are `map8[absmax] · nested + offset`."""
    grid = (triton.cdiv(out.numel(), PER_PROGRAM),)
    dense_4_kernel[grid](
        pairs, absmax, nested, offset, numbers, map8, out, start, out.numel(), PER_PROGRAM,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def rows_to_fp8(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (n,I), times `factors` (I,) float32, as e4m3 (n,I) and a scale a row (n,1) float32."""
    x = x.contiguous()
    n, columns = x.shape
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty((n, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    warps = min(16, max(1, block // 512))
    if n:
        fp8_rows_kernel[(n,)](x, factors, values, scale, columns, factors is not None, block, num_warps=warps)
    return values, scale


def turned(x: Tensor) -> Tensor:
    """x (O,I) of one-byte numbers as (I,O), contiguous."""
    rows, columns = x.shape
    out = torch.empty((columns, rows), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))
    turn_kernel[grid](x.view(torch.uint8), out.view(torch.uint8), rows, columns, TILE, num_warps=8)
    return out


@triton.jit
def dense_8_kernel(index, absmax, numbers, out, start, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    blocks = (start + tl.program_id(0).to(tl.int64) * BLOCK) // 256 + tl.arange(0, BLOCK // 256)
    largest = tl.load(absmax + blocks, mask=blocks * 256 < start + size, other=0.0)
    number = tl.load(numbers + tl.load(index + start + at, mask=inside, other=0).to(tl.int32))
    dense = tl.reshape(number, (BLOCK // 256, 256)) * largest[:, None]
    tl.store(out + at, tl.reshape(dense, (BLOCK,)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def dense_4_kernel(pairs, absmax, nested, offset, numbers, map8, out, start, size, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    byte = first // 2 + tl.arange(0, BLOCK // 2)
    pair = tl.load(pairs + start // 2 + byte, mask=byte * 2 < size, other=0).to(tl.int32)
    index = tl.reshape(tl.join(pair >> 4, pair & 15), (BLOCK,))
    blocks = (start + first) // 64 + tl.arange(0, BLOCK // 64)
    exists = blocks * 64 < start + size
    step = tl.load(map8 + tl.load(absmax + blocks, mask=exists, other=0).to(tl.int32))
    largest = step * tl.load(nested + blocks // 256, mask=exists, other=0.0) + tl.load(offset)
    dense = tl.reshape(tl.load(numbers + index), (BLOCK // 64, 64)) * largest[:, None]
    at = first + tl.arange(0, BLOCK)
    tl.store(out + at, tl.reshape(dense, (BLOCK,)).to(out.dtype.element_ty), mask=at < size)


@triton.jit
def fp8_rows_kernel(x, factors, values, scale, columns, HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    v = tl.load(x + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    if HAS_FACTORS:
        v *= tl.load(factors + at, mask=at < columns, other=0.0)
    s = tl.maximum(tl.max(tl.abs(v), 0), 1e-30) / LARGEST
    tl.store(scale + row, s)
    tl.store(values + row * columns + at, (v / s).to(values.dtype.element_ty), mask=at < columns)


@triton.jit
def turn_kernel(x, out, rows, columns, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None]
    tile = tl.load(x + row[:, None] * columns + column[None], mask=inside)
    tl.store(out + column[:, None] * rows + row[None], tl.trans(tile), mask=tl.trans(inside))
