"""RWKV-7's recurrence as Triton kernels: chunks of 64 tokens side by side, then a short scan over their states.

The algebra is that of `ops/chunked7.py`. With P_t the product of a chunk's decays up to token t, q = (-kk·P_before,
r·P) reads the state, g = (kk·iclr/P, k/P) is what is written to it, A are their products where the reader comes after
the writer, X = (I - A_ab)^-1, and W = X q_a. A chunk then is two linear functions of the state S before it:

    S' = S·diag(end) + S·transfer + injected        y = reader Sᵀ + own

`local` makes these four for every chunk at once. `scan` goes from chunk to chunk; rows of S (value indices) do not
meet, so that each program takes a few of them. Backward, `scan_back` hands the gradient of S back through the same
functions, and `gradients` does everything else, again for every chunk at once.

Decays are divided by one another inside a chunk, which float32 and bf16 have the range for while w averages below 0.3;
RWKV-7 bounds it by -0.5. Axes: B rows, T tokens, H heads, N head size, S documents, C chunk length, G chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..chunks import Table, table
from ..raw import Raw, Saved, recurrence
from . import wkv7_kernels as kernels
from .common import product_kind


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
    """The same function as `reference.wkv7`: arguments, shapes and results are described there."""
    if r.shape[1] == 1 and cu_seqlens is None:  # a chunk of one token is the recurrence itself
        return reference.wkv7(r, w, k, v, kk, iclr, initial_state)
    return recurrence(RAW, [x.contiguous() for x in (r, w, k, v, kk, iclr)], initial_state, cu_seqlens)


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
    """As `Raw.forward`. Kept are tiles in `_low`'s dtype:

    X less the identity (G,H,C,C), transfer (G,H,N,N), reader (G,H,C,N), and the state before each chunk (G,H,N,N);
    and the decay of each chunk (G,H,N) in float32.
    """
    B, T, H, N = r.shape
    C = _chunk(r.dtype, N)
    chunks = table(cu_seqlens, B, T, C, r.device)
    G, S, kind, low = chunks.chunks, chunks.documents, product_kind(r.dtype), _low(r.dtype)
    y, end = torch.empty_like(r), r.new_empty(G, H, N, dtype=torch.float32)
    final_state = r.new_empty(S, H, N, N, dtype=torch.float32)
    inverse = r.new_empty(G if keep else 0, H, C, C, dtype=low)
    states = r.new_empty(G if keep else 0, H, N, N, dtype=low)
    transfer, injected = (r.new_empty(G, H, N, N, dtype=low) for _ in range(2))
    reader = r.new_empty(G, H, C, N, dtype=low)
    if G:
        kernels.local[H, G](
            r, w, k, v, kk, iclr, chunks.start, chunks.length, inverse, transfer, injected, reader, y, end,
            H, N, C, kind, keep, num_warps=4,
        )  # fmt: skip
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    part = _values(S * H)
    kernels.scan[N // part, H, S](
        initial_state, chunks.first, chunks.counts, chunks.start, chunks.length, transfer, injected, reader, end,
        y, states, final_state, H, N, C, part, kind, initial_state is not None, keep, num_warps=4, num_stages=3,
    )  # fmt: skip
    return y, final_state, Saved((inverse, transfer, reader, states, end), chunks) if keep else None


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
    """As `Raw.backward`: gradients in r's dtype."""
    chunks: Table = saved.plan
    inverse, transfer, reader, states, end = saved.tensors
    H, N, C = *r.shape[2:], inverse.shape[-1]
    G, S, kind = chunks.chunks, chunks.documents, product_kind(r.dtype)
    dstates = torch.empty_like(states)
    dinitial = r.new_empty(S, H, N, N, dtype=torch.float32)
    part = _values(S * H)
    if dfinal is not None:
        dfinal = dfinal.float().contiguous()
    kernels.scan_back[N // part, H, S](
        dfinal, chunks.first, chunks.counts, chunks.start, chunks.length, transfer, reader, end, dy, dstates, dinitial,
        H, N, C, part, kind, dfinal is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    given = (dr, None, dk, dv, None, None)
    grads = [torch.empty_like(r) if x is None else x for x in given]
    if G:
        kernels.gradients[H, G](
            r, w, k, v, kk, iclr, dy, chunks.start, chunks.length, inverse, states, dstates, *grads,
            H, N, C, kind, dr is not None, num_warps=8,
        )  # fmt: skip
    return *grads, dinitial


RAW = Raw(wkv7_forward, wkv7_backward)


def _chunk(dtype: torch.dtype, head_size: int) -> int:
    """Tokens of a chunk: as many as the kernels' shared memory has room for."""
    if dtype == torch.float32:
        return 16
    return 64 if head_size == 64 else 32


def _low(dtype: torch.dtype) -> torch.dtype:
    """What chunks are kept in between kernels: bf16 for 16-bit inputs, which has float32's range."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def _values(sequences: int) -> int:
    """Rows of the state that one program of a scan takes: few where few sequences would leave the GPU idle."""
    return 16 if sequences < 64 else 32 if sequences < 192 else 64
