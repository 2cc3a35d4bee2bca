"""Float recurrences, one token after the other: the definition that every other backend is tested against.

Axes: B batch, T tokens, H heads, N head size, S documents. A state is (S,H,N,N): row = value index, column = key index.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


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
        return _each_document((r, w, k, v, kk, iclr), initial_state, cu_seqlens)
    dtype = torch.promote_types(r.dtype, torch.float32)
    B, _, H, N = r.shape
    state = r.new_zeros(B, H, N, N, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    r_, w_, k_, v_, kk_, iclr_ = (x.to(dtype) for x in (r, w, k, v, kk, iclr))
    inputs = (r_, torch.exp(-torch.exp(w_)), k_, v_, kk_, kk_ * iclr_)
    out = []
    for r_t, decay, k_t, v_t, kk_t, b_t in zip(*(x.unbind(1) for x in inputs), strict=True):  # each (B,H,N)
        removed = (state * kk_t[:, :, None]).sum(-1)  # S kk: what the state holds under this key
        state = state * decay[:, :, None] - removed[..., None] * b_t[:, :, None] + v_t[..., None] * k_t[:, :, None]
        out.append((state * r_t[:, :, None]).sum(-1))
    return torch.stack(out, dim=1).to(r.dtype), state


def _each_document(
    inputs: tuple[Tensor, ...], initial_state: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    H, N = inputs[0].shape[2:]
    outputs, finals = [], []
    for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        first = inputs[0].new_zeros(1, H, N, N) if initial_state is None else initial_state[i : i + 1]
        if start == end:  # an empty document hands its state on
            finals.append(first.to(torch.promote_types(inputs[0].dtype, torch.float32)))
            continue
        r, w, k, v, kk, iclr = (x[:, start:end] for x in inputs)
        y, final = wkv7(r, w, k, v, kk, iclr, first)
        outputs.append(y)
        finals.append(final)
    return torch.cat(outputs, dim=1), torch.cat(finals)
