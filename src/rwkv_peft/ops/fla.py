"""Operators of the library flash-linear-attention (0.6), for comparison and for cards that our kernels do not know.

The library keeps a state as (key, value) and takes the logarithm of the decay; both are mapped here. Where it differs:
- Its products have operands of at most TF32: float32 inputs give 1e-3, not the 1e-6 of the other backends.
- `wkv7` promises it that w stays below 0.95, as RWKV-7's does (-0.5), which lets it take chunks of 64 tokens.
- Gradients of strong decays are differences of larger sums; a decay of less than e^-81 is taken to be e^-81.

Axes: B batch, T tokens, H heads, N head size, S documents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..packages import optional

HEAD_SIZES = (64, 128)
LARGEST_W = 4.4  # a decay of e^-81: next to nothing, and sums over a chunk are still exact
BOUND7 = -2.6  # of log(decay), the lowest that the library takes 64 tokens a chunk with


def supports(device: torch.device, head_size: int) -> str | None:
    """None, or the reason why the library cannot run there. Does not import it."""
    if device.type != "cuda":
        return f"needs a GPU, and the model is on {device.type}"
    if find_spec("fla") is None:
        return "the package flash-linear-attention is not installed; pip install flash-linear-attention"
    if head_size not in HEAD_SIZES:
        return f"knows heads of 64 and 128, not of {head_size}"
    return None


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
    """The same function as `reference.wkv7`: arguments, shapes and results are described there; w below 0.95."""
    run = optional("fla.ops.rwkv7", "--op fla").chunk_rwkv7
    return _each_document(
        lambda state, bounds: run(
            r, _log_decay(w), k, v, -kk, kk * iclr, 1.0, state, True, *bounds, lower_bound=BOUND7
        ),
        r, initial_state, cu_seqlens,
    )  # fmt: skip


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
    run = optional("fla.ops.rwkv6", "--op fla").chunk_rwkv6
    return _each_document(
        lambda state, bounds: run(r, k, v, _log_decay(w), u.float(), 1.0, state, True, *bounds),
        r, initial_state, cu_seqlens,
    )  # fmt: skip


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
    return wkv6(r, w.float().expand(r.shape), k, v, u, initial_state, cu_seqlens)


def _log_decay(w: Tensor) -> Tensor:
    """(B,T,H,N) float32."""
    return -torch.exp(w.float().clamp(max=LARGEST_W))


class _Bounds(NamedTuple):
    """The documents that hold tokens, as the library wants them."""

    offsets: Tensor  # of the device
    offsets_on_cpu: Tensor
    filled: Tensor  # which documents these are, of the device


def _each_document(
    run: Callable[[Tensor | None, tuple[Tensor | None, Tensor | None]], tuple[Tensor, Tensor]],
    r: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`run(state, offsets)` with states turned; empty documents, unknown to the library, hand their states on."""
    turned = None if initial_state is None else initial_state.float().mT.contiguous()
    if cu_seqlens is None:
        y, final = run(turned, (None, None))
        return y, final.mT
    documents, bounds = len(cu_seqlens) - 1, _bounds(tuple(cu_seqlens.tolist()), r.device)
    if len(bounds.filled) == documents:
        y, final = run(turned, bounds[:2])
        return y, final.mT
    if turned is None:
        turned = r.new_zeros(documents, *r.shape[2:], r.shape[3], dtype=torch.float32)
    y, final = run(turned[bounds.filled], bounds[:2])
    return y, turned.index_copy(0, bounds.filled, final).mT


@lru_cache(maxsize=8)  # every layer of a model asks for the same, and the library caches by identity
def _bounds(bounds: tuple[int, ...], device: torch.device) -> _Bounds:
    filled = [document for document, (start, end) in enumerate(pairwise(bounds)) if start < end]
    offsets = torch.tensor([*(bounds[document] for document in filled), bounds[-1]])
    return _Bounds(offsets.to(device), offsets, torch.tensor(filled, device=device))
