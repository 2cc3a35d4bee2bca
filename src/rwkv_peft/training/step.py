"""One micro-batch: its loss, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from ..data.batches import Batch
from ..models import Rwkv
from ..models.layers import Documents
from ..ops.loss import next_token_loss
from .graphs import Graphs, why_not


def batch_loss(model: Rwkv, batch: Batch, logit_penalty: float) -> tuple[Tensor, Tensor]:
    """Sums over the batch's target tokens: of cross-entropy and logit penalty, to train on; of cross-entropy alone."""
    device = model.like.device
    tokens, positions, labels = (x.to(device, non_blocking=True) for x in (batch.tokens, batch.positions, batch.labels))
    return loss_at(model, Documents(tokens, batch.cu_seqlens), positions, labels, logit_penalty)


def loss_at(
    model: Rwkv, documents: Documents, positions: Tensor, labels: Tensor, logit_penalty: float
) -> tuple[Tensor, Tensor]:
    """As `batch_loss`, of tensors on the model's device. Only the places that predict a target reach the head."""
    places = model.hidden_of(documents).flatten(0, 1).index_select(0, positions)
    return next_token_loss(places, model.head, labels, logit_penalty)


class MicroBatches:
    """Runs micro-batches forward and backward, as CUDA graphs where they can be; the gradients add up in `.grad`.

    `alone`: a step has one micro-batch, and there is nothing to add up.
    """

    def __init__(
        self,
        model: Rwkv,
        logit_penalty: float,
        backward: Callable[[Tensor], None],
        graphs: bool = False,
        alone: bool = False,
    ) -> None:
        self.model, self.logit_penalty, self.backward = model, logit_penalty, backward
        self.graphs: Graphs | None = None
        trained = [p for p in model.parameters() if p.requires_grad]
        if graphs and not why_not(model):
            compute = partial(_forward_and_backward, model, logit_penalty, backward)
            self.graphs = Graphs(compute, model.like.device, trained if alone else [])
        self.keeps_gradients = self.graphs is not None and not alone  # graphs add to them where they are
        if self.keeps_gradients:
            for p in trained:  # side by side: made among activations, they would leave the memory in pieces
                p.grad = torch.zeros_like(p)

    def run(self, batch: Batch, targets: int) -> Tensor:
        """The batch's share of the mean cross-entropy of a step that has so many `targets`; a scalar without gradient.

        The gradients are of the loss with the penalty, divided by `targets`.
        """
        if self.graphs is not None and self.graphs.takes(batch):
            return self.graphs.run(batch, 1 / targets)
        with self.memory():
            if self.graphs is not None:
                self.graphs.renew()
            total, loss = batch_loss(self.model, batch, self.logit_penalty)
            _backward(self.model, self.backward, total / targets)
            return loss / targets

    def memory(self) -> AbstractContextManager[None]:
        """Where other things can be computed in the memory that micro-batches take, and do not need meanwhile."""
        return self.graphs.memory() if self.graphs is not None else nullcontext()


def _forward_and_backward(
    model: Rwkv,
    logit_penalty: float,
    backward: Callable[[Tensor], None],
    documents: Documents,
    positions: Tensor,
    labels: Tensor,
    factor: Tensor,
) -> Tensor:
    """What a graph is made of. It does not know who asks for it, so that both are gone as soon as nobody needs them."""
    total, loss = loss_at(model, documents, positions, labels, logit_penalty)
    _backward(model, backward, total * factor)
    return loss * factor


def _backward(model: Rwkv, backward: Callable[[Tensor], None], total: Tensor) -> None:
    backward(total)
    model.keep.settle()
