"""The recurrences of RWKV-6 and RWKV-5 as Triton kernels: chunks of 64 tokens, and a scan over the states between them.

`scan` carries the state S from chunk to chunk; neither its rows nor its columns meet, so that each program takes a
block. `output` then makes y for every chunk at once. Backward is the same scan from the end, of the gradient of S; the
gradient of v is the same output read from the end, and `gradients` makes the others, again for every chunk at once.

Inside a chunk token t reads token j through the decays between them. RWKV-6 bounds no decay: nothing may be divided by
a product of decays. So pairs are met by a tree of halves, as in `ops/chunked6.py`: in every block of 2h tokens (h = 1,
2, … 32) the right half reads the left. A row of the right half is r with the decays since the boundary, one of the left
half is k with the decays up to it: all factors are exp of sums of negative numbers. Both halves together are one tile
z, so that z zᵀ holds all pairs of a level, and one symmetric matrix takes the gradient of the pairs to that of z. Sums
of logarithms, and the gradients that go back through them, are products with matrices of 0 and 1.

Axes: B rows, T tokens, H heads, N head size, S documents, C chunk length, G chunks of all documents together.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..chunks import Table, table
from ..raw import Raw, Saved, recurrence
from . import wkv6_kernels as kernels
from .common import product_kind

C = 64
ROWS, KEYS = 64, 32  # of a tile of values and of keys
# Of `gradients`: Triton 3.6 puts products that are 32 bf16 wide into shared memory wrongly (64-byte swizzle) when they
# are operands of the next one
GRADIENT_KEYS = 64


def wkv5(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `reference.wkv5`: arguments, shapes and results are described there."""
    return wkv6(r, w, k, v, u, initial_state, cu_seqlens)  # which tells them apart by the shape of w


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `reference.wkv6`: arguments, shapes and results are described there.

    N is 64 or 128, r not float64. Unless r is float32, products of tiles take bf16 operands, and the states before each
    chunk of 64 tokens, which are kept for backward, are bf16.
    """
    return recurrence(RAW, [x.contiguous() for x in (r, w, k, v, u)], initial_state, cu_seqlens)


def wkv6_forward(*args: Any) -> tuple[Tensor, Tensor, Saved]:
    """As `Raw.forward`; the states before each chunk are kept in any case, as y is made from them."""
    r, w, k, v, u, initial_state, cu_seqlens, _ = args
    B, T, _, _ = r.shape
    chunks = table(cu_seqlens, B, T, C, r.device)
    states, final_state = _run_scan(v, k, w, initial_state, chunks, back=False)
    y = _run_output(r, w, k, v, u, states, chunks, back=False)
    return y, final_state, Saved((states,), chunks)


def wkv6_backward(saved: Saved, *args: Any) -> tuple[Tensor, ...]:
    """As `Raw.backward`."""
    r, w, k, v, u, dy, dfinal = args
    (states,), chunks = saved
    dstates, dinitial = _run_scan(dy, r, w, dfinal, chunks, back=True)
    dv = _run_output(r, w, k, dy, u, dstates, chunks, back=True)
    H, N = r.shape[2:]
    shared = w.dim() == 2
    shares = r.new_empty(2, chunks.chunks, H, N, dtype=torch.float32)  # each chunk's part of du, and of wkv5's dw
    dr, dk, dw = torch.empty_like(r), torch.empty_like(k), shares[1] if shared else torch.empty_like(w)
    kernels.gradients[(chunks.chunks * H * (N // GRADIENT_KEYS),)](
        r, w, k, v, u, dy, states, dstates, _between_tokens(r.device), chunks.start, chunks.length,
        dr, dw, dk, shares[0], H, N, C, ROWS, GRADIENT_KEYS, shared, product_kind(r.dtype),
        num_warps=8, num_stages=1,
    )  # fmt: skip
    if shared:
        dw = dw.sum(0).to(w.dtype)
    return dr, dw, dk, dv, shares[0].sum(0).to(u.dtype), dinitial


RAW = Raw(wkv6_forward, wkv6_backward)


def _run_scan(
    x: Tensor, z: Tensor, w: Tensor, first_state: Tensor | None, chunks: Table, back: bool
) -> tuple[Tensor, Tensor]:
    """The states (G,H,N,N) that `scan` finds before each chunk, and the last (S,H,N,N) in float32."""
    H, N = z.shape[2:]
    kind = product_kind(z.dtype)
    states = z.new_empty(chunks.chunks, H, N, N, dtype=torch.float32 if kind == 0 else torch.bfloat16)
    last_state = z.new_empty(chunks.documents, H, N, N, dtype=torch.float32)
    if first_state is not None:
        first_state = first_state.contiguous()
    kernels.scan[chunks.documents * H * (N // KEYS), N // ROWS](
        x, z, w, first_state, _between_tokens(z.device), *chunks, states, last_state,
        H, N, C, ROWS, KEYS, w.dim() == 2, kind, first_state is not None, back, num_warps=4, num_stages=2,
        maxnreg=None if kind == 0 else 128,  # four programs at a time on each multiprocessor
    )  # fmt: skip
    return states, last_state


def _run_output(
    r: Tensor, w: Tensor, k: Tensor, x: Tensor, u: Tensor, states: Tensor, chunks: Table, back: bool
) -> Tensor:
    """What `output` makes of x (B,T,H,N): y of v, or the gradient of v of that of y."""
    H, N = r.shape[2:]
    out = torch.empty_like(r)
    kernels.output[(chunks.chunks * H,)](
        r, w, k, x, u, states, _between_tokens(r.device), chunks.start, chunks.length, out,
        H, N, C, ROWS, KEYS, w.dim() == 2, product_kind(r.dtype), back, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


@lru_cache(maxsize=8)
def _between_tokens(device: torch.device) -> Tensor:
    """(16,C,C), 1 where the column's token lies between the row's and a place, else 0; then these transposed.

    The places: at each level of the tree the boundary of the two halves that the row is in one of, then the chunk's
    start (SINCE), then its end (UNTIL).
    """
    token, other = torch.arange(C)[:, None], torch.arange(C)[None, :]
    before, after = other < token, other > token
    levels = [
        (token >> level == other >> level) & torch.where((token >> level) & 1 == 1, before, after)
        for level in range(C.bit_length() - 1)
    ]
    between = torch.stack((*levels, before, after))
    return torch.cat((between, between.mT)).to(device, torch.bfloat16)
