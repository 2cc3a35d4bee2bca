"""RWKV-7's recurrence in matrix products over chunks of tokens, with its own backward: plain PyTorch, every device.

Within a chunk, with P_t the product of the decays up to token t, a = -kk and b = kk·iclr, the rows u_t = S_{t-1} a_t
obey a triangular system, so that a chunk costs a handful of products, all chunks at once; only the state goes from
chunk to chunk, by one product each. Decays are divided by one another inside a chunk: exact in float32 while the
product of a chunk's decays stays above 1e-38, that is, while w stays below 1.6 on average; RWKV-7 bounds it by -0.5.

Axes: B batch, T tokens, H heads, N head size, S documents, C chunk length, G chunks of all documents together.
"""

from __future__ import annotations

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

    token: Tensor  # (G,C) index of the token in the flattened (B*T), 0 where there is none
    empty: Tensor | None  # (G,1,C,1) True where there is no token; None if every place holds one
    place: Tensor  # (B*T,) index of the place in the flattened (G*C)
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
    bounds = [i * T for i in range(B + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    longest = max(end - start for start, end in pairwise(bounds))
    chunks = cut(bounds, min(CHUNK, longest), r.device)
    if initial_state is None:
        initial_state = r.new_zeros(len(bounds) - 1, H, N, N, dtype=torch.promote_types(r.dtype, torch.float32))
    y, final_state = _Wkv7.apply(  # type: ignore[no-untyped-call]
        r, w, k, v, kk, iclr, initial_state, chunks
    )
    return y, final_state


def cut(bounds: list[int], length: int, device: torch.device) -> Chunks:
    """Places for the tokens of documents with the given `bounds`, in chunks of `length`."""
    starts = torch.tensor(bounds[:-1])
    sizes = torch.tensor(bounds[1:]) - starts
    order = sizes.argsort(descending=True, stable=True)
    count = (sizes[order] + length - 1) // length  # chunks of each document
    step = torch.arange(int(count[0]))
    rank = torch.arange(len(order)).expand(len(step), -1)  # (steps, S)
    exists = step[:, None] < count
    first = (step[:, None] * length)[..., None] + torch.arange(length)  # (steps, 1, C)
    token = (starts[order][rank][..., None] + first)[exists]  # (G, C)
    full = (first < sizes[order][None, :, None])[exists]
    place = torch.empty(bounds[-1], dtype=torch.long)
    place[token[full]] = full.flatten().nonzero().squeeze(1)
    empty = None if bool(full.all()) else ~full[:, None, :, None].to(device)
    token = token.masked_fill(~full, 0)
    return Chunks(token.to(device), empty, place.to(device), order.to(device), exists.sum(1).tolist())


class _Local(NamedTuple):
    """What a chunk computes without knowing the state; each (G,H,·,·)."""

    rows: tuple[Tensor, ...]  # r·P, k/P, v, a·P_before, b/P: (C,N)
    log_p: Tensor  # (C,N) log P
    end: Tensor  # (1,N) P of the chunk's last token
    inverse: Tensor  # (C,C) of I - A_ab
    A_ak: Tensor
    A_rb: Tensor
    A_rk: Tensor


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *inputs, initial_state, chunks = args
        local = _local(inputs, chunks)
        r, k, v, a, b = local.rows
        W = local.inverse @ a  # (C,N): U = W Sᵀ + U0
        U0 = local.inverse @ (local.A_ak @ v)
        transfer = _transfer(local, W)  # S' = S transfer + injected
        injected = (U0.mT @ b + v.mT @ k) * local.end
        states, final_state = _scan(initial_state.to(r.dtype), transfer, injected, chunks)
        U = torch.baddbmm(_bmm_view(U0), _bmm_view(W), _bmm_view(states).mT).view_as(U0)
        y = r @ states.mT + local.A_rb @ U + local.A_rk @ v
        ctx.save_for_backward(*inputs, states)
        ctx.chunks, ctx.state_dtype = chunks, initial_state.dtype
        return _to_tokens(y, chunks, inputs[0]), final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, states = ctx.saved_tensors
        chunks: Chunks = ctx.chunks
        local = _local(inputs, chunks)
        r, k, v, a, b = local.rows
        dY = _to_chunks(dy.to(r.dtype), chunks)
        W = local.inverse @ a
        U = local.inverse @ (a @ states.mT + local.A_ak @ v)
        # y depends on the chunk's initial state by r + A_rb W, the next state by transfer
        local_dS = dY.mT @ (r + local.A_rb @ W)
        dnext, dinitial = _scan_back(dfinal.to(r.dtype), _transfer(local, W), local_dS, chunks)

        dend = (dnext * states).sum(-2, keepdim=True)  # through S·P_end
        dnext_p = dnext * local.end
        dU = local.A_rb.mT @ dY + b @ dnext_p.mT
        dX = local.inverse.mT @ dU  # U = inverse X, X = a Sᵀ + A_ak v
        dA_ab, dA_ak = (dX @ U.mT).tril(-1), (dX @ v.mT).tril(-1)
        dA_rb, dA_rk = (dY @ U.mT).tril(), (dY @ v.mT).tril()
        dr = dY @ states + dA_rb @ b + dA_rk @ k
        da = dX @ states + dA_ab @ b + dA_ak @ k
        to_b, to_k = U @ dnext_p, v @ dnext_p
        dend = dend * local.end + (to_b * b + to_k * k).sum(-2, keepdim=True)
        db = dA_ab.mT @ a + dA_rb.mT @ r + to_b
        dk = dA_ak.mT @ a + dA_rk.mT @ r + to_k
        dv = local.A_rk.mT @ dY + local.A_ak.mT @ dX + k @ dnext_p.mT
        return *_input_gradients(inputs, chunks, local, (dr, dk, dv, da, db), dend), dinitial.to(ctx.state_dtype), None


def _local(inputs: list[Tensor], chunks: Chunks) -> _Local:
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    r, w, k, v, kk, iclr = (_to_chunks(x.to(dtype), chunks) for x in inputs)
    log_decay = -torch.exp(w)
    if chunks.empty is not None:
        log_decay = log_decay.masked_fill(chunks.empty, 0.0)
    log_p = log_decay.cumsum(-2)
    p, before, divided = log_p.exp(), (log_p - log_decay).exp(), (-log_p).exp()
    r, k, a, b = r * p, k * divided, -kk * before, kk * iclr * divided
    eye = torch.eye(r.shape[-2], dtype=dtype, device=r.device)
    inverse = torch.linalg.solve_triangular(eye - (a @ b.mT).tril(-1), eye, upper=False, unitriangular=True)
    A_ak, A_rb, A_rk = (a @ k.mT).tril(-1), (r @ b.mT).tril(), (r @ k.mT).tril()
    return _Local((r, k, v, a, b), log_p, p[..., -1:, :], inverse, A_ak, A_rb, A_rk)


def _transfer(local: _Local, W: Tensor) -> Tensor:
    """(G,H,N,N) M of S' = S M + …: the state decays and loses what the chunk's keys remove."""
    b = local.rows[-1]
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


def _input_gradients(
    inputs: list[Tensor], chunks: Chunks, local: _Local, grads: tuple[Tensor, ...], dend: Tensor
) -> tuple[Tensor, ...]:
    """From gradients of r·P, k/P, v, a·P_before, b/P and log P_end to those of r, w, k, v, kk, iclr."""
    dr, dk, dv, da, db = grads
    r, k, _, a, b = local.rows
    w, kk, iclr = (_to_chunks(inputs[i].to(r.dtype), chunks) for i in (1, 4, 5))
    log_decay = local.log_p.diff(dim=-2, prepend=torch.zeros_like(local.end))
    dbefore = a * da  # of log P_before, which is log P one token earlier
    dlog_p = r * dr - k * dk - b * db
    dlog_p[..., :-1, :] += dbefore[..., 1:, :]
    dlog_p[..., -1:, :] += dend
    dlog_decay = dlog_p.flip(-2).cumsum(-2).flip(-2)
    dw = -dlog_decay * torch.exp(w)
    p, divided = local.log_p.exp(), (-local.log_p).exp()
    db = db * divided
    dkk = db * iclr - da * (local.log_p - log_decay).exp()
    gradients = (dr * p, dw, dk * divided, dv, dkk, db * kk)
    return tuple(_to_tokens(g, chunks, x) for g, x in zip(gradients, inputs, strict=True))


def _to_chunks(x: Tensor, chunks: Chunks) -> Tensor:
    """(B,T,H,N) → (G,H,C,N), zero where there is no token."""
    x = x.flatten(0, 1)[chunks.token].transpose(1, 2).contiguous()
    return x if chunks.empty is None else x.masked_fill(chunks.empty, 0.0)


def _to_tokens(x: Tensor, chunks: Chunks, like: Tensor) -> Tensor:
    """(G,H,C,N) → (B,T,H,N) with the shape and dtype of `like`."""
    return x.transpose(1, 2).flatten(0, 1)[chunks.place].view_as(like).to(like.dtype)


def _bmm_view(x: Tensor) -> Tensor:
    return x.flatten(0, 1)
