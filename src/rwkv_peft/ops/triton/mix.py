"""A LayerNorm, the token shift and all mixes with the token before in one pass; and RWKV-6's further mixes.

A program walks over a run of tokens and holds the row of the neighbour: forward the one before, backward what flows
back from the one behind. Only the input, its mean and its deviation are kept for backward. The gradients of vectors
are summed in each program and left as one partial sum each.

Axes: B rows, T tokens, D width, S documents, P programs. Formulas: `pieces.norm_mix` and `pieces.mix_more`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import pieces
from ..pieces import Documents, Vectors
from .activations import fits

MOST_MIXES = 6
WIDEST = 16384
PROGRAMS = 2112  # 16 for each of an H100's processors
SUMMING = 528  # programs that leave partial sums, each of at least so many tokens
LEAST_RUN = 8
COLUMNS = 1024  # of a program that needs no whole row

Gradients = tuple[Tensor | None, ...]


def norm_mix(
    x: Tensor, added: Tensor | None, norm: nn.Module, before: Tensor, documents: Documents, vectors: Vectors
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """The same function as `pieces.norm_mix`: arguments, shapes and results are described there."""
    known = fits(x) if added is None else fits(x, added)
    if not (known and pieces.is_plain(norm) and x.shape[-1] <= WIDEST and len(vectors) <= MOST_MIXES):
        return pieces.norm_mix(x, added, norm, before, documents, vectors)
    where = _Where(documents.starts, documents.ends, documents.cu_seqlens is not None, norm.eps)  # type: ignore[arg-type]
    arguments = (x, added, norm.weight, norm.bias, before, where, *vectors)
    x, last, *mixed = _NormMix.apply(*arguments)
    return x, tuple(mixed), last


def mix_more(
    n: Tensor, before: Tensor, documents: Documents, vectors: Sequence[Tensor], more: Tensor
) -> tuple[Tensor, ...]:
    """The same function as `pieces.mix_more`: arguments, shapes and results are described there."""
    if not fits(n, more):
        return pieces.mix_more(n, before, documents, vectors, more)
    where = _Where(documents.starts, documents.ends, documents.cu_seqlens is not None, 0.0)
    return _MixMore.apply(n, before, more, where, *vectors)  # type: ignore[no-any-return]


class _Where(NamedTuple):
    starts: Tensor  # (B*T,)
    ends: Tensor
    may_be_empty: bool  # a document
    eps: float


class _NormMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        before: Tensor,
        where: _Where,
        *vectors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        x, before, tokens, D = x.contiguous(), before.contiguous(), len(where.starts), x.shape[-1]
        total = x if added is None else torch.empty_like(x)
        mixed = tuple(torch.empty_like(x) for _ in vectors)
        last = before.to(x.dtype, copy=True) if where.may_be_empty else torch.empty_like(before, dtype=x.dtype)
        mean, rstd = x.new_empty(2, tokens, dtype=torch.float32)
        run = triton.cdiv(tokens, PROGRAMS)
        block = triton.next_power_of_2(D)
        _norm_mix_forward[(triton.cdiv(tokens, run),)](
            *(x, None if added is None else added.contiguous(), weight, bias, before, where.starts, where.ends),
            *(vectors, None if added is None else total, mixed, last, mean, rstd, tokens, run, where.eps),
            **{"D": D, "BLOCK": block, "num_warps": _warps(block, 16)},
        )
        ctx.save_for_backward(total, mean, rstd, weight, bias, before, *vectors)
        ctx.where = where
        return total, last, *mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor | None, dlast: Tensor | None, *dmixed: Tensor | None) -> Gradients:
        x, mean, rstd, weight, bias, before, *vectors = ctx.saved_tensors
        where, needs, (tokens, D) = ctx.where, ctx.needs_input_grad, (len(mean), x.shape[-1])
        summed = any(needs[2:4]), any(needs[6:])  # of the norm, of the mixes
        run, block = triton.cdiv(tokens, SUMMING if any(summed) else PROGRAMS), triton.next_power_of_2(D)
        if any(summed):
            run = max(run, LEAST_RUN)
        programs = triton.cdiv(tokens, run)
        norm_sums = x.new_empty(programs, 2, D, dtype=torch.float32) if summed[0] else None
        mix_sums = x.new_empty(programs, len(vectors), D, dtype=torch.float32) if summed[1] else None
        dx, dbefore = torch.empty_like(x), _empty_before(before, dlast, where) if needs[4] else None
        _norm_mix_backward[(programs,)](
            *(x, mean, rstd, weight, bias, before, where.starts, where.ends, tuple(vectors)),
            *(_contiguous(dtotal), _contiguous(dlast), tuple(_contiguous(d) for d in dmixed)),
            *(dx, dbefore, norm_sums, mix_sums, tokens, run),
            **{"D": D, "BLOCK": block, **_resources(block, len(vectors) if any(summed) else 0)},
        )
        dweight, dbias = (None, None) if norm_sums is None else norm_sums.sum(0).to(weight.dtype)
        dadded = dx if needs[1] else None
        return dx, dadded, dweight, dbias, dbefore, None, *_vector_gradients(mix_sums, vectors, needs[6:])


class _MixMore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, n: Tensor, before: Tensor, more: Tensor, where: _Where, *vectors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        n, before, more, tokens, D = n.contiguous(), before.contiguous(), more.contiguous(), *_flat(n)
        mixed = tuple(torch.empty_like(n) for _ in vectors)
        run, grid, sizes = _columns(tokens, D, PROGRAMS)
        _mix_more_forward[grid](n, before, more, where.starts, vectors, mixed, tokens, run, **sizes)
        ctx.save_for_backward(n, before, more, *vectors)
        ctx.where = where
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dmixed: Tensor | None) -> Gradients:
        n, before, more, *vectors = ctx.saved_tensors
        where, needs, (tokens, D) = ctx.where, ctx.needs_input_grad, _flat(n)
        dn, dmore = torch.empty_like(n), torch.empty_like(more)
        dbefore = _empty_before(before, None, where) if needs[1] else None
        run, grid, sizes = _columns(tokens, D, SUMMING)
        sums = n.new_empty(grid[0], len(vectors), D, dtype=torch.float32) if any(needs[4:]) else None
        _mix_more_backward[grid](
            *(n, before, more, where.starts, tuple(vectors), tuple(_contiguous(d) for d in dmixed)),
            *(dn, dmore, dbefore, sums, tokens, run),
            **sizes,
        )
        return dn, dbefore, dmore, None, *_vector_gradients(sums, vectors, needs[4:])


def _flat(x: Tensor) -> tuple[int, int]:
    """B*T and D."""
    return x.shape[0] * x.shape[1], x.shape[2]


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _warps(block: int, each: int) -> int:
    """Warps for a row, so that a thread has `each` of its elements."""
    return max(1, min(16, block // (32 * each)))


def _resources(block: int, sums: int) -> dict[str, int]:
    """How the backward of a row runs; with sums for some mixes, few programs fit a processor and must load ahead."""
    if not sums:
        return {"STAGES": 1, "num_warps": _warps(block, 16)}
    if block > 2048:
        return {"STAGES": 1, "num_warps": _warps(block, 4)}
    return {"STAGES": 3, "num_warps": _warps(block, 4)} if sums > 2 else {"STAGES": 2, "num_warps": _warps(block, 8)}


def _columns(tokens: int, D: int, programs: int) -> tuple[int, tuple[int, int], dict[str, int]]:
    """Tokens of a program, the programs (P, blocks of columns), and the sizes that are compiled in."""
    block = min(COLUMNS, triton.next_power_of_2(D))
    blocks = triton.cdiv(D, block)
    run = triton.cdiv(tokens * blocks, programs)
    return run, (triton.cdiv(tokens, run), blocks), {"D": D, "BLOCK": block, "num_warps": _warps(block, 8)}


def _empty_before(before: Tensor, dlast: Tensor | None, where: _Where) -> Tensor:
    """Room for the gradient of `before`; an empty document's is that of its last token."""
    if not where.may_be_empty:
        return torch.empty_like(before)
    return torch.zeros_like(before) if dlast is None else dlast.to(before.dtype, copy=True)


def _vector_gradients(sums: Tensor | None, vectors: Sequence[Tensor | None], needs: Sequence[bool]) -> Gradients:
    """Partial sums (P,·,D) → the gradient of each vector that needs one, in its shape and dtype."""
    if sums is None:
        return (None,) * len(vectors)
    totals = zip(sums.sum(0), vectors, needs, strict=True)
    return tuple(total.view_as(v).to(v.dtype) if v is not None and need else None for total, v, need in totals)


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
def _norm_mix_forward(
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
        for i in tl.static_range(len(vectors)):
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
def _flow_back(vectors, dmixed, t, wanted, columns, D: tl.constexpr, BLOCK: tl.constexpr):
    """What flows from token t's mixes to the token before it."""
    flow = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(len(vectors)):
        if vectors[i] is not None and dmixed[i] is not None:
            flow += _row_or_zero(dmixed[i], t, wanted, columns, D) * _vector(vectors[i], columns, D)
    return flow


@triton.jit(do_not_specialize=["tokens", "run"])
def _norm_mix_backward(  # noqa: PLR0912
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, before_ptr, starts_ptr, ends_ptr, vectors,
    dtotal_ptr, dlast_ptr, dmixed, dx_ptr, dbefore_ptr, norm_sums_ptr, mix_sums_ptr, tokens, run,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    begin, columns = tl.program_id(0).to(tl.int64) * run, tl.arange(0, BLOCK)
    end = min(begin + run, tokens)
    weight, bias = _vector(weight_ptr, columns, D), _vector(bias_ptr, columns, D)
    inside = end < tokens
    flows = inside & (tl.load(starts_ptr + end, mask=inside, other=0) < 0)
    flow = _flow_back(vectors, dmixed, end, flows, columns, D, BLOCK)
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
        for i in tl.static_range(len(vectors)):
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
        place = mix_sums_ptr + tl.program_id(0) * (len(vectors) * D) + columns
        for i in tl.static_range(len(vectors)):
            tl.store(place + i * D, sums[i], mask=columns < D)


@triton.jit(do_not_specialize=["tokens", "run"])
def _mix_more_forward(
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
def _mix_more_backward(
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
