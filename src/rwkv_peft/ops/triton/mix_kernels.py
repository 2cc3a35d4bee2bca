"""Kernels of `mix.py`.

A vector or gradient that is not there is None in its tuple. Triton 3.6 cannot tell the length of such a tuple, so it is
given as COUNT.
"""

import triton
import triton.language as tl


@triton.jit
def _sum_row(x_ptr, added_ptr, t, columns, D: tl.constexpr):
    """Row t of x + added, rounded as it is stored."""
    at = t * D + columns
    row = tl.load(x_ptr + at, mask=columns < D, other=0.0)
    if added_ptr is not None:
        both = row.to(tl.float32) + tl.load(added_ptr + at, mask=columns < D, other=0.0).to(tl.float32)
        row = both.to(row.dtype)
    return row


@triton.jit
def _normalised(row, weight, bias, columns, eps, D: tl.constexpr):
    """A row's LayerNorm, its mean, and what it was multiplied by."""
    x = row.to(tl.float32)
    mean = tl.sum(x, 0) / D
    centred = tl.where(columns < D, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    return centred * rstd * weight + bias, mean, rstd


@triton.jit
def _vector(pointer, columns, D: tl.constexpr):
    """A vector in float32, 0 beyond D."""
    return tl.load(pointer + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def _row_or_zero(pointer, t, wanted, columns, D: tl.constexpr):
    """Row t in float32, 0 beyond D, and 0 if it is not wanted: it may not be there then."""
    return tl.load(pointer + t * D + columns, mask=(columns < D) & wanted, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "run"])
def norm_mix_forward(
    x_ptr, added_ptr, weight_ptr, bias_ptr, before_ptr, starts_ptr, ends_ptr, vectors,
    total_ptr, mixed, last_ptr, mean_ptr, rstd_ptr, tokens, run, eps, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin, columns = tl.program_id(0).to(tl.int64) * run, tl.arange(0, BLOCK)
    weight, bias = _vector(weight_ptr, columns, D), _vector(bias_ptr, columns, D)
    # of the token before the run; before the first, any: a document starts there
    row = _sum_row(x_ptr, added_ptr, tl.maximum(begin - 1, 0), columns, D)
    previous, _, _ = _normalised(row, weight, bias, columns, eps, D)
    for t in range(begin, min(begin + run, tokens)):
        row = _sum_row(x_ptr, added_ptr, t, columns, D)
        starting, ending = tl.load(starts_ptr + t).to(tl.int64), tl.load(ends_ptr + t).to(tl.int64)
        before = _row_or_zero(before_ptr, starting, starting >= 0, columns, D)
        n, mean, rstd = _normalised(row, weight, bias, columns, eps, D)
        delta = tl.where(starting >= 0, before, previous) - n
        at = t * D + columns
        if total_ptr is not None:
            tl.store(total_ptr + at, row, mask=columns < D)
        for i in tl.static_range(len(mixed)):
            if vectors[i] is None:
                tl.store(mixed[i] + at, n, mask=columns < D)
            else:
                tl.store(mixed[i] + at, n + delta * _vector(vectors[i], columns, D), mask=columns < D)
        tl.store(last_ptr + ending * D + columns, n, mask=(columns < D) & (ending >= 0))
        tl.store(mean_ptr + t, mean)
        tl.store(rstd_ptr + t, rstd)
        previous = n


@triton.jit
def _restored(x_ptr, mean_ptr, rstd_ptr, t, columns, D: tl.constexpr):
    """Row t with mean 0 and variance 1, by what was kept of it."""
    return (_vector(x_ptr + t * D, columns, D) - tl.load(mean_ptr + t)) * tl.load(rstd_ptr + t)


@triton.jit
def _plus(sums, i: tl.constexpr, more):
    """The six sums, the i-th one with `more`."""
    return (
        sums[0] + more if i == 0 else sums[0],
        sums[1] + more if i == 1 else sums[1],
        sums[2] + more if i == 2 else sums[2],
        sums[3] + more if i == 3 else sums[3],
        sums[4] + more if i == 4 else sums[4],
        sums[5] + more if i == 5 else sums[5],
    )


@triton.jit
def _flow_back(vectors, dmixed, t, wanted, columns, COUNT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """What flows from token t's mixes to the token before it."""
    flow = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(COUNT):
        if vectors[i] is not None and dmixed[i] is not None:
            flow += _row_or_zero(dmixed[i], t, wanted, columns, D) * _vector(vectors[i], columns, D)
    return flow


@triton.jit(do_not_specialize=["tokens", "run"])
def norm_mix_backward(  # noqa: PLR0912
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, before_ptr, starts_ptr, ends_ptr, vectors,
    dtotal_ptr, dlast_ptr, dmixed, dx_ptr, dbefore_ptr, norm_sums_ptr, mix_sums_ptr, tokens, run,
    COUNT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    begin, columns = tl.program_id(0).to(tl.int64) * run, tl.arange(0, BLOCK)
    end = min(begin + run, tokens)
    weight, bias = _vector(weight_ptr, columns, D), _vector(bias_ptr, columns, D)
    inside = end < tokens
    flows = inside & (tl.load(starts_ptr + end, mask=inside, other=0) < 0)
    flow = _flow_back(vectors, dmixed, end, flows, columns, COUNT, D, BLOCK)
    xhat = _restored(x_ptr, mean_ptr, rstd_ptr, end - 1, columns, D)
    zeros = tl.zeros((BLOCK,), tl.float32)
    sums, dweight, dbias = (zeros, zeros, zeros, zeros, zeros, zeros), zeros, zeros
    for step in tl.range(0, end - begin, num_stages=STAGES):
        t = end - 1 - step
        starting = tl.load(starts_ptr + t).to(tl.int64)
        rstd = tl.load(rstd_ptr + t)
        at = t * D + columns
        xhat_before = _restored(x_ptr, mean_ptr, rstd_ptr, tl.maximum(t - 1, 0), columns, D)  # the next step's own
        dn, flow = flow, tl.zeros((BLOCK,), tl.float32)
        if mix_sums_ptr is not None:
            before = _row_or_zero(before_ptr, starting, starting >= 0, columns, D)
            delta = tl.where(starting >= 0, before, xhat_before * weight + bias) - (xhat * weight + bias)
        for i in tl.static_range(COUNT):
            if dmixed[i] is not None:
                d = tl.load(dmixed[i] + at, mask=columns < D, other=0.0).to(tl.float32)
                dn += d
                if vectors[i] is not None:
                    flow += d * _vector(vectors[i], columns, D)
                    if mix_sums_ptr is not None:
                        sums = _plus(sums, i, d * delta)
        dn -= flow
        if dlast_ptr is not None:
            ending = tl.load(ends_ptr + t).to(tl.int64)
            dn += _row_or_zero(dlast_ptr, ending, ending >= 0, columns, D)
        if norm_sums_ptr is not None:
            dweight += dn * xhat
            dbias += dn
        g = dn * weight
        mean_g, mean_gx = tl.sum(g, 0) / D, tl.sum(g * xhat, 0) / D
        dx = rstd * (g - mean_g - xhat * mean_gx)
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + at, mask=columns < D, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=columns < D)
        if dbefore_ptr is not None:
            place = dbefore_ptr + starting * D + columns
            tl.store(place, flow, mask=(columns < D) & (starting >= 0))
        flow = tl.where(starting >= 0, 0.0, flow)
        xhat = xhat_before
    if norm_sums_ptr is not None:
        place = norm_sums_ptr + tl.program_id(0) * (2 * D) + columns
        tl.store(place, dweight, mask=columns < D)
        tl.store(place + D, dbias, mask=columns < D)
    if mix_sums_ptr is not None:
        place = mix_sums_ptr + tl.program_id(0) * (COUNT * D) + columns
        for i in tl.static_range(COUNT):
            tl.store(place + i * D, sums[i], mask=columns < D)


@triton.jit(do_not_specialize=["tokens", "run"])
def mix_more_forward(
    n_ptr, before_ptr, more_ptr, starts_ptr, vectors, mixed, tokens, run, D: tl.constexpr, BLOCK: tl.constexpr
):
    begin, columns = tl.program_id(0).to(tl.int64) * run, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    previous = _vector(n_ptr + tl.maximum(begin - 1, 0) * D, columns, D)
    for t in range(begin, min(begin + run, tokens)):
        at = t * D + columns
        n = _vector(n_ptr + t * D, columns, D)
        starting = tl.load(starts_ptr + t).to(tl.int64)
        before = _row_or_zero(before_ptr, starting, starting >= 0, columns, D)
        delta = tl.where(starting >= 0, before, previous) - n
        for i in tl.static_range(len(vectors)):
            more = tl.load(more_ptr + tokens.to(tl.int64) * (i * D) + at, mask=columns < D, other=0.0).to(tl.float32)
            share = _vector(vectors[i], columns, D) + more
            tl.store(mixed[i] + at, n + delta * share, mask=columns < D)
        previous = n


@triton.jit(do_not_specialize=["tokens", "run"])
def mix_more_backward(
    n_ptr, before_ptr, more_ptr, starts_ptr, vectors, dmixed, dn_ptr, dmore_ptr, dbefore_ptr, sums_ptr, tokens, run,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin, columns = tl.program_id(0).to(tl.int64) * run, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = min(begin + run, tokens)
    inside = end < tokens
    flows = inside & (tl.load(starts_ptr + end, mask=inside, other=0) < 0)
    flow = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(len(vectors)):
        if dmixed[i] is not None:
            more = _row_or_zero(more_ptr + tokens.to(tl.int64) * (i * D), end, flows, columns, D)
            flow += _row_or_zero(dmixed[i], end, flows, columns, D) * (_vector(vectors[i], columns, D) + more)
    n = _vector(n_ptr + (end - 1) * D, columns, D)
    zeros = tl.zeros((BLOCK,), tl.float32)
    sums = (zeros, zeros, zeros, zeros, zeros, zeros)
    for step in range(0, end - begin):
        t = end - 1 - step
        at = t * D + columns
        starting = tl.load(starts_ptr + t).to(tl.int64)
        before = _row_or_zero(before_ptr, starting, starting >= 0, columns, D)
        previous = _vector(n_ptr + tl.maximum(t - 1, 0) * D, columns, D)
        delta = tl.where(starting >= 0, before, previous) - n
        dn, flow = flow, tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(len(vectors)):
            more_at = tokens.to(tl.int64) * (i * D) + at
            if dmixed[i] is None:
                tl.store(dmore_ptr + more_at, tl.zeros((BLOCK,), tl.float32), mask=columns < D)
            else:
                d = tl.load(dmixed[i] + at, mask=columns < D, other=0.0).to(tl.float32)
                more = tl.load(more_ptr + more_at, mask=columns < D, other=0.0).to(tl.float32)
                dn += d
                flow += d * (_vector(vectors[i], columns, D) + more)
                tl.store(dmore_ptr + more_at, d * delta, mask=columns < D)
                if sums_ptr is not None:
                    sums = _plus(sums, i, d * delta)
        tl.store(dn_ptr + at, dn - flow, mask=columns < D)
        if dbefore_ptr is not None:
            place = dbefore_ptr + starting * D + columns
            tl.store(place, flow, mask=(columns < D) & (starting >= 0))
        flow = tl.where(starting >= 0, 0.0, flow)
        n = previous
    if sums_ptr is not None:
        place = sums_ptr + tl.program_id(0) * (len(vectors) * D) + columns
        for i in tl.static_range(len(vectors)):
            tl.store(place + i * D, sums[i], mask=columns < D)
