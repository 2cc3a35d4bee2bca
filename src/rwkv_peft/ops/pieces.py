"""What lies between the matrix products of a layer, in plain PyTorch: it defines what fused versions compute.

A vector may be (D,) or (1,1,D), and float32 beside activations in bf16: it is used in their dtype, whatever it is
stored in. Axes: B rows, T tokens, D width, H heads, N head size, S documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Vectors = Sequence[Tensor | None]


class LayerNorm(nn.LayerNorm):
    """Normalises the last axis; computed in float32 inside."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class GroupNorm(nn.GroupNorm):
    """Normalises each head; (B,T,D) → (B,T,D)."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        return F.group_norm(rows, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps).view_as(x)


def is_plain(norm: nn.Module) -> bool:
    """Whether a norm is what its weight, bias and epsilon say; a wrapper around one may be more."""
    return type(norm) in (LayerNorm, GroupNorm)


class Documents(Protocol):
    """Where the documents in B rows of T tokens begin and end; without `cu_seqlens` each row is one."""

    cu_seqlens: Tensor | None
    """On the CPU: S+1 rising offsets from 0 to T, of the S documents in the only row."""
    count: int
    """S."""

    @property
    def starts(self) -> Tensor:
        """(B*T,) int32, on the device of the tokens: the document whose first token this is, else -1."""

    @property
    def ends(self) -> Tensor:
        """(B*T,) int32: the same of last tokens."""

    def shift(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,T,D), before (S,D) → the token before each token (B,T,D), and each document's last token (S,D)."""


class Vectors7(NamedTuple):
    """RWKV-7's vectors around its recurrence, each (D,) or (1,1,D); r_k is (H,N). v0 is None in layer 0."""

    w0: Tensor
    a0: Tensor
    v0: Tensor | None
    k_k: Tensor
    k_a: Tensor
    r_k: Tensor


def norm_mix(
    x: Tensor, added: Tensor | None, norm: nn.Module, before: Tensor, documents: Documents, vectors: Vectors
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """The sum of x and added (B,T,D), n = norm of it, mixed with the n of the token before.

    Arguments: before (S,D) precedes each document. vectors: the shares of the token before, None for no share.
    Returns the sum, `n + (shifted - n)·vector` for each vector, and the n of each document's last token (S,D).
    """
    if added is not None:
        x = x + added
    n = norm(x)
    shifted, last = documents.shift(n, before)
    delta = shifted - n
    return x, tuple(n if vector is None else n + delta * vector.to(n.dtype) for vector in vectors), last


def mix_more(
    n: Tensor, before: Tensor, documents: Documents, vectors: Sequence[Tensor], more: Tensor
) -> tuple[Tensor, ...]:
    """RWKV-6: n (B,T,D) mixed with the token before by the shares `vector + more`, more (5,B,T,D)."""
    delta = documents.shift(n, before)[0] - n
    return tuple(n + delta * (vector.to(n.dtype) + m) for vector, m in zip(vectors, more, strict=True))


def core7(
    wkv7: Callable[..., tuple[Tensor, Tensor]],
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w_low: Tensor,
    a_low: Tensor,
    v_low: Tensor | None,
    gate: Tensor,
    v_first: Tensor,
    vectors: Vectors7,
    ln_x: nn.Module,
    state: Tensor | None,
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    """RWKV-7's time-mix between its projections and its output matrix.

    Arguments: `wkv7` the operator; r, k, v, gate, and the low-rank parts of decay, in-context learning rate and value
    residual, each (B,T,D); v_low None in layer 0, whose v becomes `v_first`; state (S,H,N,N), or None for zeros.
    Returns what the output matrix multiplies (B,T,D), the state after the tokens, and v_first (B,T,D).
    """
    dtype, heads = r.dtype, (*r.shape[:2], *vectors.r_k.shape)
    raw_w = vectors.w0.to(dtype) + w_low
    w = -F.softplus(-raw_w.to(torch.promote_types(dtype, torch.float32))) - 0.5
    iclr = torch.sigmoid(vectors.a0.to(dtype) + a_low)
    if v_low is None or vectors.v0 is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(vectors.v0.to(dtype) + v_low)
    kk = F.normalize((k * vectors.k_k.to(dtype)).view(heads), dim=-1)
    k = k * (1 + (iclr - 1) * vectors.k_a.to(dtype))
    r, w, k, v, iclr = (y.view(heads) for y in (r, w, k, v, iclr))
    y, state = wkv7(r, w, k, v, kk, iclr, state, documents.cu_seqlens)
    bonus = (r * k * vectors.r_k.to(dtype)).sum(-1, keepdim=True) * v  # (B,T,H,N)
    return (ln_x(y.flatten(2)) + bonus.flatten(2)) * gate, state, v_first


def gated_output(y: Tensor, gate: Tensor, ln_x: nn.Module) -> Tensor:
    """RWKV-5 and RWKV-6: the heads of y (B,T,D) normalised, times the SiLU of the gate (B,T,D)."""
    return ln_x(y) * F.silu(gate)  # type: ignore[no-any-return]


def gated(r: Tensor, v: Tensor) -> Tensor:
    """v times the sigmoid of r, both (B,T,D)."""
    return torch.sigmoid(r) * v


def relu2(k: Tensor) -> Tensor:
    """The square of what is positive, else 0."""
    return torch.relu(k).square()


@dataclass(frozen=True)
class Pieces:
    """One implementation of the pieces; a backend has one."""

    norm_mix: Callable[..., tuple[Tensor, tuple[Tensor, ...], Tensor]]
    mix_more: Callable[..., tuple[Tensor, ...]]
    core7: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gated_output: Callable[[Tensor, Tensor, nn.Module], Tensor]
    gated: Callable[[Tensor, Tensor], Tensor]
    relu2: Callable[[Tensor], Tensor]


PLAIN = Pieces(norm_mix, mix_more, core7, gated_output, gated, relu2)
