"""Loss of the next token, in chunks of tokens, so that the logits of a whole batch never exist at once.

The forward pass makes the gradients at once, while a chunk's logits are there: they are computed once, and their
gradient takes their place. Axes: n tokens that are predicted, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .linear import add_product
from .matrix import QuantizedLinear, dense_weight, has_hooks

MOST_LOGITS = 2**26  # of a chunk: 128 MiB in bf16
ALIGNED = 128  # columns of logits; products that begin elsewhere are slow
MOST_WEIGHTS = 2**25  # of a quantised head that are dense at once: 64 MiB in bf16


def next_token_loss(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, logit_penalty: float
) -> tuple[Tensor, Tensor]:
    """Sums over the n tokens: of the cross-entropy and RWKV's logit penalty, to train on; of the cross-entropy alone.

    Arguments: hidden (n,D); head from (n,D) to logits (n,V); labels (n,) int64, negative (-100) where a token does not
    count. The penalty is `logit_penalty/2 · max(logits)²`, whose gradient is `logit_penalty · max` at the largest
    logit, the first of equals: it keeps logits near 0. Divide the first result by the number of tokens that the step
    trains on; the second has no gradient. Both are float32 scalars (float64 of a float64 model). One backward pass is
    possible. Source of the penalty: L2Wrap of RWKV-LM.
    """
    is_quantised = isinstance(head, QuantizedLinear) and not has_hooks(head)
    matrix = head if is_quantised else dense_weight(head)
    if matrix is not None:
        total, loss = _HeadLoss.apply(hidden, matrix, labels, logit_penalty, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return total, loss
    chunks = chunks_of(len(hidden), int(getattr(head, "out_features", MOST_LOGITS)))
    if len(chunks) == 1:
        return _chunk_loss(hidden, head, labels, logit_penalty)
    args = [(hidden[chunk], head, labels[chunk], logit_penalty) for chunk in chunks]
    sums = [checkpoint(_chunk_loss, *arg, use_reentrant=False) for arg in args]
    return torch.stack([s[0] for s in sums]).sum(), torch.stack([s[1] for s in sums]).sum()


def chunks_of(n: int, vocab_size: int) -> list[slice]:
    """n tokens in parts of nearly one size, of at most `MOST_LOGITS` logits; at least one part."""
    most = max(1, MOST_LOGITS // max(1, vocab_size))
    size = -(-n // max(1, -(-n // most)))
    size = max(1, min(most, -(-size // 128) * 128))  # whole tiles of a GPU's product
    return [slice(i, min(n, i + size)) for i in range(0, max(1, n), size)]


def _chunk_loss(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, logit_penalty: float
) -> tuple[Tensor, Tensor]:
    total, loss = _LogitsLoss.apply(head(hidden), labels, logit_penalty)  # type: ignore[no-untyped-call]
    return total, loss


class _HeadLoss(torch.autograd.Function):
    """Of a head that is a plain matrix (V,D), or one that is stored in fewer bits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | QuantizedLinear, labels: Tensor, logit_penalty: float, trains: bool
    ) -> tuple[Tensor, Tensor]:
        head = _QuantisedHead(weight) if isinstance(weight, QuantizedLinear) else _DenseHead(weight.to(hidden.dtype))
        chunks = chunks_of(len(hidden), head.rows)
        buffer = hidden.new_empty(chunks[0].stop, head.rows)
        d_hidden = hidden.new_empty(hidden.shape) if trains and ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if trains and isinstance(weight, Tensor) and weight.requires_grad else None
        is_trained = d_hidden is not None or d_weight is not None
        sums = hidden.new_empty((len(hidden), 2), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for chunk in chunks:
            logits = buffer[: chunk.stop - chunk.start]
            head.times(hidden[chunk], logits)
            cross_entropy(logits, labels[chunk], logit_penalty, sums[chunk], logits if is_trained else None)
            if d_hidden is not None:
                head.back(logits, d_hidden[chunk])
            if d_weight is not None:
                add_product(d_weight, logits.T, hidden[chunk])
        ctx.gradients = d_hidden, d_weight
        total, loss = sums.sum(0).unbind()
        ctx.mark_non_differentiable(loss)
        return total, loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss has gone through a backward pass already, which used its gradients up")
        gradients, ctx.gradients = ctx.gradients, None
        d_hidden, d_weight = (None if gradient is None else multiply_(gradient, d_total) for gradient in gradients)
        return d_hidden, d_weight, None, None, None


class _DenseHead:
    """Products with a head (V,D)."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.rows = weight, len(weight)

    def times(self, hidden: Tensor, logits: Tensor) -> None:
        """logits (n,V) = hidden (n,D) Wᵀ."""
        torch.mm(hidden, self.weight.T, out=logits)

    def back(self, d_logits: Tensor, d_hidden: Tensor) -> None:
        """d_hidden (n,D) = d_logits (n,V) W."""
        torch.mm(d_logits, self.weight, out=d_hidden)


class _QuantisedHead:
    """The same of one whose dense weight never exists as a whole."""

    def __init__(self, matrix: QuantizedLinear) -> None:
        self.matrix, self.rows = matrix, matrix.rows
        size = max(1, MOST_WEIGHTS // matrix.in_features)
        size -= size % ALIGNED if size > ALIGNED else 0
        self.parts = [slice(i, min(self.rows, i + size)) for i in range(0, self.rows, size)]

    def times(self, hidden: Tensor, logits: Tensor) -> None:
        for part in self.parts:
            torch.mm(hidden, self.matrix.dense(hidden.dtype, part).T, out=logits[:, part])

    def back(self, d_logits: Tensor, d_hidden: Tensor) -> None:
        total = torch.empty_like(d_hidden, dtype=torch.promote_types(d_hidden.dtype, torch.float32))
        for part in self.parts:
            weight = self.matrix.dense(d_logits.dtype, part)
            add_product(total, d_logits[:, part], weight, keep=part.start > 0)
        d_hidden.copy_(total)


class _LogitsLoss(torch.autograd.Function):
    """Of logits (n,V) that any head made."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, logit_penalty: float) -> tuple[Tensor, Tensor]:
        sums = logits.new_empty((len(logits), 2), dtype=torch.promote_types(logits.dtype, torch.float32))
        cross_entropy(logits, labels, logit_penalty, sums, None)
        ctx.save_for_backward(logits, labels)
        ctx.logit_penalty = logit_penalty
        total, loss = sums.sum(0).unbind()
        ctx.mark_non_differentiable(loss)
        return total, loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        cross_entropy(logits, labels, ctx.logit_penalty, None, gradient)
        return multiply_(gradient, d_total), None, None


def multiply_(x: Tensor, factor: Tensor) -> Tensor:
    """x (n,m) times a scalar tensor, in place; rounded once, though the factor may be more precise than x."""
    return torch.mul(x, factor.view(1, 1), out=x)


def cross_entropy(
    logits: Tensor, labels: Tensor, logit_penalty: float, sums: Tensor | None, gradient: Tensor | None
) -> None:
    """Of each row: `sums` (n,2), the loss with the penalty and without; `gradient` (n,V) of the former by the logits.

    Either may be None. `gradient` may be `logits` (n,V) itself. The kernel on a GPU, else the formula.
    """
    if logits.is_cuda and logits.dtype != torch.float64 and has_triton():
        from .triton.loss import cross_entropy as kernel

        kernel(logits, labels, logit_penalty, sums, gradient)
    else:
        plain_cross_entropy(logits, labels, logit_penalty, sums, gradient)


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def plain_cross_entropy(
    logits: Tensor, labels: Tensor, logit_penalty: float, sums: Tensor | None, gradient: Tensor | None
) -> None:
    """As `cross_entropy`, in float32 inside."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts, label = labels >= 0, labels.clamp(min=0)[:, None]
    normaliser = torch.logsumexp(x, 1, keepdim=True)
    largest, place = x.max(1, keepdim=True)
    if sums is not None:
        loss = normaliser - x.gather(1, label)
        rows = torch.cat((loss + logit_penalty / 2 * largest.square(), loss), 1)
        sums.copy_(rows.masked_fill_(~counts[:, None], 0))
    if gradient is not None:
        d = x.sub(normaliser).exp_()
        d.scatter_add_(1, label, torch.full_like(largest, -1)).scatter_add_(1, place, logit_penalty * largest)
        gradient.copy_(d.masked_fill_(~counts[:, None], 0))
