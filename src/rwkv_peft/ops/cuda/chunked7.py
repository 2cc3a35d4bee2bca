"""RWKV-7's recurrence on tensor cores: heads of 64, inputs of 16 bits, cards from compute capability 8.0 on.

The kernels and their algebra are in `chunked7.cuh`. A chunk of 64 tokens leaves tiles of 64x64 for the kernels that
come after it. Where every chunk is full, a tile has the memory of the chunk's tokens in a (B,T,H,N) tensor, so that the
backward writes each gradient over tiles that only the same block of threads has read.

Axes: B rows, T tokens, H heads, N head size, S documents, G chunks.
"""

from __future__ import annotations

from ctypes import c_int, c_void_p
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..chunks import Table, table
from ..raw import Raw, Saved, recurrence
from .library import Pointers, run

CHUNK = HEAD_SIZE = 64
DTYPES = (torch.bfloat16, torch.float16)
LOCAL, SCAN, SCAN_BACK, GRADIENTS = 1, 2, 4, 8  # the kernels, as `Kernel` of chunked7.cuh numbers them
TENSORS = (
    *("r", "w", "k", "v", "kk", "iclr", "dy", "y", "dr", "dw", "dk", "dv", "dkk", "diclr"),
    *("inverse", "transfer", "reader", "states", "dstates", "end", "initial", "d_final", "final_state", "d_initial"),
    *("start", "length", "first", "counts"),
)
NUMBERS = ("heads", "chunks", "documents", "parts", "in_place", "add", "keep", "fp16", "w_fp16")


class Call(Pointers):
    """`Chunked7` of chunked7.cuh, field by field; shapes are told there."""

    _fields_ = (*((name, c_void_p) for name in TENSORS), *((name, c_int) for name in NUMBERS))


class Plan(NamedTuple):
    """What all calls of one shape share."""

    chunks: Table
    heads: int
    in_place: bool  # whether a tile is a (T,H,N) part of a tensor like r, else (N,N) of one (G*H,N,N)
    call: Call  # with the fields that all of them have


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    iclr: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `reference.wkv7`, for inputs of one of `DTYPES`, w of either of them, with N = 64."""
    return recurrence(RAW, [aligned(x) for x in (r, w, k, v, kk, iclr)], initial_state, cu_seqlens)


def wkv7_forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    iclr: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Saved | None]:
    """As `Raw.forward`; inputs `aligned`, as of `wkv7`."""
    plan = _plan(r, w, cu_seqlens)
    y, end = torch.empty_like(r), r.new_empty(plan.chunks.chunks, plan.heads, HEAD_SIZE, dtype=torch.float32)
    transfer, reader, states = _tiles(plan, r), _tiles(plan, r), _tiles(plan, r)
    inverse = _tiles(plan, r) if keep else None
    final_state = _states(plan, r)
    initial = None if initial_state is None else aligned(initial_state.float())
    call = Call.from_buffer_copy(plan.call)
    call.give(r=r, w=w, k=k, v=v, kk=kk, iclr=iclr, y=y, initial=initial, final_state=final_state)
    call.give(inverse=inverse, transfer=transfer, reader=reader, states=states, end=end)
    call.keep = keep
    run("chunked7_forward", call, LOCAL | SCAN, r.device)
    return y, final_state, None if inverse is None else Saved((inverse, transfer, reader, states, end), plan)


def wkv7_backward(
    saved: Saved,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    iclr: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    dr: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As `Raw.backward`: gradients in r's dtype, which may have the memory of what was saved."""
    plan: Plan = saved.plan
    *tiles, end = saved.tensors
    inverse, transfer, reader, states = tiles
    dy = aligned(dy)
    dstates = _tiles(plan, r)
    # `data`: in-place changes of a gradient are none of a saved tensor to autograd
    free = [dstates, *(x.data for x in tiles)] if plan.in_place else []
    given = (dr, None, dk, dv, None, None)
    gradients = [x if x is not None else free.pop() if free else torch.empty_like(r) for x in given]
    dinitial, d_final = _states(plan, r), None if dfinal is None else aligned(dfinal.float())
    call = Call.from_buffer_copy(plan.call)
    call.give(r=r, w=w, k=k, v=v, kk=kk, iclr=iclr, dy=dy, d_final=d_final, d_initial=dinitial, dstates=dstates)
    call.give(inverse=inverse, transfer=transfer, reader=reader, states=states, end=end)
    call.give(**dict(zip(("dr", "dw", "dk", "dv", "dkk", "diclr"), gradients, strict=True)))
    call.add = dr is not None
    run("chunked7_backward", call, SCAN_BACK | GRADIENTS, r.device)
    return *gradients, dinitial


RAW = Raw(wkv7_forward, wkv7_backward)


def _tiles(plan: Plan, r: Tensor) -> Tensor:
    """Room for a tile of every chunk and head."""
    return torch.empty_like(r) if plan.in_place else r.new_empty(plan.chunks.chunks * plan.heads, HEAD_SIZE, HEAD_SIZE)


def _states(plan: Plan, r: Tensor) -> Tensor:
    return r.new_empty(plan.chunks.documents, plan.heads, HEAD_SIZE, HEAD_SIZE, dtype=torch.float32)


def _plan(r: Tensor, w: Tensor, cu_seqlens: Tensor | None) -> Plan:
    B, T, H, _ = r.shape
    fp16 = (r.dtype == torch.float16, w.dtype == torch.float16)
    if cu_seqlens is None:
        return _known(B, T, H, fp16, r.device)
    return _made(table(cu_seqlens, B, T, CHUNK, r.device), H, fp16, False)


@lru_cache(maxsize=16)  # every layer of a model asks for the same
def _known(B: int, T: int, H: int, fp16: tuple[bool, bool], device: torch.device) -> Plan:
    return _made(table(None, B, T, CHUNK, device), H, fp16, T % CHUNK == 0)


def _made(chunks: Table, heads: int, fp16: tuple[bool, bool], in_place: bool) -> Plan:
    call = Call(heads=heads, chunks=chunks.chunks, documents=chunks.documents, in_place=in_place)
    call.fp16, call.w_fp16 = fp16
    call.parts = parts(chunks.documents * heads)
    call.give(**chunks._asdict())
    return Plan(chunks, heads, in_place, call)


def parts(sequences: int) -> int:
    """Warps in a scan's block: where sequences are few, small blocks get to more of the GPU."""
    return 1 if sequences < 64 else 2 if sequences < 192 else 4


def aligned(x: Tensor) -> Tensor:
    """Contiguous, and aligned for loads of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
