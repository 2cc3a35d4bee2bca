"""Documents laid out in chunks of tokens, and the states that go from chunk to chunk.

Axes: B batch, T tokens, H heads, N head size, S documents, C chunk length, G chunks of all documents together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Chunks(NamedTuple):
    """Where each token goes: documents longest first, chunks ordered by their place in the document.

    So the chunks of one serial step lie side by side and belong to the first documents.
    """

    token: Tensor  # (G,H,C) index of each place's row in the flattened (B*T*H), 0 where there is no token
    empty: Tensor | None  # (G,1,C,1) True where there is no token; None if every place holds one
    place: Tensor  # (B*T*H,) index of each row's place in the flattened (G*H*C)
    order: Tensor  # (S,) documents, longest first
    active: list[int]  # documents that have a j-th chunk, for each serial step j


def lay_out(
    r: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, fit: Callable[[int], int]
) -> tuple[Chunks, Tensor]:
    """Chunks for the tokens of `r` (B,T,H,N), and the states (S,H,N,N) to begin with.

    `fit` gives the chunk length for the length of the longest document.
    """
    B, T, H, N = r.shape
    bounds = tuple(range(0, (B + 1) * T, T)) if cu_seqlens is None else tuple(cu_seqlens.tolist())
    chunks = cut(bounds, H, fit(max(end - start for start, end in pairwise(bounds))), r.device)
    if initial_state is None:
        initial_state = r.new_zeros(len(bounds) - 1, H, N, N, dtype=torch.promote_types(r.dtype, torch.float32))
    return chunks, initial_state


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


def to_chunks(x: Tensor, chunks: Chunks) -> Tensor:
    """(B,T,H,N) → (G,H,C,N), zero where there is no token; always a copy."""
    x = x.flatten(0, 2).index_select(0, chunks.token.flatten()).view(*chunks.token.shape, -1)
    return x if chunks.empty is None else x.masked_fill(chunks.empty, 0.0)


def to_tokens(x: Tensor, chunks: Chunks, like: Tensor) -> Tensor:
    """(G,H,C,N) → (B,T,H,N) with the shape and dtype of `like`."""
    return x.flatten(0, 2).index_select(0, chunks.place).view_as(like).to(like.dtype)


def scan(
    state: Tensor, injected: Tensor, carry: Callable[[Tensor, slice], Tensor], chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """State before each chunk (G,H,N,N), and after each document's last (S,H,N,N).

    `carry(state, now)` takes the states (n,H,N,N) before the n chunks `now` of one serial step to those after them.
    """
    state = state[chunks.order]
    before, at = torch.empty_like(injected), 0
    for n in chunks.active:
        now = slice(at, at + n)
        before[now] = state[:n]
        state = torch.cat((carry(state[:n], now), state[n:]))
        at += n
    return before, torch.empty_like(state).index_copy_(0, chunks.order, state)


def scan_back(
    dstate: Tensor, local: Tensor, carry: Callable[[Tensor, slice], Tensor], chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """Gradient of the state after each chunk (G,H,N,N), and of the initial states (S,H,N,N)."""
    dstate = dstate[chunks.order]
    after, at = torch.empty_like(local), len(local)
    for n in reversed(chunks.active):
        at -= n
        now = slice(at, at + n)
        after[now] = dstate[:n]
        dstate = torch.cat((carry(dstate[:n], now), dstate[n:]))
    return after, torch.empty_like(dstate).index_copy_(0, chunks.order, dstate)
