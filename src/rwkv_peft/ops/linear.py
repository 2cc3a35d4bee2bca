"""Products with a frozen matrix and something small beside it, in the fewest passes over the activations.

Each product has the plain formula of `adapters/` and its gradients, but adds into the big product in place, and keeps
for the backward pass its input and what is `rank` wide. Axes: n tokens, I inputs, O outputs, R rank, S shards of R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .matrix import Matrix

HALF = (torch.bfloat16, torch.float16)
# whether a GPU's product of such numbers can be had in float32
ADDS_TO_FLOAT32 = torch.version.cuda is not None and "dtype_out" in torch.ops.aten.addmm.overloads()  # type: ignore[no-untyped-call]


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, keep: bool = True) -> None:
    """total (…,m,k) += scale · a (…,m,n) b (…,n,k), in place and in total's precision; without `keep`, = for +=.

    The matrices have 2 axes, or 3 for a batch of them.
    """
    add = torch.addmm if total.ndim == 2 else torch.baddbmm
    factors: dict[str, Any] = {"beta": 1 if keep else 0, "alpha": scale}
    if total.dtype == a.dtype:
        add(total, a, b, **factors, out=total)
    elif ADDS_TO_FLOAT32 and a.is_cuda and a.dtype in HALF and total.dtype == torch.float32:
        add(total, a, b, out_dtype=total.dtype, **factors, out=total)
    elif keep:
        total.add_(a @ b, alpha=scale)
    else:
        torch.mul(a @ b, scale, out=total)


def low_rank_linear(
    x: Tensor, matrix: Matrix, A: Tensor, B: Tensor, scale: float, start: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """x Wᵀ + scale · x Aᵀ Bᵀ, or with `start` (A0, B0), which are frozen and like A and B: … - scale · x A0ᵀ B0ᵀ.

    W (O,I) is the frozen `matrix`; the products have the dtype of x (…,I). A (R,I) and B (O,R) may be float32, and then
    their gradients are. Sources: LoRA arXiv 2106.09685, PiSSA 2404.02948.
    """
    a, b = A.detach().to(x.dtype), torch.mul(B.detach(), scale, out=torch.empty_like(B, dtype=x.dtype))
    if start is not None:
        a = torch.cat((a, start[0].to(x.dtype)))
        b = torch.cat((b, torch.mul(start[1], -scale, out=torch.empty_like(start[1], dtype=x.dtype))), dim=1)
    inner: Tensor = _Inner.apply(x, A, B, a, b)  # type: ignore[no-untyped-call]
    y: Tensor = _LowRank.apply(x, inner, A, B, matrix, b, scale)  # type: ignore[no-untyped-call]
    return y


class _Inner(torch.autograd.Function):
    """x aᵀ. Keeps what the gradients of the whole product need, which `_LowRank` then makes.

    Apart from the big product, so that a checkpoint need not repeat that one to have these again. They are saved, and
    not just held, since a checkpoint lets go of nothing else.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, a: Tensor, b: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.T
        _, needs_a, needs_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(rows if needs_a else None, inner if needs_b else None, a, b)
        return inner

    @staticmethod
    def backward(ctx: Any, d_inner: Tensor) -> tuple[None, ...]:
        return None, None, None, None, None


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inner: Tensor, A: Tensor, B: Tensor, matrix: Matrix, b: Tensor, scale: float
    ) -> Tensor:
        ctx.kept, ctx.matrix = inner.grad_fn, matrix
        ctx.shape, ctx.A, ctx.B, ctx.scale = x.shape, _form(A), _form(B), scale
        y = matrix.times(x.reshape(-1, x.shape[-1])).addmm_(inner, b.T)
        return y.view(*x.shape[:-1], matrix.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, a, b = ctx.kept.saved_tensors
        needs_x, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        dx = dA = dB = None
        dy = dy.reshape(-1, dy.shape[-1])
        if needs_x or needs_a:
            d_inner = dy @ b
        if needs_x:
            dx = ctx.matrix.back(dy).addmm_(d_inner, a).view(ctx.shape)
        if needs_a:
            dA = _empty(dy, ctx.A)
            add_product(dA, d_inner[:, : len(dA)].T, rows, keep=False)
        if needs_b:
            dB = _empty(dy, ctx.B)
            add_product(dB, dy.T, inner[:, : dB.shape[1]], ctx.scale, keep=False)
        return dx, None, dA, dB, None, None, None


def bone_linear(x: Tensor, matrix: Matrix, block: Tensor) -> Tensor:
    """x Wᵀ + Σ_s x_s D, where x_s are the shards of x, R wide, the last perhaps shorter; D = `block` (R,O).

    W (O,I) is the frozen `matrix`; the products have the dtype of x (…,I). D may be float32, and then its gradient is.
    Source: arXiv 2409.15371.
    """
    d = block.detach().to(x.dtype)
    total: Tensor = _ShardSum.apply(x, block, d)  # type: ignore[no-untyped-call]
    y: Tensor = _Bone.apply(x, total, block, matrix, d)  # type: ignore[no-untyped-call]
    return y


class _ShardSum(torch.autograd.Function):
    """Σ_s x_s (n,R), kept for the gradient of D, which `_Bone` makes; apart from it for `_Inner`'s reasons."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Tensor, d: Tensor) -> Tensor:
        total = sum_of_shards(x.reshape(-1, x.shape[-1]), len(block))
        ctx.save_for_backward(total if ctx.needs_input_grad[1] else None, d)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[None, ...]:
        return None, None, None


class _Bone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Tensor, block: Tensor, matrix: Matrix, d: Tensor) -> Tensor:
        ctx.kept, ctx.matrix = total.grad_fn, matrix
        ctx.shape, ctx.block = x.shape, _form(block)
        y = matrix.times(x.reshape(-1, x.shape[-1])).addmm_(total, d)
        return y.view(*x.shape[:-1], matrix.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        total, d = ctx.kept.saved_tensors
        needs_x, _, needs_block, *_ = ctx.needs_input_grad
        dx = d_block = None
        dy = dy.reshape(-1, dy.shape[-1])
        if needs_x:
            dx = ctx.matrix.back(dy)
            add_to_shards(dx, dy @ d.T)
            dx = dx.view(ctx.shape)
        if needs_block:
            d_block = _empty(dy, ctx.block)
            add_product(d_block, total.T, dy, keep=False)
        return dx, None, d_block, None, None


def bat_linear(x: Tensor, matrix: Matrix, blocks: Tensor) -> Tensor:
    """(x + z) Wᵀ + the sum of z's shards, side by side O/R times; z_s = D_s x_s for the S shards; D = `blocks` (S,R,R).

    W (O,I) is the frozen `matrix`; the products have the dtype of x (…,I). D may be float32, and then its gradient is.
    R divides I and O.
    """
    y: Tensor = _Bat.apply(x, matrix, blocks)  # type: ignore[no-untyped-call]
    return y


class _Bat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix, blocks: Tensor) -> Tensor:
        rows, d = x.reshape(-1, x.shape[-1]), blocks.to(x.dtype)
        shards = _by_shard(rows, d.shape[1])  # (S,n,R)
        through = torch.empty_like(rows)
        torch.baddbmm(shards, shards, d.mT, out=_by_shard(through, d.shape[1]))
        y = matrix.times(through)
        add_to_shards(y, rows @ d.mT.flatten(0, 1))  # (S·R,R): the sum over shards is within the product
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, d)
        ctx.shape, ctx.blocks, ctx.matrix = x.shape, _form(blocks), matrix
        return y.view(*x.shape[:-1], matrix.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, d = ctx.saved_tensors
        needs_x, _, needs_blocks = ctx.needs_input_grad
        rank, dx, d_blocks = d.shape[1], None, None
        dy = dy.reshape(-1, dy.shape[-1])
        through = ctx.matrix.back(dy)
        dz = _by_shard(through, rank) + sum_of_shards(dy, rank)  # (S,n,R)
        if needs_blocks:
            d_blocks = _empty(dy, ctx.blocks)
            add_product(d_blocks, dz.mT, _by_shard(rows, rank), keep=False)
        if needs_x:
            _by_shard(through, rank).baddbmm_(dz, d)
            dx = through.view(ctx.shape)
        return dx, None, d_blocks


def sum_of_shards(rows: Tensor, rank: int) -> Tensor:
    """(n,I) → (n,R), the sum of all parts R wide; a shorter last one adds to the first of the R."""
    whole = rows.shape[1] - rows.shape[1] % rank
    total = rows[:, :whole].view(len(rows), whole // rank, rank).sum(1)
    if whole < rows.shape[1]:
        total[:, : rows.shape[1] - whole] += rows[:, whole:]
    return total


def add_to_shards(rows: Tensor, part: Tensor) -> None:
    """Add the same `part` (n,R) to every part R wide of `rows` (n,I), in place; the last may be shorter."""
    rank = part.shape[1]
    whole = rows.shape[1] - rows.shape[1] % rank
    rows[:, :whole].view(len(rows), whole // rank, rank).add_(part[:, None])
    if whole < rows.shape[1]:
        rows[:, whole:] += part[:, : rows.shape[1] - whole]


def _by_shard(rows: Tensor, rank: int) -> Tensor:
    """(n,I) seen as (S,n,R)."""
    return rows.view(len(rows), rows.shape[1] // rank, rank).transpose(0, 1)


def _form(x: Tensor) -> tuple[torch.Size, torch.dtype]:
    return x.shape, x.dtype


def _empty(like: Tensor, form: tuple[torch.Size, torch.dtype]) -> Tensor:
    """On the device of `like`."""
    return like.new_empty(form[0], dtype=form[1])
