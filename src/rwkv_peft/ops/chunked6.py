"""The recurrences of RWKV-5 and RWKV-6 in matrix products over chunks of tokens, with their own backward.

From chunk to chunk the state decays and receives `vᵀ k`, every k decayed to the chunk's end. Inside a chunk, token t
reads token j through the decays between them. RWKV-6 bounds no decay, so a product of decays may be 0 and nothing may
be divided by one: a tree of halves multiplies instead. In every block of 2, 4, 8, … tokens the right half reads the
left; its r carries the decays since the boundary, the left half's k those up to it, and the next level multiplies both
by the decay over the whole other half. All factors are exp of sums of negative numbers. The gradient of each logarithm
is gathered by the same tree, never as a difference of large sums.

Axes: B batch, T tokens, H heads, N head size, S documents, C chunk length, G chunks of all documents together,
h tokens of a half, n blocks of two halves in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .layout import Chunks, lay_out, scan, scan_back, to_chunks, to_tokens

CHUNK = 32  # a power of two; 64 is as fast and keeps half the states, but pads short documents more


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
    w = w.to(torch.promote_types(r.dtype, torch.float32)).expand(r.shape)
    return wkv6(r, w, k, v, u, initial_state, cu_seqlens)


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `reference.wkv6`: arguments, shapes and results are described there."""
    if r.shape[1] == 1 and cu_seqlens is None:  # a chunk of one token is the recurrence itself
        return reference.wkv6(r, w, k, v, u, initial_state)
    chunks, initial_state = lay_out(r, initial_state, cu_seqlens, _chunk_length)
    y, final_state = _Wkv6.apply(r, w, k, v, u, initial_state, chunks)  # type: ignore[no-untyped-call]
    return y, final_state


def _chunk_length(longest: int) -> int:
    return min(CHUNK, 1 << (longest - 1).bit_length())


class _Level(NamedTuple):
    """One level of the tree, h tokens reading h tokens; each (G,H,n,·,N)."""

    reader: Tensor  # (h,N) r of the right halves, with the decays since the boundary
    writer: Tensor  # (h,N) k of the left halves, with the decays up to the boundary
    left: Tensor  # (1,N) decay over the whole left half
    right: Tensor  # (1,N) decay over the whole right half


class _Local(NamedTuple):
    """What a chunk computes without knowing the state; each (G,H,·,N)."""

    raw: tuple[Tensor, ...]  # r k v: (C,N)
    log_decay: Tensor  # (C,N)
    levels: list[_Level]
    reader: Tensor  # (C,N) r with the decays since the chunk's start
    writer: Tensor  # (C,N) k with the decays up to the chunk's end
    end: Tensor  # (1,N) decay over the whole chunk


class _Wkv6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *inputs, u, initial_state, chunks = args
        local = _local(inputs, chunks)
        r, k, v = local.raw
        injected = v.mT @ local.writer  # S' = S·end + injected
        states, final_state = scan(initial_state.to(v.dtype), injected, _carry(local.end, injected), chunks)
        y = local.reader @ states.mT
        y.addcmul_(r * k @ u.to(v.dtype)[..., None], v)  # a token reads itself through the bonus
        for reader, writer, *_ in local.levels:
            right = _halves(y, reader.shape[-2])[1]
            right += reader @ writer.mT @ _halves(v, reader.shape[-2])[0]
        ctx.save_for_backward(*inputs, u, states)
        ctx.chunks, ctx.state_dtype = chunks, initial_state.dtype
        return to_tokens(y, chunks, inputs[0]), final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, u, S = ctx.saved_tensors
        chunks: Chunks = ctx.chunks
        local = _local(inputs, chunks)
        r, k, v = local.raw
        dY = to_chunks(dy.to(v.dtype), chunks)
        own_dS = dY.mT @ local.reader
        dnext, dinitial = scan_back(dfinal.to(v.dtype), own_dS, _carry(local.end, own_dS), chunks)
        dv = local.writer @ dnext.mT
        dend = (dnext * S).sum(-2, keepdim=True) * local.end  # of the logarithm
        dr, dk, dlog_decay = _back_through_tree(local, dY, dv, dY @ S, v @ dnext, dend)

        rk, bonus = r * k, u.to(v.dtype)[..., None]  # (G,H,C,N), (H,N,1)
        dv.addcmul_(rk @ bonus, dY)
        own = (dY * v).sum(-1, keepdim=True)
        drk = own * bonus.mT
        dr.addcmul_(drk, k)
        dk.addcmul_(drk, r)
        du = (own.mT @ rk).sum(0).squeeze(1)
        gradients = dr, dlog_decay * local.log_decay, dk, dv
        in_tokens = (to_tokens(d, chunks, x) for d, x in zip(gradients, inputs, strict=True))
        return *in_tokens, du.to(u.dtype), dinitial.to(ctx.state_dtype), None


def _local(inputs: list[Tensor], chunks: Chunks) -> _Local:
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    r, w, k, v = (to_chunks(x.to(dtype), chunks) for x in inputs)
    log_decay = w.clamp_(max=reference.LARGEST_W).exp_().neg_()
    if chunks.empty is not None:
        log_decay.masked_fill_(chunks.empty, 0.0)
    reader, writer, total, levels = r.clone(), k.clone(), log_decay, []
    while total.shape[-2] > 1:
        half = r.shape[-2] // total.shape[-2]
        left, right = (x.exp() for x in _halves(total, 1))
        of_right, of_left = _halves(reader, half)[1], _halves(writer, half)[0]
        levels.append(_Level(of_right.clone(), of_left.clone(), left, right))
        of_right *= left
        of_left *= right
        total = total[..., ::2, :] + total[..., 1::2, :]
    return _Local((r, k, v), log_decay, levels, reader, writer, total.exp())


def _carry(end: Tensor, added: Tensor) -> Callable[[Tensor, slice], Tensor]:
    return lambda state, now: torch.addcmul(added[now], state, end[now])


def _back_through_tree(
    local: _Local, dY: Tensor, dv: Tensor, dreader: Tensor, dwriter: Tensor, dtotal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From gradients of a chunk's reader, writer and log decay, and of y, to those of r, k and log_decay.

    Changes the first two, and adds to `dv`.
    """
    v = local.raw[2]
    for reader, writer, left, right in reversed(local.levels):
        h = reader.shape[-2]
        of_right, of_left = _halves(dreader, h)[1], _halves(dwriter, h)[0]
        of_right *= left
        of_left *= right
        # a half's decay multiplied the other half's rows, and is part of the whole block's
        dleft, dright = ((rows * d).sum(-2) for rows, d in ((reader, of_right), (writer, of_left)))
        dtotal = torch.stack((dtotal + dleft, dtotal + dright), -2).flatten(-3, -2)
        dY_right = _halves(dY, h)[1]
        dpairs = dY_right @ _halves(v, h)[0].mT
        _halves(dv, h)[0].add_(writer @ reader.mT @ dY_right)
        of_right += dpairs @ writer
        of_left += dpairs.mT @ reader
    return dreader, dwriter, dtotal


def _halves(x: Tensor, half: int) -> tuple[Tensor, ...]:
    """(G,H,C,N) → left and right halves (G,H,n,h,N) of its blocks; views, to be written to."""
    return x.view(*x.shape[:2], -1, 2, half, x.shape[-1]).unbind(-3)
