"""One micro-batch: its loss."""

from __future__ import annotations

from torch import Tensor

from ..data.batches import Batch
from ..models import Rwkv
from ..ops.loss import next_token_loss


def batch_loss(model: Rwkv, batch: Batch, logit_penalty: float) -> tuple[Tensor, Tensor]:
    """Sums over the batch's target tokens of the cross-entropy and of the logit penalty.

    Only the places that predict a target reach the head.
    """
    device = model.like.device
    hidden, _ = model.hidden(batch.tokens.to(device, non_blocking=True), cu_seqlens=batch.cu_seqlens)
    places = hidden.flatten(0, 1)[batch.positions.to(device, non_blocking=True)]
    return next_token_loss(places, model.head, batch.labels.to(device, non_blocking=True), logit_penalty)
