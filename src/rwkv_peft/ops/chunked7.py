"""RWKV-7's recurrence in matrix products over chunks of tokens, with its own backward: plain PyTorch, every device.

Within a chunk, with P_t the product of the decays up to token t, a = -kk and b = kk·iclr, the rows u_t = S_{t-1} a_t
obey a triangular system, so that a chunk costs a handful of products, all chunks at once; only the state goes from
chunk to chunk, by one product each. Decays are divided by one another inside a chunk: exact in float32 while the
product of a chunk's decays stays above 1e-38, that is, while w stays below 1.6 on average; RWKV-7 bounds it by -0.5.

Axes: B batch, T tokens, H heads, N head size, S documents, C chunk length, G chunks of all documents together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .layout import Chunks, lay_out, scan, scan_back, to_chunks, to_tokens

CHUNK = 16  # 32 is 10% faster on a CPU and keeps half the states, but its bound on w is 1


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
    if r.shape[1] == 1 and cu_seqlens is None:  # a chunk of one token is the recurrence itself: twice as fast there
        return reference.wkv7(r, w, k, v, kk, iclr, initial_state)
    chunks, initial_state = lay_out(r, initial_state, cu_seqlens, lambda longest: min(CHUNK, longest))
    y, final_state = _Wkv7.apply(  # type: ignore[no-untyped-call]
        r, w, k, v, kk, iclr, initial_state, chunks
    )
    return y, final_state


class _Local(NamedTuple):
    """What a chunk computes without knowing the state; each (G,H,·,·). Two kinds of rows are stacked, C over C."""

    raw: tuple[Tensor, ...]  # r w k v kk iclr: (C,N)
    log_decay: Tensor  # (C,N)
    log_p: Tensor  # (C,N) log P
    end: Tensor  # (1,N) P of the chunk's last token
    q: Tensor  # (2C,N): a·P_before over r·P, what reads the state
    g: Tensor  # (2C,N): b/P over k/P, what is written to it
    pairs: Tensor  # (2C,2C) q gᵀ where the reader comes after the writer; r also reads its own token
    inverse: Tensor  # (C,C) of I - pairs of a and b


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *inputs, initial_state, chunks = args
        local = _local(inputs, chunks)
        v = local.raw[3]
        (a, r), (to_u, to_y) = local.q.chunk(2, -2), local.pairs.chunk(2, -2)
        W = local.inverse @ a  # (C,N): U = W Sᵀ + U0
        U0 = local.inverse @ (to_u.chunk(2, -1)[1] @ v)
        injected = (torch.cat((U0, v), -2).mT @ local.g) * local.end  # S' = S transfer + injected
        carry = _carry(_transfer(local, W), injected)
        states, final_state = scan(initial_state.to(v.dtype), injected, carry, chunks)
        del carry  # its matrices are as large as all states
        h = torch.cat((U0 + W @ states.mT, v), -2)  # (2C,N): U over v, the values that b and k write
        y = r @ states.mT + to_y @ h
        ctx.save_for_backward(*inputs, states)
        ctx.chunks, ctx.state_dtype = chunks, initial_state.dtype
        return to_tokens(y, chunks, inputs[0]), final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, S = ctx.saved_tensors
        chunks: Chunks = ctx.chunks
        local = _local(inputs, chunks)
        q, g, v = local.q, local.g, local.raw[3]
        (a, r), (to_u, to_y) = q.chunk(2, -2), local.pairs.chunk(2, -2)
        from_v = to_u.chunk(2, -1)[1]
        dY = to_chunks(dy.to(v.dtype), chunks)
        W = local.inverse @ a
        h = torch.cat((local.inverse @ (a @ S.mT + from_v @ v), v), -2)
        # y depends on the chunk's initial state by r + (pairs of r and b) W, the next state by transfer
        own_dS = dY.mT @ (r + to_y.chunk(2, -1)[0] @ W)
        carry = _carry(_transfer(local, W).mT, own_dS)
        dnext, dinitial = scan_back(dfinal.to(v.dtype), own_dS, carry, chunks)
        del carry

        D = dnext * local.end  # S' = (S + hᵀ g)·P_end
        dU, dv = (to_y.mT @ dY + g @ D.mT).chunk(2, -2)
        dX = local.inverse.mT @ dU  # U = inverse X, X = a Sᵀ + (pairs of a and k) v
        dX_dY = torch.cat((dX, dY), -2)
        dpairs = (dX_dY @ h.mT).masked_fill_(_unread(v), 0.0)
        written = h @ D
        dend = (D * S).sum(-2, keepdim=True) + (written * g).sum(-2, keepdim=True)
        dq, dg = dX_dY @ S + dpairs @ g, dpairs.mT @ q + written
        gradients = _input_gradients(local, dq, dg, dv + from_v.mT @ dX, dend)
        in_tokens = (to_tokens(d, chunks, x) for d, x in zip(gradients, inputs, strict=True))
        return *in_tokens, dinitial.to(ctx.state_dtype), None


def _local(inputs: list[Tensor], chunks: Chunks) -> _Local:
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    raw = tuple(to_chunks(x.to(dtype), chunks) for x in inputs)
    r, w, k, _, kk, iclr = raw
    log_decay = -torch.exp(w)
    if chunks.empty is not None:
        log_decay = log_decay.masked_fill(chunks.empty, 0.0)
    log_p = log_decay.cumsum(-2)
    p, before, divided = log_p.exp(), (log_p - log_decay).exp(), (-log_p).exp()
    q = torch.cat((-kk * before, r * p), -2)
    g = torch.cat((kk * iclr * divided, k * divided), -2)
    pairs = (q @ g.mT).masked_fill_(_unread(r), 0.0)
    C = r.shape[-2]
    eye = torch.eye(C, dtype=dtype, device=r.device)
    inverse = torch.linalg.solve_triangular(eye - pairs[..., :C, :C], eye, upper=False, unitriangular=True)
    return _Local(raw, log_decay, log_p, p[..., -1:, :], q, g, pairs, inverse)


def _unread(like: Tensor) -> Tensor:
    """(2C,2C) True where a row of q does not read a row of g."""
    row = torch.arange(like.shape[-2], device=like.device)
    return torch.cat((row[:, None] <= row, row[:, None] < row)).repeat(1, 2)


def _transfer(local: _Local, W: Tensor) -> Tensor:
    """(G,H,N,N) M of S' = S M + …: the state decays and loses what the chunk's keys remove."""
    b = local.g.chunk(2, -2)[0]
    return torch.diag_embed(local.end.squeeze(-2)) + (W.mT @ b) * local.end


def _carry(transfer: Tensor, added: Tensor) -> Callable[[Tensor, slice], Tensor]:
    def carry(state: Tensor, now: slice) -> Tensor:
        product = (x.flatten(0, 1) for x in (added[now], state, transfer[now]))
        return torch.baddbmm(*product).view_as(state)

    return carry


def _input_gradients(local: _Local, dq: Tensor, dg: Tensor, dv: Tensor, dend: Tensor) -> tuple[Tensor, ...]:
    """From gradients of q, g, v and log P_end to those of r, w, k, v, kk, iclr."""
    kk, iclr = local.raw[4:]
    dbefore, dp = (local.q * dq).chunk(2, -2)  # of log P_before, which is log P one token earlier, and of log P
    dlog_p = dp - sum((local.g * dg).chunk(2, -2))
    dlog_p[..., :-1, :] += dbefore[..., 1:, :]
    dlog_p[..., -1:, :] += dend
    dlog_decay = dlog_p.flip(-2).cumsum(-2).flip(-2)
    da, dr = dq.chunk(2, -2)
    db, dk = (rows * (-local.log_p).exp() for rows in dg.chunk(2, -2))
    dkk = db * iclr - da * (local.log_p - local.log_decay).exp()
    return dr * local.log_p.exp(), dlog_decay * local.log_decay, dk, dv, dkk, db * kk
