"""The recurrences of RWKV-6 and RWKV-5 on tensor cores: heads of 64, inputs of 16 bits, cards from capability 8.0 on.

The kernels and their algebra are in `chunked6*.cu*`. The states before each chunk of 64 tokens are kept for the
backward, each a tile of 64x64. Where every chunk is full, a tile has the memory of the chunk's tokens in a (B,T,H,N)
tensor, so that the backward writes gradients over tiles that only the same block of threads has read.

Axes: B rows, T tokens, H heads, N head size, S documents, G chunks.
"""

from __future__ import annotations

from ctypes import c_int, c_void_p
from typing import Any

import torch
from torch import Tensor

from ..chunks import Table, table
from ..raw import Raw, Saved, recurrence
from .chunked7 import CHUNK, aligned, parts
from .library import DTYPES as NUMBERED
from .library import Pointers, run

SCAN, OUTPUT, SCAN_BACK, GRADIENTS = 1, 2, 4, 8  # the kernels, as `Kernel` of chunked6.cuh numbers them
TENSORS = (
    *("r", "k", "v", "dy", "w", "y", "dr", "dk", "dv", "dw", "u", "du", "states", "dstates"),
    *("initial", "d_final", "final_state", "d_initial", "start", "length", "first", "counts"),
)
NUMBERS = ("heads", "chunks", "documents", "parts", "in_place", "fp16", "w_dtype", "one_decay")


class Call(Pointers):
    """`Chunked6` of chunked6.cuh, field by field; shapes are told there."""

    _fields_ = (*((name, c_void_p) for name in TENSORS), *((name, c_int) for name in NUMBERS))


def wkv5(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `reference.wkv5`, for r, k, v of one dtype of 16 bits, with N = 64."""
    return wkv6(r, w.float(), k, v, u, initial_state, cu_seqlens)  # which tells them apart by the shape of w


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `reference.wkv6`, for r, k, v of one dtype of 16 bits, w of any, N = 64."""
    inputs = (*(aligned(x) for x in (r, w, k, v)), aligned(u.float()))
    return recurrence(RAW, inputs, initial_state, cu_seqlens)


def wkv6_forward(*args: Any) -> tuple[Tensor, Tensor, Saved]:
    """As `Raw.forward` for r, w, k, v, u; the states before each chunk are kept in any case, as y is made from them."""
    *inputs, initial_state, cu_seqlens, _ = args
    r: Tensor = inputs[0]
    B, T, H, N = r.shape
    chunks = table(cu_seqlens, B, T, CHUNK, r.device)
    in_place = cu_seqlens is None and T % CHUNK == 0
    states = r.new_empty(r.shape if in_place else (chunks.chunks * H, N, N), dtype=torch.bfloat16)
    y, final_state = torch.empty_like(r), r.new_empty(chunks.documents, H, N, N, dtype=torch.float32)
    initial = None if initial_state is None else aligned(initial_state.float())
    call = _call(inputs, chunks, states)
    call.give(y=y, initial=initial, final_state=final_state)
    run("chunked6_forward", call, SCAN | OUTPUT, r.device)
    return y, final_state, Saved((states,), chunks)


def wkv6_backward(saved: Saved, *args: Any) -> tuple[Tensor, ...]:
    """As `Raw.backward`: gradients may have the memory of the states."""
    *inputs, dy, dfinal = args
    (states,), chunks = saved
    r, w, dy = *inputs[:2], aligned(dy)
    H, N = r.shape[2:]
    shared = w.ndim == 2
    dstates = torch.empty_like(states)
    # `data`: in-place changes of a gradient are none of a saved tensor to autograd
    dr, dk = (x.data.view(r.dtype) if x.ndim == 4 else torch.empty_like(r) for x in (states, dstates))
    dv = torch.empty_like(r)
    shares = r.new_empty(2 if shared else 1, chunks.chunks, H, N, dtype=torch.float32)  # each chunk's part of du and dw
    dw = shares[1] if shared else torch.empty_like(w)
    dinitial = r.new_empty(chunks.documents, H, N, N, dtype=torch.float32)
    d_final = None if dfinal is None else aligned(dfinal.float())
    call = _call(inputs, chunks, states)
    call.give(dy=dy, dstates=dstates, d_final=d_final, d_initial=dinitial)
    call.give(dr=dr, dw=dw, dk=dk, dv=dv, du=shares[0])
    run("chunked6_backward", call, SCAN_BACK | GRADIENTS, r.device)
    du, *of_w = shares.sum(1)
    return dr, *(of_w or [dw]), dk, dv, du, dinitial


RAW = Raw(wkv6_forward, wkv6_backward)


def _call(inputs: list[Tensor], chunks: Table, states: Tensor) -> Call:
    r, w, k, v, u = inputs
    call = Call(heads=r.shape[2], chunks=chunks.chunks, documents=chunks.documents)
    call.parts = parts(chunks.documents * r.shape[2])
    call.in_place, call.fp16 = states.ndim == 4, r.dtype == torch.float16
    call.w_dtype, call.one_decay = NUMBERED[w.dtype], w.ndim == 2
    call.give(r=r, w=w, k=k, v=v, u=u, states=states, **chunks._asdict())
    return call
