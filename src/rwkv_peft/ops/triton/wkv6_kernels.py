"""Kernels of `wkv6.py`, where their algebra is told."""

import triton
import triton.language as tl

from .. import reference
from .common import dot

LEVELS = tl.constexpr(6)  # of halves in a chunk
SINCE, UNTIL = LEVELS, tl.constexpr(7)  # from a chunk's start to a token, from a token to the end
TRANSPOSED = tl.constexpr(8)  # the first of the matrices that are transposed
LARGEST_W = tl.constexpr(reference.LARGEST_W)


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
def scan(
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
def output(
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
def gradients(
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
