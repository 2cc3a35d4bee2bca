"""Operators as pairs of plain functions, which kernels are launched by, and the one autograd function around them.

Axes: B rows, T tokens, H heads, N head size, S documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Saved(NamedTuple):
    """What a backward pass needs of the forward pass, besides the inputs."""

    tensors: tuple[Tensor, ...]
    plan: Any = None
    """What is no tensor, or would be made anew just the same."""


class Raw(NamedTuple):
    """An operator's two directions. Its inputs are contiguous."""

    forward: Callable[..., tuple[Tensor, Tensor, Saved | None]]
    """(*inputs, initial state or None, cu_seqlens or None, keep) → y, final state, and with `keep` what is needed."""
    backward: Callable[..., tuple[Tensor, ...]]
    """(saved, *inputs, dy, dfinal or None) → gradients of the inputs, and of the initial state (S,H,N,N).

    It may write over what `saved` holds. RWKV-7's also takes dr, dk, dv: those of r, k, v come added to them, in place.
    """


def recurrence(
    raw: Raw, inputs: Sequence[Tensor], initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (B,T,H,N) and the final state (S,H,N,N), with gradients of `inputs` and of `initial_state`."""
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (initial_state, *inputs))):
        return raw.forward(*inputs, initial_state, cu_seqlens, False)[:2]
    y, final_state = _Recurrence.apply(raw, cu_seqlens, initial_state, *inputs)  # type: ignore[no-untyped-call]
    return y, final_state


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, raw: Raw, cu_seqlens: Tensor | None, initial_state: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, final_state, saved = raw.forward(*inputs, initial_state, cu_seqlens, True)
        assert saved is not None
        ctx.raw, ctx.cu_seqlens, ctx.plan, ctx.spent = raw, cu_seqlens, saved.plan, False
        ctx.save_for_backward(initial_state, *inputs, *saved.tensors)
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # `once_differentiable` would say so later, and takes longer
            raise RuntimeError("a recurrence of fast kernels has no second derivatives; choose --op torch")
        tensors, raw = ctx.saved_tensors, ctx.raw  # tensors once: a checkpoint hands them out once
        count = len(ctx.needs_input_grad) - 3
        initial_state, inputs, saved = tensors[0], tensors[1 : count + 1], Saved(tensors[count + 1 :], ctx.plan)
        if ctx.spent:  # a backward before this one may have written over it
            saved = raw.forward(*inputs, initial_state, ctx.cu_seqlens, True)[2]
        ctx.spent = True
        dy = torch.zeros_like(inputs[0]) if dy is None else dy.contiguous()
        *gradients, dinitial = raw.backward(saved, *inputs, dy, dfinal)
        return None, None, None if initial_state is None else dinitial.to(initial_state.dtype), *gradients
