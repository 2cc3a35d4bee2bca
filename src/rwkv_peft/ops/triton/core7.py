"""RWKV-7's time-mix between its projections and its output matrix: two passes forward, two backward, and the operator.

Before the operator `_prepare` makes decay, keys, values, removal key and learning rate; after it `_finish` normalises
heads, adds the bonus of the current token and gates. Going back, `_finish_backward` makes again what was prepared,
which is cheaper than to keep it, and `_prepare_backward` writes gradients over those they come from. One autograd
function holds it all, with the operator's raw forward and backward inside.

A program takes HEADS neighbouring heads and walks over `run` tokens, a tile of ROWS pairs of token and head at a time;
meanwhile it adds up the gradients of the vectors, and leaves one partial sum of each. All math is in float32.

Axes: B rows, T tokens, D width, H heads, N head size, S documents. Formulas: `pieces.core7`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import pieces
from ..pieces import Documents, Vectors7
from ..raw import Raw, Saved
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
        plan.launch(_prepare, *x.sources, *p, FIRST=x.v_low is None)
        y, final, saved = options.raw.forward(*plan.by_head(x.r, *p), x.state, options.cu_seqlens, options.keep)
        out = torch.empty_like(x.r)
        plan.launch(_finish, y, x.r, p.k, p.v, x.gate, x.r_k, x.weight, x.bias, out, options.eps)
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
        plan.launch(_finish_backward, *x.sources, *p, *after, KEPT=kept, TRAIN=any(train[5:]), **flags)
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
        plan.launch(_prepare_backward, *x.sources, *into, TRAIN=any(train[:5]), **flags)
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


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _over_head(x):
    return tl.sum(x, 1)[:, None]


@triton.jit
def _load(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _vector(ptr, channel):
    return tl.load(ptr + channel).to(tl.float32)


@triton.jit
def _place(run, H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Where this program begins: its first token and that token's offset; a tile's tokens from there and channels."""
    row = tl.arange(0, ROWS)[:, None]
    channel = (tl.program_id(0) * HEADS + row % HEADS) * N + tl.arange(0, N)[None, :]
    first = tl.program_id(1) * run
    return first, first.to(tl.int64) * (H * N), row // HEADS, channel


@triton.jit
def _put_sum(sums, slot, x, H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Write x (ROWS,N) summed over its tokens as this program's part of a row of sums (SLOTS, runs, D)."""
    total = tl.sum(tl.reshape(x, (ROWS // HEADS, HEADS * N)), 0)
    row = (slot * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (H * N)
    tl.store(sums + row + tl.program_id(0) * (HEADS * N) + tl.arange(0, HEADS * N), total)


@triton.jit
def _normalise(x):
    """x divided by its head's norm, and what it was divided by; as torch.nn.functional.normalize."""
    norm = tl.maximum(tl.sqrt(_over_head(x * x)), 1e-12)
    return x / norm, norm


@triton.jit
def _standardise(y, eps, N: tl.constexpr):
    """y less its head's mean, over the deviation; and the inverse of that."""
    centred = y - _over_head(y) / N
    scale = 1.0 / tl.sqrt(_over_head(centred * centred) / N + eps)
    return centred * scale, scale


@triton.jit
def _make(
    k_ptr, v_ptr, w_low, a_low, v_low, v_first, at, inside, w0, a0, v0, k_k, k_a,
    w_out, k_out, v_out, kk_out, iclr_out, FIRST: tl.constexpr,
):  # fmt: skip
    """Make and store a tile of the operator's inputs; its k and v."""
    k, v = _load(k_ptr, at, inside), _load(v_ptr, at, inside)
    w = -_softplus(-(w0 + _load(w_low, at, inside))) - 0.5
    tl.store(w_out + at, w, mask=inside)
    kk, _ = _normalise(k * k_k)
    tl.store(kk_out + at, kk, mask=inside)
    iclr = _sigmoid(a0 + _load(a_low, at, inside))
    tl.store(iclr_out + at, iclr, mask=inside)
    k = k * (1.0 + (iclr - 1.0) * k_a)
    tl.store(k_out + at, k, mask=inside)
    if not FIRST:
        v += (_load(v_first, at, inside) - v) * _sigmoid(v0 + _load(v_low, at, inside))
        tl.store(v_out + at, v, mask=inside)
    return k, v


@triton.jit
def _prepare(
    k_ptr, v_ptr, w_low, a_low, v_low, v_first, w0_ptr, a0_ptr, v0_ptr, k_k_ptr, k_a_ptr,
    w_out, k_out, v_out, kk_out, iclr_out,
    tokens, run, H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    first, home, token, channel = _place(run, H, N, HEADS, ROWS)
    w0, a0 = _vector(w0_ptr, channel), _vector(a0_ptr, channel)
    k_k, k_a = _vector(k_k_ptr, channel), _vector(k_a_ptr, channel)
    v0 = a0 if FIRST else _vector(v0_ptr, channel)
    for start in range(0, run, ROWS // HEADS):
        at, inside = home + (start + token) * (H * N) + channel, first + start + token < tokens
        _make(
            k_ptr, v_ptr, w_low, a_low, v_low, v_first, at, inside, w0, a0, v0, k_k, k_a,
            w_out, k_out, v_out, kk_out, iclr_out, FIRST,
        )  # fmt: skip


@triton.jit
def _finish(
    y_ptr, r_ptr, k_ptr, v_ptr, gate_ptr, r_k_ptr, weight_ptr, bias_ptr, out_ptr, eps,
    tokens, run, H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first, home, token, channel = _place(run, H, N, HEADS, ROWS)
    r_k, weight, bias = _vector(r_k_ptr, channel), _vector(weight_ptr, channel), _vector(bias_ptr, channel)
    for start in range(0, run, ROWS // HEADS):
        at, inside = home + (start + token) * (H * N) + channel, first + start + token < tokens
        y, _ = _standardise(_load(y_ptr, at, inside), eps, N)
        strength = _over_head(_load(r_ptr, at, inside) * _load(k_ptr, at, inside) * r_k)
        out = y * weight + bias + strength * _load(v_ptr, at, inside)
        tl.store(out_ptr + at, out * _load(gate_ptr, at, inside), mask=inside)


@triton.jit
def _finish_backward(
    k_ptr, v_ptr, w_low, a_low, v_low, v_first, w0_ptr, a0_ptr, v0_ptr, k_k_ptr, k_a_ptr,
    w_out, k_out, v_out, kk_out, iclr_out, y_ptr, r_ptr, gate_ptr, r_k_ptr, weight_ptr, bias_ptr,
    dout_ptr, dy_ptr, dgate_ptr, dr_ptr, dk_ptr, dv_ptr, sums, eps,
    tokens, run, H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    FIRST: tl.constexpr, KEPT: tl.constexpr, TRAIN: tl.constexpr,
):  # fmt: skip
    """Unless KEPT, the operator's inputs are made and stored; dr, dk, dv are those of the bonus alone."""
    first, home, token, channel = _place(run, H, N, HEADS, ROWS)
    r_k, weight, bias = _vector(r_k_ptr, channel), _vector(weight_ptr, channel), _vector(bias_ptr, channel)
    if not KEPT:
        w0, a0 = _vector(w0_ptr, channel), _vector(a0_ptr, channel)
        k_k, k_a = _vector(k_k_ptr, channel), _vector(k_a_ptr, channel)
        v0 = a0 if FIRST else _vector(v0_ptr, channel)
    if TRAIN:
        nothing = tl.zeros((ROWS, N), tl.float32)
        dr_k, dweight, dbias = nothing, nothing, nothing
    for start in range(0, run, ROWS // HEADS):
        at, inside = home + (start + token) * (H * N) + channel, first + start + token < tokens
        if KEPT:
            k, v = _load(k_out, at, inside), _load(v_out, at, inside)
        else:
            k, v = _make(
                k_ptr, v_ptr, w_low, a_low, v_low, v_first, at, inside, w0, a0, v0, k_k, k_a,
                w_out, k_out, v_out, kk_out, iclr_out, FIRST,
            )  # fmt: skip
        y, scale = _standardise(_load(y_ptr, at, inside), eps, N)
        r, dout = _load(r_ptr, at, inside), _load(dout_ptr, at, inside)
        strength = _over_head(r * k * r_k)
        tl.store(dgate_ptr + at, dout * (y * weight + bias + strength * v), mask=inside)
        dsum = dout * _load(gate_ptr, at, inside)  # of normalised y plus bonus
        dstrength = _over_head(dsum * v)
        tl.store(dv_ptr + at, strength * dsum, mask=inside)
        tl.store(dr_ptr + at, dstrength * k * r_k, mask=inside)
        tl.store(dk_ptr + at, dstrength * r * r_k, mask=inside)
        dy = dsum * weight
        dy = scale * (dy - _over_head(dy) / N - y * (_over_head(dy * y) / N))
        tl.store(dy_ptr + at, dy, mask=inside)
        if TRAIN:
            dr_k += dstrength * r * k
            dweight += dsum * y
            dbias += dsum
    if TRAIN:
        _put_sum(sums, 5, dr_k, H, N, HEADS, ROWS)
        _put_sum(sums, 6, dweight, H, N, HEADS, ROWS)
        _put_sum(sums, 7, dbias, H, N, HEADS, ROWS)


@triton.jit
def _prepare_backward(
    k_ptr, v_ptr, w_low, a_low, v_low, v_first, w0_ptr, a0_ptr, v0_ptr, k_k_ptr, k_a_ptr,
    dw_ptr, dk_ptr, dv_ptr, dkk_ptr, diclr_ptr, dv_first_ptr, dlater_ptr, sums,
    tokens, run, H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    FIRST: tl.constexpr, TRAIN: tl.constexpr,
):  # fmt: skip
    """In place: dw, dk, dv and diclr become those of w_low, k, v and a_low; dkk becomes that of v_low."""
    first, home, token, channel = _place(run, H, N, HEADS, ROWS)
    w0, a0 = _vector(w0_ptr, channel), _vector(a0_ptr, channel)
    k_k, k_a = _vector(k_k_ptr, channel), _vector(k_a_ptr, channel)
    if not FIRST:
        v0 = _vector(v0_ptr, channel)
    if TRAIN:
        nothing = tl.zeros((ROWS, N), tl.float32)
        dw0, da0, dv0, dk_k, dk_a = nothing, nothing, nothing, nothing, nothing
    for start in range(0, run, ROWS // HEADS):
        at, inside = home + (start + token) * (H * N) + channel, first + start + token < tokens
        dw = _load(dw_ptr, at, inside) * _sigmoid(-(w0 + _load(w_low, at, inside)))
        tl.store(dw_ptr + at, dw, mask=inside)

        k, dk = _load(k_ptr, at, inside), _load(dk_ptr, at, inside)
        kk, norm = _normalise(k * k_k)
        dkk = _load(dkk_ptr, at, inside)
        dkk = (dkk - tl.where(norm > 1e-12, kk * _over_head(kk * dkk), 0.0)) / norm  # from here on, of k·k_k
        iclr = _sigmoid(a0 + _load(a_low, at, inside))
        da = (_load(diclr_ptr, at, inside) + dk * k * k_a) * iclr * (1.0 - iclr)
        tl.store(diclr_ptr + at, da, mask=inside)
        tl.store(dk_ptr + at, dk * (1.0 + (iclr - 1.0) * k_a) + dkk * k_k, mask=inside)
        if TRAIN:
            dw0 += dw
            da0 += da
            dk_k += dkk * k
            dk_a += dk * k * (iclr - 1.0)

        if FIRST:
            if dlater_ptr is not None:
                dv = _load(dv_ptr, at, inside) + _load(dlater_ptr, at, inside)
                tl.store(dv_ptr + at, dv, mask=inside)
        else:
            dv = _load(dv_ptr, at, inside)
            share = _sigmoid(v0 + _load(v_low, at, inside))
            rest = _load(v_first, at, inside) - _load(v_ptr, at, inside)
            dshare = dv * rest * share * (1.0 - share)
            tl.store(dkk_ptr + at, dshare, mask=inside)
            tl.store(dv_ptr + at, dv * (1.0 - share), mask=inside)
            if dv_first_ptr is not None:
                dv_first = dv * share
                if dlater_ptr is not None:
                    dv_first += _load(dlater_ptr, at, inside)
                tl.store(dv_first_ptr + at, dv_first, mask=inside)
            if TRAIN:
                dv0 += dshare
    if TRAIN:
        _put_sum(sums, 0, dw0, H, N, HEADS, ROWS)
        _put_sum(sums, 1, da0, H, N, HEADS, ROWS)
        _put_sum(sums, 3, dk_k, H, N, HEADS, ROWS)
        _put_sum(sums, 4, dk_a, H, N, HEADS, ROWS)
        if not FIRST:
            _put_sum(sums, 2, dv0, H, N, HEADS, ROWS)
