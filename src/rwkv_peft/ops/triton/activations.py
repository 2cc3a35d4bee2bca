"""The channel-mix's squared ReLU, and the gate of RWKV-5's and RWKV-6's, each one pass forward and one backward.

Axes: B rows, T tokens, D width. Formulas: `pieces.relu2` and `pieces.gated`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import pieces
from .common import INTERPRETED

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ELEMENTS = 4096  # of a program: 16 for each of its threads
WARPS = 8


def fits(*tensors: Tensor) -> bool:
    """Whether kernels can compute with these: one dtype that they know, on a device that they run on."""
    x = tensors[0]
    return x.dtype in DTYPES and all(y.dtype == x.dtype for y in tensors) and (x.is_cuda or INTERPRETED)


def relu2(k: Tensor) -> Tensor:
    """The same function as `pieces.relu2`; its backward needs the result alone, so that k can be freed."""
    return _Relu2.apply(k) if fits(k) else pieces.relu2(k)


def gated(r: Tensor, v: Tensor) -> Tensor:
    """The same function as `pieces.gated`."""
    return _Gated.apply(r, v) if fits(r, v) else pieces.gated(r, v)


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor) -> Tensor:
        k = k.contiguous()
        out = torch.empty_like(k)
        _relu2[_grid(k)](k, out, k.numel(), BLOCK=ELEMENTS, num_warps=WARPS)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        dk = torch.empty_like(out)
        _relu2_backward[_grid(out)](out, dout.contiguous(), dk, out.numel(), BLOCK=ELEMENTS, num_warps=WARPS)
        return dk


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, r: Tensor, v: Tensor) -> Tensor:
        r, v = r.contiguous(), v.contiguous()
        out = torch.empty_like(v)
        _gated[_grid(v)](r, v, out, v.numel(), BLOCK=ELEMENTS, num_warps=WARPS)
        ctx.save_for_backward(r, v)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        r, v = ctx.saved_tensors
        dr, dv = torch.empty_like(r), torch.empty_like(v)
        _gated_backward[_grid(v)](r, v, dout.contiguous(), dr, dv, v.numel(), BLOCK=ELEMENTS, num_warps=WARPS)
        return dr, dv


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), ELEMENTS),)


@triton.jit
def _places(BLOCK: tl.constexpr):
    """(BLOCK,) int64: the elements of this program."""
    return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _relu2(k_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = _places(BLOCK)
    k = tl.maximum(tl.load(k_ptr + at, mask=at < size).to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + at, k * k, mask=at < size)


@triton.jit
def _relu2_backward(out_ptr, dout_ptr, dk_ptr, size, BLOCK: tl.constexpr):
    at = _places(BLOCK)
    out = tl.load(out_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=at < size).to(tl.float32)
    tl.store(dk_ptr + at, 2.0 * tl.sqrt(out) * dout, mask=at < size)


@triton.jit
def _gated(r_ptr, v_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = _places(BLOCK)
    r = tl.load(r_ptr + at, mask=at < size).to(tl.float32)
    v = tl.load(v_ptr + at, mask=at < size).to(tl.float32)
    tl.store(out_ptr + at, tl.sigmoid(r) * v, mask=at < size)


@triton.jit
def _gated_backward(r_ptr, v_ptr, dout_ptr, dr_ptr, dv_ptr, size, BLOCK: tl.constexpr):
    at = _places(BLOCK)
    gate = tl.sigmoid(tl.load(r_ptr + at, mask=at < size).to(tl.float32))
    v = tl.load(v_ptr + at, mask=at < size).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=at < size).to(tl.float32)
    tl.store(dr_ptr + at, dout * v * gate * (1.0 - gate), mask=at < size)
    tl.store(dv_ptr + at, dout * gate, mask=at < size)
