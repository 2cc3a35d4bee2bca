"""RWKV-7's time-mix between its projections and its output matrix: two passes forward, two backward, and the operator.

Before the operator `prepare` makes decay, keys, values, removal key and learning rate; after it `finish` normalises
heads, adds the bonus of the current token and gates. Going back, `finish_backward` makes again what was prepared,
which is cheaper than to keep it, and `prepare_backward` writes gradients over those they come from. One autograd
function holds it all, with the operator's raw forward and backward inside.

Axes: B rows, T tokens, D width, H heads, N head size, S documents. Formulas: `pieces.core7`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import pieces
from ..pieces import Documents, Vectors7
from ..raw import Raw, Saved
from . import core7_kernels as kernels
from .activations import fits

HEAD_SIZES = (64, 128)
# w is in [-30, -0.5], where float16 is 8 times as exact as bfloat16
W_DTYPE = {torch.bfloat16: torch.float16, torch.float16: torch.float16, torch.float32: torch.float32}
ELEMENTS = 1024  # of a tile: 8 for each of 128 threads, which are 16 bytes of bfloat16
MOST_HEADS = 4  # of a program
MOST_TILES = 16  # that a program walks over
LEAST_TILES = 4  # where programs leave partial sums
PROGRAMS = 2048  # keep a GPU busy: with more tokens, programs walk further
SLOTS = 8  # of partial sums: w0 a0 v0 k_k k_a r_k, weight and bias of ln_x


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
    state: Tensor,
    documents: Documents,
    raw: Raw | None = None,
    keep_prepared: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same function as `pieces.core7`: arguments, shapes and results are described there.

    `raw` is the operator inside, by default Triton's; `wkv7` is the one for `pieces.core7` where these kernels do not
    apply. `keep_prepared` keeps the operator's inputs for backward: 5 tensors (B,T,D) more, and 9 passes fewer.
    """
    first = v_low is None or vectors.v0 is None
    tensors = (r, k, v, w_low, a_low, None if first else v_low, gate, None if first else v_first)
    if not _applies(tensors, vectors, ln_x):
        return pieces.core7(wkv7, r, k, v, w_low, a_low, v_low, gate, v_first, vectors, ln_x, state, documents)
    if raw is None:
        from .wkv7 import RAW

        raw = RAW
    if first:
        vectors = vectors._replace(v0=None)
    inputs = (*tensors, *vectors, ln_x.weight, ln_x.bias, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    options = _Options(raw, float(ln_x.eps), documents.cu_seqlens, keep, keep_prepared)  # type: ignore[arg-type]
    out, state, v_first = _Core7.apply(options, *inputs)
    return out, state, v_first


def _applies(tensors: tuple[Tensor | None, ...], vectors: Vectors7, ln_x: nn.Module) -> bool:
    """Whether the kernels can compute this: head size, one known dtype, our own ln_x, a device that Triton runs on."""
    H, N = vectors.r_k.shape
    given = [x for x in tensors if x is not None]
    return N in HEAD_SIZES and fits(*given) and type(ln_x) is pieces.GroupNorm and ln_x.num_groups == H


class _Options(NamedTuple):
    raw: Raw
    eps: float
    cu_seqlens: Tensor | None
    keep: bool
    keep_prepared: bool


class _Inputs(NamedTuple):
    """The function's tensors, in the order of their gradients; from w0 to bias in the order of the slots."""

    r: Tensor
    k: Tensor
    v: Tensor
    w_low: Tensor
    a_low: Tensor
    v_low: Tensor | None
    gate: Tensor
    v_first: Tensor | None
    w0: Tensor
    a0: Tensor
    v0: Tensor | None
    k_k: Tensor
    k_a: Tensor
    r_k: Tensor
    weight: Tensor
    bias: Tensor
    state: Tensor | None

    @property
    def sources(self) -> tuple[Tensor | None, ...]:
        """What the operator's inputs are made from, in the kernels' order."""
        return self[1:6] + self[7:13]


class _Prepared(NamedTuple):
    """The operator's inputs beside r; each (B,T,D)."""

    w: Tensor
    k: Tensor
    v: Tensor
    kk: Tensor
    iclr: Tensor

    @staticmethod
    def room(x: _Inputs) -> _Prepared:
        """Not yet filled; layer 0 takes v as it is."""
        w, v = torch.empty_like(x.k, dtype=W_DTYPE[x.k.dtype]), x.v if x.v_low is None else torch.empty_like(x.k)
        return _Prepared(w, torch.empty_like(x.k), v, torch.empty_like(x.k), torch.empty_like(x.k))


class _Plan(NamedTuple):
    """How programs share the work."""

    heads: int  # H
    head_size: int  # N
    together: int  # heads of a program
    tokens: int  # of all rows
    run: int  # tokens of a program
    runs: int

    @staticmethod
    def of(x: _Inputs, least: int = 1) -> _Plan:
        H, N = x.r_k.shape
        tokens, together = x.r.shape[0] * x.r.shape[1], gcd(H, MOST_HEADS)
        tiles = tokens * H * N // ELEMENTS
        run = min(MOST_TILES, max(least, tiles // PROGRAMS)) * (ELEMENTS // N // together)
        return _Plan(H, N, together, tokens, run, -(-tokens // run))

    def launch(self, kernel: Any, *args: Any, **constants: bool) -> None:
        tile = {"H": self.heads, "N": self.head_size, "HEADS": self.together, "ROWS": ELEMENTS // self.head_size}
        kernel[self.heads // self.together, self.runs](*args, self.tokens, self.run, **tile, **constants, num_warps=4)

    def sums(self, device: torch.device) -> Tensor:
        """Room for partial sums of the vectors' gradients: (SLOTS, runs, D) float32, not yet filled."""
        return torch.empty(SLOTS, self.runs, self.heads * self.head_size, dtype=torch.float32, device=device)

    def by_head(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(B,T,D) → (B,T,H,N)."""
        return tuple(t.view(*t.shape[:2], self.heads, self.head_size) for t in tensors)


class _Core7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: _Options, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        x = _Inputs._make(None if t is None else t.contiguous() for t in args)
        plan, p = _Plan.of(x), _Prepared.room(x)
        plan.launch(kernels.prepare, *x.sources, *p, FIRST=x.v_low is None)
        y, final, saved = options.raw.forward(*plan.by_head(x.r, *p), x.state, options.cu_seqlens, options.keep)
        out = torch.empty_like(x.r)
        plan.launch(kernels.finish, y, x.r, p.k, p.v, x.gate, x.r_k, x.weight, x.bias, out, options.eps)
        if options.keep:
            assert saved is not None
            ctx.options, ctx.plan, ctx.spent = options, saved.plan, False
            ctx.save_for_backward(*x, y, *(p if options.keep_prepared else ()), *saved.tensors)
        ctx.set_materialize_grads(False)
        # v_first is handed through, so that its gradient gathers from layer to layer inside the kernels
        place = 2 if x.v_first is None else 7
        if not ctx.needs_input_grad[1 + place]:
            ctx.mark_non_differentiable(args[place])
        return out, final, args[place]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dfinal: Tensor | None, dlater: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """`dlater` is the gradient of v_first from the layers that come later."""
        x, y, p, saved = _restore(ctx)
        needed, kept = ctx.needs_input_grad[1:], p is not None
        train, flags = needed[8:16], {"FIRST": x.v_low is None}
        plan = _Plan.of(x, LEAST_TILES if any(train) else 1)
        sums = plan.sums(x.r.device) if any(train) else None
        dout = torch.zeros_like(x.r) if dout is None else dout.contiguous()
        dy, dgate, dr, dk, dv = (torch.empty_like(x.r) for _ in range(5))
        p = p or _Prepared.room(x)
        after = (y, x.r, x.gate, x.r_k, x.weight, x.bias, dout, dy, dgate, dr, dk, dv, sums, ctx.options.eps)
        plan.launch(kernels.finish_backward, *x.sources, *p, *after, KEPT=kept, TRAIN=any(train[5:]), **flags)
        inputs = plan.by_head(x.r, *p)
        if ctx.spent:  # backward a second time
            saved = ctx.options.raw.forward(*inputs, x.state, ctx.options.cu_seqlens, True)[2]
        ctx.spent = True
        rest = (None if dfinal is None else dfinal.contiguous(), *plan.by_head(dr, dk, dv))
        grads = ctx.options.raw.backward(saved, *inputs, *plan.by_head(dy), *rest)
        dr, dw, dk, dv, dkk, diclr = (g.view_as(x.r) for g in grads[:6])
        del saved, p, inputs, dy, after
        dv_first = torch.empty_like(x.r) if needed[7] else None
        into = (dw, dk, dv, dkk, diclr, dv_first, None if dlater is None else dlater.contiguous(), sums)
        plan.launch(kernels.prepare_backward, *x.sources, *into, TRAIN=any(train[:5]), **flags)
        dv_low = None if x.v_low is None else dkk
        dstate = grads[6].to(x.state.dtype) if x.state is not None and needed[16] else None
        return None, dr, dk, dv, dw, diclr, dv_low, dgate, dv_first, *_vector_gradients(sums, x[8:16], train), dstate


def _restore(ctx: Any) -> tuple[_Inputs, Tensor, _Prepared | None, Saved | None]:
    """What forward kept: its inputs, y, the operator's inputs if they were kept, what the operator saved."""
    tensors = iter(ctx.saved_tensors)
    x, y = _Inputs(*islice(tensors, 17)), next(tensors)
    p = _Prepared(*islice(tensors, 5)) if ctx.options.keep_prepared else None
    return x, y, p, Saved(tuple(tensors), ctx.plan)


def _vector_gradients(
    sums: Tensor | None, vectors: tuple[Tensor | None, ...], train: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """From partial sums (SLOTS, runs, D) to gradients like the vectors, None for those that do not train."""
    if sums is None:
        return (None,) * SLOTS
    total = sums.sum(1)
    return tuple(
        total[i].view_as(vector).to(vector.dtype) if vector is not None and train[i] else None
        for i, vector in enumerate(vectors)
    )
