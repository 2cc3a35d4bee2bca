"""The recurrences of RWKV-6 and RWKV-5 as Triton kernels: chunks of 64 tokens, and a scan over the states between them.

`_scan` carries the state S from chunk to chunk; neither its rows nor its columns meet, so that each program takes a
block. `_output` then makes y for every chunk at once. Backward is the same scan from the end, of the gradient of S; the
gradient of v is the same output read from the end, and `_gradients` makes the others, again for every chunk at once.

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
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..chunks import Table, table
from ..raw import Raw, Saved, recurrence
from .common import dot, product_kind

C = 64
ROWS, KEYS = 64, 32  # of a tile of values and of keys
# Of `_gradients`: Triton 3.6 puts products that are 32 bf16 wide into shared memory wrongly (64-byte swizzle) when they
# are operands of the next one
GRADIENT_KEYS = 64
LEVELS = tl.constexpr(6)  # of halves in a chunk
SINCE, UNTIL = LEVELS, tl.constexpr(7)  # from a chunk's start to a token, from a token to the end
TRANSPOSED = tl.constexpr(8)  # the first of the matrices that are transposed
LARGEST_W = tl.constexpr(reference.LARGEST_W)


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
    _gradients[(chunks.chunks * H * (N // GRADIENT_KEYS),)](
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
    """The states (G,H,N,N) that `_scan` finds before each chunk, and the last (S,H,N,N) in float32."""
    H, N = z.shape[2:]
    kind = product_kind(z.dtype)
    states = z.new_empty(chunks.chunks, H, N, N, dtype=torch.float32 if kind == 0 else torch.bfloat16)
    last_state = z.new_empty(chunks.documents, H, N, N, dtype=torch.float32)
    if first_state is not None:
        first_state = first_state.contiguous()
    _scan[chunks.documents * H * (N // KEYS), N // ROWS](
        x, z, w, first_state, _between_tokens(z.device), *chunks, states, last_state,
        H, N, C, ROWS, KEYS, w.dim() == 2, kind, first_state is not None, back, num_warps=4, num_stages=2,
        maxnreg=None if kind == 0 else 128,  # four programs at a time on each multiprocessor
    )  # fmt: skip
    return states, last_state


def _run_output(
    r: Tensor, w: Tensor, k: Tensor, x: Tensor, u: Tensor, states: Tensor, chunks: Table, back: bool
) -> Tensor:
    """What `_output` makes of x (B,T,H,N): y of v, or the gradient of v of that of y."""
    H, N = r.shape[2:]
    out = torch.empty_like(r)
    _output[(chunks.chunks * H,)](
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


@triton.jit
def _tile(ptr, start, h, H, column, N: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """Places (C,WIDTH) of a chunk's tokens in (B*T,H,N), from a column on."""
    base = (start.to(tl.int64) * H + h) * N + column
    return ptr + base + (tl.arange(0, C)[:, None] * (H * N) + tl.arange(0, WIDTH)[None, :])


@triton.jit
def _block(ptr, g, h, H, row, column, N: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Places (ROWS,WIDTH) of a state in (·,H,N,N), from a row and a column on."""
    base = (g.to(tl.int64) * H + h) * (N * N) + row * N + column
    return ptr + base + (tl.arange(0, ROWS)[:, None] * N + tl.arange(0, WIDTH)[None, :])


@triton.jit
def _log_decays(
    w_ptr, start, length, h, H, column, N: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr
):
    """The logarithm of each decay (C,WIDTH); tokens outside decay nothing. With SHARED, w is (H,N)."""
    inside = tl.arange(0, C)[:, None] < length
    if SHARED:
        w = tl.broadcast_to(tl.load(w_ptr + h * N + column + tl.arange(0, WIDTH))[None, :], (C, WIDTH))
    else:
        w = tl.load(_tile(w_ptr, start, h, H, column, N, C, WIDTH), mask=inside, other=0.0)
    return tl.where(inside, -tl.exp(tl.minimum(w.to(tl.float32), LARGEST_W)), 0.0)


@triton.jit
def _between(between_ptr, which, C: tl.constexpr):
    """(C,C) of 0 and 1, see `_between_tokens`: a level of the tree, SINCE or UNTIL."""
    return tl.load(between_ptr + which * (C * C) + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :])


@triton.jit
def _decay(weights, count, log_decay, SHARED: tl.constexpr, KIND: tl.constexpr):
    """The decay (C,N) over the tokens that `weights` (C,C) of 0 and 1 gives to each; `count` (C,1) is their number.

    A product of bf16 tiles gets the logarithms in two parts.
    """
    if SHARED:
        return tl.exp(count.to(tl.float32) * log_decay)
    elif KIND == 0:
        return tl.exp(dot(weights, log_decay, KIND))
    else:
        high = log_decay.to(tl.bfloat16)
        low = log_decay - high.to(tl.float32)
        return tl.exp(dot(weights, low, KIND) + dot(weights, high, KIND))


@triton.jit
def _log_gradient(between_ptr, which, C: tl.constexpr, count, change, SHARED: tl.constexpr, KIND: tl.constexpr):
    """From the gradient of a decay's logarithm to that of each token's.

    With SHARED, the sum over the tokens is what matters, not where each part stands.
    """
    if SHARED:
        return count.to(tl.float32) * change
    else:
        return dot(_between(between_ptr, TRANSPOSED + which, C), change, KIND)


@triton.jit
def _half_count(token, level):
    """How many tokens lie between a token and the boundary of the two halves it is in one of."""
    last = (1 << level) - 1
    place = token & last
    return tl.where((token >> level) & 1 == 1, place, last - place)


@triton.jit(do_not_specialize_on_alignment=["start_ptr", "length_ptr", "first_ptr", "count_ptr"])
def _scan(
    x_ptr, z_ptr, w_ptr, first_state_ptr, between_ptr, start_ptr, length_ptr, first_ptr, count_ptr,
    states_ptr, last_state_ptr,
    H, N: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SHARED: tl.constexpr,
    KIND: tl.constexpr, HAS_FIRST: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """S' = S·diag(decay of the chunk) + xᵀ (z with decays), keeping the S that each chunk finds.

    Forward x is v, and z is k with the decays up to the chunk's end. BACK, from the last chunk to the first, S is the
    gradient, x that of y, and z is r with the decays since the chunk's start.
    """
    parts: tl.constexpr = N // KEYS
    part, pair = tl.program_id(0) % parts, tl.program_id(0) // parts
    h, document = pair % H, pair // H
    key, row = part * KEYS, tl.program_id(1) * ROWS
    if HAS_FIRST:
        state = tl.load(_block(first_state_ptr, document, h, H, row, key, N, ROWS, KEYS)).to(tl.float32)
    else:
        state = tl.zeros((ROWS, KEYS), tl.float32)
    first, count = tl.load(first_ptr + document), tl.load(count_ptr + document)
    begin = tl.load(start_ptr + first, mask=count > 0, other=0)
    in_last = tl.load(length_ptr + first + count - 1, mask=count > 0, other=0)
    token = tl.arange(0, C)[:, None]
    weights = _between(between_ptr, SINCE if BACK else UNTIL, C)
    for step in range(count):
        chunk = count - 1 - step if BACK else step
        start, length = begin + chunk * C, tl.where(chunk == count - 1, in_last, C)
        tl.store(
            _block(states_ptr, first + chunk, h, H, row, key, N, ROWS, KEYS), state.to(states_ptr.dtype.element_ty)
        )
        log_decay = _log_decays(w_ptr, start, length, h, H, key, N, C, KEYS, SHARED)
        x = tl.load(_tile(x_ptr, start, h, H, row, N, C, ROWS), mask=token < length, other=0.0)
        z = tl.load(_tile(z_ptr, start, h, H, key, N, C, KEYS), mask=token < length, other=0.0).to(tl.float32)
        z *= _decay(weights, token if BACK else length - 1 - token, log_decay, SHARED, KIND)
        state = state * tl.exp(tl.sum(log_decay, 0))[None, :] + dot(tl.trans(x), z, KIND)
    tl.store(_block(last_state_ptr, document, h, H, row, key, N, ROWS, KEYS), state)


@triton.jit(do_not_specialize_on_alignment=["start_ptr", "length_ptr"])
def _output(
    r_ptr, w_ptr, k_ptr, x_ptr, u_ptr, states_ptr, between_ptr, start_ptr, length_ptr, out_ptr,
    H, N: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SHARED: tl.constexpr,
    KIND: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """y of one chunk and head: what its tokens read from the state before it, from one another and from themselves.

    BACK, the gradient of v: x is that of y, the states are the gradients of those after the chunks, tokens read later
    ones, and k, with the decays up to the chunk's end, reads the state.
    """
    g, h = tl.program_id(0) // H, tl.program_id(0) % H
    start, length = tl.load(start_ptr + g), tl.load(length_ptr + g)
    if length == 0:
        return
    token, other = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    inside = token < length
    bonus, pairs = tl.zeros((C,), tl.float32), tl.zeros((C, C), tl.float32)
    for key in range(0, N, KEYS):
        log_decay = _log_decays(w_ptr, start, length, h, H, key, N, C, KEYS, SHARED)
        r = tl.load(_tile(r_ptr, start, h, H, key, N, C, KEYS), mask=inside, other=0.0)
        k = tl.load(_tile(k_ptr, start, h, H, key, N, C, KEYS), mask=inside, other=0.0)
        u = tl.load(u_ptr + h * N + key + tl.arange(0, KEYS)).to(tl.float32)[None, :]
        bonus += tl.sum(r.to(tl.float32) * k.to(tl.float32) * u, 1)
        for level in range(LEVELS):
            half = token >> level
            right = half & 1 == 1
            weights = _between(between_ptr, level, C)
            z = tl.where(right, r, k).to(tl.float32)
            z *= _decay(weights, _half_count(token, level), log_decay, SHARED, KIND)
            reads = right != BACK
            read = other >> level == tl.where(reads, half ^ 1, -1)
            pairs += tl.where(read, dot(z, tl.trans(z), KIND), 0.0)
    pairs = tl.where(token == other, bonus[:, None], pairs)
    for row in range(0, N, ROWS):
        x = tl.load(_tile(x_ptr, start, h, H, row, N, C, ROWS), mask=inside, other=0.0)
        out = dot(pairs, x, KIND)
        for key in range(0, N, KEYS):
            log_decay = _log_decays(w_ptr, start, length, h, H, key, N, C, KEYS, SHARED)
            reader_ptr = k_ptr if BACK else r_ptr
            reader = tl.load(_tile(reader_ptr, start, h, H, key, N, C, KEYS), mask=inside, other=0.0).to(tl.float32)
            if BACK:
                reader *= _decay(_between(between_ptr, UNTIL, C), length - 1 - token, log_decay, SHARED, KIND)
            else:
                reader *= _decay(_between(between_ptr, SINCE, C), token, log_decay, SHARED, KIND)
            S = tl.load(_block(states_ptr, g, h, H, row, key, N, ROWS, KEYS))
            out += dot(reader, tl.trans(S), KIND)
        tl.store(_tile(out_ptr, start, h, H, row, N, C, ROWS), out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["start_ptr", "length_ptr"])
def _gradients(
    r_ptr, w_ptr, k_ptr, v_ptr, u_ptr, dy_ptr, states_ptr, dstates_ptr, between_ptr, start_ptr, length_ptr,
    dr_ptr, dw_ptr, dk_ptr, du_ptr,
    H, N: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SHARED: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Gradients of some columns of r, w and k of one chunk and head; of u, and of w with SHARED, its share (G,H,N).

    `states` are those before the chunks, `dstates` the gradients of those after them.
    """
    parts: tl.constexpr = N // KEYS
    key, pair = tl.program_id(0) % parts * KEYS, tl.program_id(0) // parts
    g, h = pair // H, pair % H
    start, length = tl.load(start_ptr + g), tl.load(length_ptr + g)
    share = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    if length == 0:
        tl.store(du_ptr + share, tl.zeros((KEYS,), tl.float32))
        if SHARED:
            tl.store(dw_ptr + share, tl.zeros((KEYS,), tl.float32))
        return
    token, other = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    inside = token < length

    # through the states
    dr, dk, dend = tl.zeros((C, KEYS), tl.float32), tl.zeros((C, KEYS), tl.float32), tl.zeros((KEYS,), tl.float32)
    dpairs, transposed = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for row in range(0, N, ROWS):
        v = tl.load(_tile(v_ptr, start, h, H, row, N, C, ROWS), mask=inside, other=0.0)
        dy = tl.load(_tile(dy_ptr, start, h, H, row, N, C, ROWS), mask=inside, other=0.0)
        S = tl.load(_block(states_ptr, g, h, H, row, key, N, ROWS, KEYS))
        dS = tl.load(_block(dstates_ptr, g, h, H, row, key, N, ROWS, KEYS))
        dend += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
        dr += dot(dy, S, KIND)
        dk += dot(v, dS, KIND)
        dpairs += dot(dy, tl.trans(v), KIND)
        transposed += dot(v, tl.trans(dy), KIND)
    own = tl.sum(tl.where(token == other, dpairs, 0.0), 1)[:, None]
    dmeet = tl.where(token > other, dpairs, transposed)  # symmetric, as reader and read stand in one tile z
    dmeet = dmeet.to(tl.float32 if KIND == 0 else tl.bfloat16)
    log_decay = _log_decays(w_ptr, start, length, h, H, key, N, C, KEYS, SHARED)
    r = tl.load(_tile(r_ptr, start, h, H, key, N, C, KEYS), mask=inside, other=0.0)
    k = tl.load(_tile(k_ptr, start, h, H, key, N, C, KEYS), mask=inside, other=0.0)
    weights, count = _between(between_ptr, SINCE, C), token
    dr *= _decay(weights, count, log_decay, SHARED, KIND)
    dlog = _log_gradient(between_ptr, SINCE, C, count, dr * r.to(tl.float32), SHARED, KIND)
    weights, count = _between(between_ptr, UNTIL, C), length - 1 - token
    dk *= _decay(weights, count, log_decay, SHARED, KIND)
    dlog += _log_gradient(between_ptr, UNTIL, C, count, dk * k.to(tl.float32), SHARED, KIND)
    dlog += (dend * tl.exp(tl.sum(log_decay, 0)))[None, :]

    # through the token itself
    u = tl.load(u_ptr + h * N + key + tl.arange(0, KEYS)).to(tl.float32)[None, :]
    tl.store(du_ptr + share, tl.sum(own * r.to(tl.float32) * k.to(tl.float32), 0))
    dr += own * u * k.to(tl.float32)
    dk += own * u * r.to(tl.float32)

    # through the pairs
    for level in range(LEVELS):
        half = token >> level
        right = half & 1 == 1
        weights, count = _between(between_ptr, level, C), _half_count(token, level)
        decay = _decay(weights, count, log_decay, SHARED, KIND)
        z = tl.where(right, r, k).to(tl.float32) * decay
        dz = dot(tl.where(other >> level == half ^ 1, dmeet, 0.0), z, KIND)
        dlog += _log_gradient(between_ptr, level, C, count, dz * z, SHARED, KIND)
        dz *= decay
        dr += tl.where(right, dz, 0.0)
        dk += tl.where(right, 0.0, dz)

    tl.store(_tile(dr_ptr, start, h, H, key, N, C, KEYS), dr.to(dr_ptr.dtype.element_ty), mask=inside)
    tl.store(_tile(dk_ptr, start, h, H, key, N, C, KEYS), dk.to(dk_ptr.dtype.element_ty), mask=inside)
    dw = dlog * log_decay
    if SHARED:
        tl.store(dw_ptr + share, tl.sum(dw, 0))
    else:
        tl.store(_tile(dw_ptr, start, h, H, key, N, C, KEYS), dw.to(dw_ptr.dtype.element_ty), mask=inside)
