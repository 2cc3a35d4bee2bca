"""AdamW for all tensors of a kind in one launch: programs find their tensor in a table of addresses.

Each program takes a few blocks of 256 values. What is in the CPU's pinned memory is read and written where it is.
Formulas: `adamw` in ops/adam.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adam import BLOCK, Averages, Rates

BLOCKS = 8  # of a program: 8 values for each of its threads
WARPS = 8
ALIGNMENT = 16  # bytes that a thread reads at once, if every address and size is a multiple of it


class Table:
    """Where parameters, gradients and averages are, of tensors that have one number format, and their averages one."""

    def __init__(self, parameters: list[Tensor], averages: list[Averages], firsts: list[int]) -> None:
        """`firsts` as in `adamw`, of each parameter. The averages must stay where they are."""
        device = parameters[0].device
        self.parameters = parameters
        self.is_short, self.is_half = "m_max" in averages[0], parameters[0].dtype == torch.bfloat16
        fixed = [
            [*(average[name].data_ptr() if name in average else 0 for name in ("m", "v", "m_max", "v_max")), p.numel()]
            for p, average in zip(parameters, averages, strict=True)
        ]
        self.is_aligned = not any(number % ALIGNMENT for row in fixed for number in row)
        rows = [[*row, first] for row, first in zip(fixed, firsts, strict=True)]
        self.fixed = torch.tensor(rows, device=device)  # (tensors,6)
        self.moving = torch.zeros(len(rows), 2, dtype=torch.int64, device=device)  # parameter and gradient
        self.known: list[int] = []  # what `moving` holds
        programs = torch.tensor([triton.cdiv(p.numel(), BLOCK * BLOCKS) for p in parameters])
        tensor = torch.arange(len(programs)).repeat_interleave(programs)
        part = torch.arange(len(tensor)) - (programs.cumsum(0) - programs)[tensor]
        self.places = torch.stack((tensor, part), 1).int().to(device)  # (programs,2)

    def step(self, rates: Rates, maps: Tensor, skip: Tensor) -> None:
        """Change the parameters that have a gradient; none if the number `skip` on the device is not 0."""
        addresses = [a for p in self.parameters for a in (p.data_ptr(), 0 if p.grad is None else p.grad.data_ptr())]
        if addresses != self.known:
            self._follow(addresses)
        aligned = self.is_aligned and not any(address % ALIGNMENT for address in addresses)
        adamw_kernel[(len(self.places),)](
            self.moving, self.fixed, self.places, maps, skip, *rates,
            self.is_short, self.is_half, aligned, BLOCKS, BLOCK, num_warps=WARPS,
        )  # fmt: skip

    def _follow(self, addresses: list[int]) -> None:
        """Tell the device where parameters and gradients are now, without waiting for it."""
        for p in self.parameters:
            assert p.grad is None or (p.grad.dtype == p.dtype and p.grad.is_contiguous() and p.is_contiguous())
        table = torch.tensor(addresses).view(-1, 2)
        self.moving.copy_(table.pin_memory() if self.moving.is_cuda else table, non_blocking=True)
        self.known = addresses


@triton.jit(do_not_specialize=["key"])
def adamw_kernel(
    moving, fixed, places, maps, skip, keep, size, root, new_m, new_v, eps, key,
    SHORT: tl.constexpr, HALF: tl.constexpr, ALIGNED: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`places` (programs,2): a tensor, and which part of it. `moving` and `fixed`: see Table. SHORT: 8 bits."""
    place = places + 2 * tl.program_id(0).to(tl.int64)
    tensor, part = tl.load(place).to(tl.int64), tl.load(place + 1).to(tl.int64)
    moving += 2 * tensor
    fixed += 6 * tensor
    first, count = tl.load(fixed + 5), tl.load(fixed + 4)
    count = tl.where((tl.load(skip) == 0) & (tl.load(moving + 1) != 0), count, 0)  # or nothing is to be done
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, has_scale = at < count, block * BLOCK < count

    p_ptr, g_ptr = _pointer(moving, HALF, False, ALIGNED), _pointer(moving + 1, HALF, False, ALIGNED)
    m_ptr, v_ptr = _pointer(fixed, False, SHORT, ALIGNED), _pointer(fixed + 1, False, SHORT, ALIGNED)
    p = tl.load(p_ptr + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
    m, v = tl.load(m_ptr + at, mask=mask, other=0), tl.load(v_ptr + at, mask=mask, other=0)
    if SHORT:
        m_scales = _pointer(fixed + 2, False, False, ALIGNED) + block
        v_scales = _pointer(fixed + 3, False, False, ALIGNED) + block
        m = tl.load(maps + m.to(tl.int32)) * tl.load(m_scales, mask=has_scale, other=0.0)[:, None]
        v = tl.load(maps + 512 + v.to(tl.int32)) * tl.load(v_scales, mask=has_scale, other=0.0)[:, None]

    m += (g - m) * new_m
    v += (g * g - v) * new_v
    p = p * keep - size * (m / (tl.sqrt(v) / root + eps))

    if HALF:
        draws = _mixed((at + first).to(tl.uint32) ^ key.to(tl.uint32)) >> 16
        bits = p.to(tl.int32, bitcast=True) + draws.to(tl.int32)
        p = (bits & -0x10000).to(tl.float32, bitcast=True)
    tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=mask)
    if SHORT:
        m, m_max = _quantised(tl.where(mask, m, 0.0), maps + 256)
        v, v_max = _quantised(tl.where(mask, v, 0.0), maps + 768)
        tl.store(m_scales, m_max, mask=has_scale)
        tl.store(v_scales, v_max, mask=has_scale)
    tl.store(m_ptr + at, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pointer(entry, HALF: tl.constexpr, BYTE: tl.constexpr, ALIGNED: tl.constexpr):
    """What an entry of a table points to: bf16, bytes, or float32."""
    address = tl.load(entry)
    if HALF:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif BYTE:
        pointer = address.to(tl.pointer_type(tl.uint8))
    else:
        pointer = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _quantised(x, bounds):
    """As `quantised`, of x (blocks,256): the number of bounds below a value is found by halving."""
    largest = tl.max(tl.abs(x), 1)
    scaled = x / tl.maximum(largest, 1.1754943508222875e-38)[:, None]
    index = tl.zeros_like(scaled).to(tl.int32)
    for i in tl.static_range(8):
        half = 128 >> i
        index += tl.where(tl.load(bounds + index + (half - 1)) < scaled, half, 0)
    return index, largest


@triton.jit
def _mixed(x):
    """As `mixed`, of uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)
