"""Kernels of `core7.py`: what lies before and after RWKV-7's operator. Formulas: `pieces.core7`.

A program takes HEADS neighbouring heads and walks over `run` tokens, a tile of ROWS pairs of token and head at a time;
meanwhile it adds up the gradients of the vectors, and leaves one partial sum of each. All math is in float32.

Axes: B rows, T tokens, D width, H heads, N head size.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _over_head(x):
    return tl.sum(x, 1)[:, None]


@triton.jit
def _load(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _vector(ptr, channel):
    return tl.load(ptr + channel).to(tl.float32)


@triton.jit
def _place(run, H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Where this program begins: its first token and that token's offset; a tile's tokens from there and channels."""
    row = tl.arange(0, ROWS)[:, None]
    channel = (tl.program_id(0) * HEADS + row % HEADS) * N + tl.arange(0, N)[None, :]
    first = tl.program_id(1) * run
    return first, first.to(tl.int64) * (H * N), row // HEADS, channel


@triton.jit
def _put_sum(sums, slot, x, H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Write x (ROWS,N) summed over its tokens as this program's part of a row of sums (SLOTS, runs, D)."""
    total = tl.sum(tl.reshape(x, (ROWS // HEADS, HEADS * N)), 0)
    row = (slot * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (H * N)
    tl.store(sums + row + tl.program_id(0) * (HEADS * N) + tl.arange(0, HEADS * N), total)


@triton.jit
def _normalise(x):
    """x divided by its head's norm, and what it was divided by; as torch.nn.functional.normalize."""
    norm = tl.maximum(tl.sqrt(_over_head(x * x)), 1e-12)
    return x / norm, norm


@triton.jit
def _standardise(y, eps, N: tl.constexpr):
    """y less its head's mean, over the deviation; and the inverse of that."""
    centred = y - _over_head(y) / N
    scale = 1.0 / tl.sqrt(_over_head(centred * centred) / N + eps)
    return centred * scale, scale


@triton.jit
def _make(
    k_ptr, v_ptr, w_low, a_low, v_low, v_first, at, inside, w0, a0, v0, k_k, k_a,
    w_out, k_out, v_out, kk_out, iclr_out, FIRST: tl.constexpr,
):  # fmt: skip
    """Make and store a tile of the operator's inputs; its k and v."""
    k, v = _load(k_ptr, at, inside), _load(v_ptr, at, inside)
    w = -_softplus(-(w0 + _load(w_low, at, inside))) - 0.5
    tl.store(w_out + at, w, mask=inside)
    kk, _ = _normalise(k * k_k)
    tl.store(kk_out + at, kk, mask=inside)
    iclr = _sigmoid(a0 + _load(a_low, at, inside))
    tl.store(iclr_out + at, iclr, mask=inside)
    k = k * (1.0 + (iclr - 1.0) * k_a)
    tl.store(k_out + at, k, mask=inside)
    if not FIRST:
        v += (_load(v_first, at, inside) - v) * _sigmoid(v0 + _load(v_low, at, inside))
        tl.store(v_out + at, v, mask=inside)
    return k, v


@triton.jit
def prepare(
    k_ptr, v_ptr, w_low, a_low, v_low, v_first, w0_ptr, a0_ptr, v0_ptr, k_k_ptr, k_a_ptr,
    w_out, k_out, v_out, kk_out, iclr_out,
    tokens, run, H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    first, home, token, channel = _place(run, H, N, HEADS, ROWS)
    w0, a0 = _vector(w0_ptr, channel), _vector(a0_ptr, channel)
    k_k, k_a = _vector(k_k_ptr, channel), _vector(k_a_ptr, channel)
    v0 = a0 if FIRST else _vector(v0_ptr, channel)
    for start in range(0, run, ROWS // HEADS):
        at, inside = home + (start + token) * (H * N) + channel, first + start + token < tokens
        _make(
            k_ptr, v_ptr, w_low, a_low, v_low, v_first, at, inside, w0, a0, v0, k_k, k_a,
            w_out, k_out, v_out, kk_out, iclr_out, FIRST,
        )  # fmt: skip


@triton.jit
def finish(
    y_ptr, r_ptr, k_ptr, v_ptr, gate_ptr, r_k_ptr, weight_ptr, bias_ptr, out_ptr, eps,
    tokens, run, H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first, home, token, channel = _place(run, H, N, HEADS, ROWS)
    r_k, weight, bias = _vector(r_k_ptr, channel), _vector(weight_ptr, channel), _vector(bias_ptr, channel)
    for start in range(0, run, ROWS // HEADS):
        at, inside = home + (start + token) * (H * N) + channel, first + start + token < tokens
        y, _ = _standardise(_load(y_ptr, at, inside), eps, N)
        strength = _over_head(_load(r_ptr, at, inside) * _load(k_ptr, at, inside) * r_k)
        out = y * weight + bias + strength * _load(v_ptr, at, inside)
        tl.store(out_ptr + at, out * _load(gate_ptr, at, inside), mask=inside)


@triton.jit
def finish_backward(
    k_ptr, v_ptr, w_low, a_low, v_low, v_first, w0_ptr, a0_ptr, v0_ptr, k_k_ptr, k_a_ptr,
    w_out, k_out, v_out, kk_out, iclr_out, y_ptr, r_ptr, gate_ptr, r_k_ptr, weight_ptr, bias_ptr,
    dout_ptr, dy_ptr, dgate_ptr, dr_ptr, dk_ptr, dv_ptr, sums, eps,
    tokens, run, H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    FIRST: tl.constexpr, KEPT: tl.constexpr, TRAIN: tl.constexpr,
):  # fmt: skip
    """Unless KEPT, the operator's inputs are made and stored; dr, dk, dv are those of the bonus alone."""
    first, home, token, channel = _place(run, H, N, HEADS, ROWS)
    r_k, weight, bias = _vector(r_k_ptr, channel), _vector(weight_ptr, channel), _vector(bias_ptr, channel)
    if not KEPT:
        w0, a0 = _vector(w0_ptr, channel), _vector(a0_ptr, channel)
        k_k, k_a = _vector(k_k_ptr, channel), _vector(k_a_ptr, channel)
        v0 = a0 if FIRST else _vector(v0_ptr, channel)
    if TRAIN:
        nothing = tl.zeros((ROWS, N), tl.float32)
        dr_k, dweight, dbias = nothing, nothing, nothing
    for start in range(0, run, ROWS // HEADS):
        at, inside = home + (start + token) * (H * N) + channel, first + start + token < tokens
        if KEPT:
            k, v = _load(k_out, at, inside), _load(v_out, at, inside)
        else:
            k, v = _make(
                k_ptr, v_ptr, w_low, a_low, v_low, v_first, at, inside, w0, a0, v0, k_k, k_a,
                w_out, k_out, v_out, kk_out, iclr_out, FIRST,
            )  # fmt: skip
        y, scale = _standardise(_load(y_ptr, at, inside), eps, N)
        r, dout = _load(r_ptr, at, inside), _load(dout_ptr, at, inside)
        strength = _over_head(r * k * r_k)
        tl.store(dgate_ptr + at, dout * (y * weight + bias + strength * v), mask=inside)
        dsum = dout * _load(gate_ptr, at, inside)  # of normalised y plus bonus
        dstrength = _over_head(dsum * v)
        tl.store(dv_ptr + at, strength * dsum, mask=inside)
        tl.store(dr_ptr + at, dstrength * k * r_k, mask=inside)
        tl.store(dk_ptr + at, dstrength * r * r_k, mask=inside)
        dy = dsum * weight
        dy = scale * (dy - _over_head(dy) / N - y * (_over_head(dy * y) / N))
        tl.store(dy_ptr + at, dy, mask=inside)
        if TRAIN:
            dr_k += dstrength * r * k
            dweight += dsum * y
            dbias += dsum
    if TRAIN:
        _put_sum(sums, 5, dr_k, H, N, HEADS, ROWS)
        _put_sum(sums, 6, dweight, H, N, HEADS, ROWS)
        _put_sum(sums, 7, dbias, H, N, HEADS, ROWS)


@triton.jit
def prepare_backward(
    k_ptr, v_ptr, w_low, a_low, v_low, v_first, w0_ptr, a0_ptr, v0_ptr, k_k_ptr, k_a_ptr,
    dw_ptr, dk_ptr, dv_ptr, dkk_ptr, diclr_ptr, dv_first_ptr, dlater_ptr, sums,
    tokens, run, H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    FIRST: tl.constexpr, TRAIN: tl.constexpr,
):  # fmt: skip
    """In place: dw, dk, dv and diclr become those of w_low, k, v and a_low; dkk becomes that of v_low."""
    first, home, token, channel = _place(run, H, N, HEADS, ROWS)
    w0, a0 = _vector(w0_ptr, channel), _vector(a0_ptr, channel)
    k_k, k_a = _vector(k_k_ptr, channel), _vector(k_a_ptr, channel)
    if not FIRST:
        v0 = _vector(v0_ptr, channel)
    if TRAIN:
        nothing = tl.zeros((ROWS, N), tl.float32)
        dw0, da0, dv0, dk_k, dk_a = nothing, nothing, nothing, nothing, nothing
    for start in range(0, run, ROWS // HEADS):
        at, inside = home + (start + token) * (H * N) + channel, first + start + token < tokens
        dw = _load(dw_ptr, at, inside) * _sigmoid(-(w0 + _load(w_low, at, inside)))
        tl.store(dw_ptr + at, dw, mask=inside)

        k, dk = _load(k_ptr, at, inside), _load(dk_ptr, at, inside)
        kk, norm = _normalise(k * k_k)
        dkk = _load(dkk_ptr, at, inside)
        dkk = (dkk - tl.where(norm > 1e-12, kk * _over_head(kk * dkk), 0.0)) / norm  # from here on, of k·k_k
        iclr = _sigmoid(a0 + _load(a_low, at, inside))
        da = (_load(diclr_ptr, at, inside) + dk * k * k_a) * iclr * (1.0 - iclr)
        tl.store(diclr_ptr + at, da, mask=inside)
        tl.store(dk_ptr + at, dk * (1.0 + (iclr - 1.0) * k_a) + dkk * k_k, mask=inside)
        if TRAIN:
            dw0 += dw
            da0 += da
            dk_k += dkk * k
            dk_a += dk * k * (iclr - 1.0)

        if FIRST:
            if dlater_ptr is not None:
                dv = _load(dv_ptr, at, inside) + _load(dlater_ptr, at, inside)
                tl.store(dv_ptr + at, dv, mask=inside)
        else:
            dv = _load(dv_ptr, at, inside)
            share = _sigmoid(v0 + _load(v_low, at, inside))
            rest = _load(v_first, at, inside) - _load(v_ptr, at, inside)
            dshare = dv * rest * share * (1.0 - share)
            tl.store(dkk_ptr + at, dshare, mask=inside)
            tl.store(dv_ptr + at, dv * (1.0 - share), mask=inside)
            if dv_first_ptr is not None:
                dv_first = dv * share
                if dlater_ptr is not None:
                    dv_first += _load(dlater_ptr, at, inside)
                tl.store(dv_first_ptr + at, dv_first, mask=inside)
            if TRAIN:
                dv0 += dshare
    if TRAIN:
        _put_sum(sums, 0, dw0, H, N, HEADS, ROWS)
        _put_sum(sums, 1, da0, H, N, HEADS, ROWS)
        _put_sum(sums, 3, dk_k, H, N, HEADS, ROWS)
        _put_sum(sums, 4, dk_a, H, N, HEADS, ROWS)
        if not FIRST:
            _put_sum(sums, 2, dv0, H, N, HEADS, ROWS)
