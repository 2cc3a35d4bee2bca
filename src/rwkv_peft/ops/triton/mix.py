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
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import pieces
from ..pieces import Documents, Vectors
from . import mix_kernels as kernels
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
        kernels.norm_mix_forward[(triton.cdiv(tokens, run),)](
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
        kernels.norm_mix_backward[(programs,)](
            *(x, mean, rstd, weight, bias, before, where.starts, where.ends, tuple(vectors)),
            *(_contiguous(dtotal), _contiguous(dlast), tuple(_contiguous(d) for d in dmixed)),
            *(dx, dbefore, norm_sums, mix_sums, tokens, run),
            **{"COUNT": len(vectors), "D": D, "BLOCK": block, **_resources(block, len(vectors) if any(summed) else 0)},
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
        kernels.mix_more_forward[grid](n, before, more, where.starts, vectors, mixed, tokens, run, **sizes)
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
        kernels.mix_more_backward[grid](
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
