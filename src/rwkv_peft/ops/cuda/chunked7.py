"""RWKV-7's recurrence on tensor cores: heads of 64, inputs of 16 bits, cards from compute capability 8.0 on.

The kernels and their algebra are in `chunked7.cu`. A chunk of 64 tokens leaves tiles of 64x64 for the kernels that come
after it. Where every chunk is full, a tile has the memory of the chunk's tokens in a (B,T,H,N) tensor, so that the
backward writes each gradient over tiles that only the same block of threads has read.

Axes: B rows, T tokens, H heads, N head size, S documents, G chunks.
"""

from __future__ import annotations

from ctypes import Structure, c_int, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..chunks import Table, table
from .library import run

CHUNK = HEAD_SIZE = 64
DTYPES = (torch.bfloat16, torch.float16)
LOCAL, SCAN, SCAN_BACK, GRADIENTS = 1, 2, 4, 8  # the kernels, as `Kernel` of chunked7.cu numbers them
TENSORS = (
    *("r", "w", "k", "v", "kk", "iclr", "dy", "y", "dr", "dw", "dk", "dv", "dkk", "diclr"),
    *("inverse", "transfer", "reader", "states", "dstates", "end", "initial", "d_final", "final_state", "d_initial"),
    *("start", "length", "first", "counts"),
)
NUMBERS = ("heads", "chunks", "documents", "parts", "in_place", "add", "keep", "fp16", "w_fp16")


class Call(Structure):
    """`Chunked7` of chunked7.cu, field by field; shapes are told there."""

    _fields_ = (*((name, c_void_p) for name in TENSORS), *((name, c_int) for name in NUMBERS))

    def give(self, **tensors: Tensor | None) -> None:
        """Sets the fields of these names; the tensors must outlive the call."""
        for name, x in tensors.items():
            setattr(self, name, None if x is None else x.data_ptr())


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass, besides the inputs. A tile is (T,H,N) of a chunk or (N,N)."""

    start: Tensor  # these four are the chunks' `Table`
    length: Tensor
    first: Tensor
    counts: Tensor
    inverse: Tensor  # tiles, bf16: X less the identity
    transfer: Tensor  # tiles
    reader: Tensor  # tiles
    states: Tensor  # tiles: the state before each chunk
    end: Tensor  # (G,H,N) float32


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
    inputs = (aligned(x) for x in (r, w, k, v, kk, iclr))
    y, final_state = _Wkv7.apply(*inputs, initial_state, cu_seqlens)  # type: ignore[no-untyped-call]
    return y, final_state


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        keep = any(ctx.needs_input_grad)
        y, final_state, saved = wkv7_forward(*(*args, keep))
        ctx.cu_seqlens, ctx.used = args[7], False
        ctx.save_for_backward(*args[:7], *(saved or ()))
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # read once: a checkpoint hands them out once
        *inputs, initial_state = kept[:7]
        saved: Saved | None = Saved(*kept[7:])
        if ctx.used:  # a backward before this one has written over it
            saved = wkv7_forward(*(*inputs, initial_state, ctx.cu_seqlens, True))[2]
        assert saved is not None
        ctx.used = True
        dy = torch.zeros_like(inputs[0]) if dy is None else aligned(dy)
        *gradients, dinitial = wkv7_backward(saved, *(*inputs, dy, dfinal))
        return *gradients, None if initial_state is None else dinitial.to(initial_state.dtype), None


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
    """y (B,T,H,N), the final state, and with `keep` what `wkv7_backward` needs. Inputs `aligned`, as of `wkv7`."""
    B, T, H, N = r.shape
    chunks = table(cu_seqlens, B, T, CHUNK, r.device)
    in_place = cu_seqlens is None and T % CHUNK == 0
    shape = r.shape if in_place else (chunks.chunks * H, N, N)
    transfer, reader, states = (r.new_empty(shape, dtype=torch.bfloat16) for _ in range(3))
    inverse = r.new_empty(shape if keep else 0, dtype=torch.bfloat16)
    y, end = torch.empty_like(r), r.new_empty(chunks.chunks, H, N, dtype=torch.float32)
    final_state = r.new_empty(chunks.documents, H, N, N, dtype=torch.float32)
    initial = None if initial_state is None else aligned(initial_state.float())
    call = _call(r, w, chunks, in_place)
    call.keep = keep
    call.give(r=r, w=w, k=k, v=v, kk=kk, iclr=iclr, y=y, initial=initial, final_state=final_state)
    call.give(inverse=inverse, transfer=transfer, reader=reader, states=states, end=end)
    run("chunked7", call, LOCAL | SCAN, r.device)
    return y, final_state, Saved(*chunks, inverse, transfer, reader, states, end) if keep else None


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
    """Gradients of r, w, k, v, kk, iclr, in r's dtype, and of the initial state (S,H,N,N).

    Where `dr`, `dk`, `dv` are given, they come added to these, in place. `saved` is used up: gradients may have
    the memory of its tiles.
    """
    chunks, in_place = Table(*saved[:4]), saved.states.ndim == 4
    dstates = torch.empty_like(saved.states)
    tiles = [saved.inverse, saved.transfer, saved.reader, saved.states, dstates] if in_place else []
    # `data`: in-place changes of a gradient are none of a saved tensor to autograd
    free = [x.data.view(r.dtype) for x in tiles]
    given = (dr, None, dk, dv, None, None)
    gradients = [x if x is not None else free.pop() if free else torch.empty_like(r) for x in given]
    dinitial = r.new_empty(chunks.documents, r.shape[2], HEAD_SIZE, HEAD_SIZE, dtype=torch.float32)
    d_final = None if dfinal is None else aligned(dfinal.float())
    call = _call(r, w, chunks, in_place)
    call.add = dr is not None
    call.give(r=r, w=w, k=k, v=v, kk=kk, iclr=iclr, dy=dy, d_final=d_final, d_initial=dinitial, dstates=dstates)
    call.give(**saved._asdict())
    call.give(**dict(zip(("dr", "dw", "dk", "dv", "dkk", "diclr"), gradients, strict=True)))
    run("chunked7", call, SCAN_BACK | GRADIENTS, r.device)
    return *gradients, dinitial


def _call(r: Tensor, w: Tensor, chunks: Table, in_place: bool) -> Call:
    sequences = chunks.documents * r.shape[2]
    call = Call(heads=r.shape[2], chunks=chunks.chunks, documents=chunks.documents)
    call.fp16, call.w_fp16 = r.dtype == torch.float16, w.dtype == torch.float16
    call.parts = 1 if sequences < 64 else 2 if sequences < 192 else 4  # few sequences: small blocks, on more of the GPU
    call.in_place = in_place
    call.give(**chunks._asdict())
    return call


def aligned(x: Tensor) -> Tensor:
    """Contiguous, and aligned for loads of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
