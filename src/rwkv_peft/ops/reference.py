"""Float recurrences, one token after the other: the definition that every other backend is tested against.

Axes: B batch, T tokens, H heads, N head size, S documents. A state is (S,H,N,N): row = value index, column = key index.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

LARGEST_W = 20.0  # exp(-exp(20)) is 0 in float64 too; from w = 89 on exp(w) is inf and its gradient NaN in float32


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
    """RWKV-7's recurrence: `S = S·diag(decay) - (S kk)(kk·iclr)ᵀ + v kᵀ; y = S r` with `decay = exp(-exp(w))`.

    Arguments:
        r, w, k, v, kk, iclr: (B,T,H,N), T ≥ 1; computed in float32, or in float64 if `r` is.
        initial_state: (S,H,N,N), S = B without `cu_seqlens`; zeros if None.
        cu_seqlens: S+1 offsets of the documents that one row (B = 1) holds; each starts from its own initial state.

    Returns y (B,T,H,N) in r's dtype and the final state (S,H,N,N) in the dtype of the computation.
    Source: "RWKV-7 Goose" (arXiv 2503.14456), equations 15 to 18.
    """
    if cu_seqlens is not None:
        return _each_document(wkv7, (r, w, k, v, kk, iclr), initial_state, cu_seqlens)
    state = _first_state(r, initial_state)
    r_, w_, k_, v_, kk_, iclr_ = (x.to(state.dtype) for x in (r, w, k, v, kk, iclr))
    inputs = (r_, torch.exp(-torch.exp(w_)), k_, v_, kk_, kk_ * iclr_)
    out = []
    for r_t, decay, k_t, v_t, kk_t, b_t in zip(*(x.unbind(1) for x in inputs), strict=True):  # each (B,H,N)
        removed = (state * kk_t[:, :, None]).sum(-1)  # S kk: what the state holds under this key
        state = state * decay[:, :, None] - removed[..., None] * b_t[:, :, None] + v_t[..., None] * k_t[:, :, None]
        out.append((state * r_t[:, :, None]).sum(-1))
    return torch.stack(out, dim=1).to(r.dtype), state


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-6's recurrence: `y = (S + v (u·k)ᵀ) r; S = S·diag(decay) + v kᵀ` with `decay = exp(-exp(w))`.

    A token is read with the bonus `u` in place of a decay, and decays from the next token on.

    Arguments:
        r, w, k, v: (B,T,H,N), T ≥ 1; computed in float32, or in float64 if `r` is.
        u: (H,N).
        initial_state, cu_seqlens: as in `wkv7`.

    Returns y (B,T,H,N) in r's dtype and the final state (S,H,N,N) in the dtype of the computation.
    Source: "Eagle and Finch" (arXiv 2404.05892), section 4.2.
    """
    u = u.to(torch.promote_types(r.dtype, torch.float32))  # before documents share it: their gradients are summed so
    if cu_seqlens is not None:
        return _each_document(
            lambda r, w, k, v, state: wkv6(r, w, k, v, u, state), (r, w, k, v), initial_state, cu_seqlens
        )
    state = _first_state(r, initial_state)
    r_, w_, k_, v_ = (x.to(state.dtype) for x in (r, w, k, v))
    inputs = (r_, torch.exp(-torch.exp(w_.clamp(max=LARGEST_W))), k_, v_, u * k_)
    out = []
    for r_t, decay, k_t, v_t, bonus in zip(*(x.unbind(1) for x in inputs), strict=True):  # each (B,H,N)
        out.append((state * r_t[:, :, None]).sum(-1) + v_t * (bonus * r_t).sum(-1, keepdim=True))
        state = state * decay[:, :, None] + v_t[..., None] * k_t[:, :, None]
    return torch.stack(out, dim=1).to(r.dtype), state


def wkv5(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-5's recurrence: `wkv6` with one decay for all tokens, `w` (H,N).

    Source: "Eagle and Finch" (arXiv 2404.05892), section 4.1.
    """
    w = w.to(torch.promote_types(r.dtype, torch.float32)).expand(r.shape)
    return wkv6(r, w, k, v, u, initial_state, cu_seqlens)


def _first_state(r: Tensor, initial_state: Tensor | None) -> Tensor:
    """(B,H,N,N) in the dtype of the computation."""
    B, _, H, N = r.shape
    dtype = torch.promote_types(r.dtype, torch.float32)
    return r.new_zeros(B, H, N, N, dtype=dtype) if initial_state is None else initial_state.to(dtype)


def _each_document(
    wkv: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """`wkv(*inputs, state)` of each document by itself; inputs (1,T,H,N)."""
    outputs, finals = [], []
    for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        first = _first_state(inputs[0], None if initial_state is None else initial_state[i : i + 1])
        if start == end:  # an empty document hands its state on
            finals.append(first)
            continue
        y, final = wkv(*(x[:, start:end] for x in inputs), first)
        outputs.append(y)
        finals.append(final)
    return torch.cat(outputs, dim=1), torch.cat(finals)
