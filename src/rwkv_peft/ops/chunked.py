"""RWKV-7's recurrence in matrix products over chunks of tokens, with its own backward: plain PyTorch, every device.

Within a chunk, with P_t the product of the decays up to token t, a = -kk and b = kk·iclr, the rows u_t = S_{t-1} a_t
obey a triangular system, so that a chunk costs a handful of products, all chunks at once; only the state goes from
chunk to chunk, by one product each. Decays are divided by one another inside a chunk: exact in float32 while the
product of a chunk's decays stays above 1e-38, that is, while w stays below 1.6 on average; RWKV-7 bounds it by -0.5.

Axes: B batch, T tokens, H heads, N head size, S documents, C chunk length, G chunks of all documents together.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference

CHUNK = 16  # 32 is 10% faster on a CPU and keeps half the states, but its bound on w is 1


class Chunks(NamedTuple):
    """Where each token goes: documents longest first, chunks ordered by their place in the document.

    So the chunks of one serial step lie side by side and belong to the first documents.
    """

    token: Tensor  # (G,H,C) index of each place's row in the flattened (B*T*H), 0 where there is no token
    empty: Tensor | None  # (G,1,C,1) True where there is no token; None if every place holds one
    place: Tensor  # (B*T*H,) index of each row's place in the flattened (G*H*C)
    order: Tensor  # (S,) documents, longest first
    active: list[int]  # documents that have a j-th chunk, for each serial step j


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
    B, T, H, N = r.shape
    if T == 1 and cu_seqlens is None:  # a chunk of one token is the recurrence itself, which is twice as fast there
        return reference.wkv7(r, w, k, v, kk, iclr, initial_state)
    bounds = tuple(range(0, (B + 1) * T, T)) if cu_seqlens is None else tuple(cu_seqlens.tolist())
    longest = max(end - start for start, end in pairwise(bounds))
    chunks = cut(bounds, H, min(CHUNK, longest), r.device)
    if initial_state is None:
        initial_state = r.new_zeros(len(bounds) - 1, H, N, N, dtype=torch.promote_types(r.dtype, torch.float32))
    y, final_state = _Wkv7.apply(  # type: ignore[no-untyped-call]
        r, w, k, v, kk, iclr, initial_state, chunks
    )
    return y, final_state


@lru_cache(maxsize=2)  # every layer of a model asks for the same
def cut(bounds: tuple[int, ...], heads: int, length: int, device: torch.device) -> Chunks:
    """Places for the tokens of documents with the given `bounds`, in chunks of `length`."""
    starts = torch.tensor(bounds[:-1])
    sizes = torch.tensor(bounds[1:]) - starts
    order = sizes.argsort(descending=True, stable=True)
    count = (sizes[order] + length - 1) // length  # chunks of each document
    step = torch.arange(int(count[0]))
    exists = step[:, None] < count  # (steps, S)
    within = (step[:, None] * length)[..., None] + torch.arange(length)  # (steps, 1, C) place in the document
    full = (within < sizes[order][:, None])[exists]  # (G, C)
    token = (starts[order][:, None] + within)[exists].masked_fill(~full, 0)
    rows = token[:, None] * heads + torch.arange(heads)[:, None]  # (G, H, C)
    filled = full[:, None].expand_as(rows)
    place = torch.empty(bounds[-1] * heads, dtype=torch.long)
    place[rows[filled]] = filled.flatten().nonzero().squeeze(1)
    empty = None if bool(full.all()) else ~full[:, None, :, None].to(device)
    return Chunks(rows.to(device), empty, place.to(device), order.to(device), exists.sum(1).tolist())


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
        states, final_state = _scan(initial_state.to(v.dtype), _transfer(local, W), injected, chunks)
        h = torch.cat((U0 + W @ states.mT, v), -2)  # (2C,N): U over v, the values that b and k write
        y = r @ states.mT + to_y @ h
        ctx.save_for_backward(*inputs, states)
        ctx.chunks, ctx.state_dtype = chunks, initial_state.dtype
        return _to_tokens(y, chunks, inputs[0]), final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, S = ctx.saved_tensors
        chunks: Chunks = ctx.chunks
        local = _local(inputs, chunks)
        q, g, v = local.q, local.g, local.raw[3]
        (a, r), (to_u, to_y) = q.chunk(2, -2), local.pairs.chunk(2, -2)
        from_v = to_u.chunk(2, -1)[1]
        dY = _to_chunks(dy.to(v.dtype), chunks)
        W = local.inverse @ a
        h = torch.cat((local.inverse @ (a @ S.mT + from_v @ v), v), -2)
        # y depends on the chunk's initial state by r + (pairs of r and b) W, the next state by transfer
        own_dS = dY.mT @ (r + to_y.chunk(2, -1)[0] @ W)
        dnext, dinitial = _scan_back(dfinal.to(v.dtype), _transfer(local, W), own_dS, chunks)

        D = dnext * local.end  # S' = (S + hᵀ g)·P_end
        dU, dv = (to_y.mT @ dY + g @ D.mT).chunk(2, -2)
        dX = local.inverse.mT @ dU  # U = inverse X, X = a Sᵀ + (pairs of a and k) v
        dX_dY = torch.cat((dX, dY), -2)
        dpairs = (dX_dY @ h.mT).masked_fill_(_unread(v), 0.0)
        written = h @ D
        dend = (D * S).sum(-2, keepdim=True) + (written * g).sum(-2, keepdim=True)
        dq, dg = dX_dY @ S + dpairs @ g, dpairs.mT @ q + written
        gradients = _input_gradients(local, dq, dg, dv + from_v.mT @ dX, dend)
        in_tokens = (_to_tokens(d, chunks, x) for d, x in zip(gradients, inputs, strict=True))
        return *in_tokens, dinitial.to(ctx.state_dtype), None


def _local(inputs: list[Tensor], chunks: Chunks) -> _Local:
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    raw = tuple(_to_chunks(x.to(dtype), chunks) for x in inputs)
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


def _scan(state: Tensor, transfer: Tensor, injected: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """State before each chunk (G,H,N,N), and after each document's last (S,H,N,N)."""
    state = state[chunks.order]
    before, at = torch.empty_like(injected), 0
    for n in chunks.active:
        now = slice(at, at + n)
        before[now] = state[:n]
        after = torch.baddbmm(_bmm_view(injected[now]), _bmm_view(state[:n]), _bmm_view(transfer[now]))
        state = torch.cat((after.view_as(state[:n]), state[n:]))
        at += n
    return before, torch.empty_like(state).index_copy_(0, chunks.order, state)


def _scan_back(dstate: Tensor, transfer: Tensor, local: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Gradient of the state after each chunk (G,H,N,N), and of the initial states (S,H,N,N)."""
    dstate = dstate[chunks.order]
    after, at = torch.empty_like(local), len(local)
    for n in reversed(chunks.active):
        at -= n
        now = slice(at, at + n)
        after[now] = dstate[:n]
        before = torch.baddbmm(_bmm_view(local[now]), _bmm_view(dstate[:n]), _bmm_view(transfer[now]).mT)
        dstate = torch.cat((before.view_as(dstate[:n]), dstate[n:]))
    return after, torch.empty_like(dstate).index_copy_(0, chunks.order, dstate)


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


def _to_chunks(x: Tensor, chunks: Chunks) -> Tensor:
    """(B,T,H,N) → (G,H,C,N), zero where there is no token."""
    x = x.flatten(0, 2).index_select(0, chunks.token.flatten()).view(*chunks.token.shape, -1)
    return x if chunks.empty is None else x.masked_fill(chunks.empty, 0.0)


def _to_tokens(x: Tensor, chunks: Chunks, like: Tensor) -> Tensor:
    """(G,H,C,N) → (B,T,H,N) with the shape and dtype of `like`."""
    return x.flatten(0, 2).index_select(0, chunks.place).view_as(like).to(like.dtype)


def _bmm_view(x: Tensor) -> Tensor:
    return x.flatten(0, 1)
