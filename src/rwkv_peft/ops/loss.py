"""Loss of the next token, in chunks of tokens, so that the logits of a whole batch never exist at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MOST_LOGITS = 2**24  # 64 MiB in float32


def next_token_loss(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, logit_penalty: float
) -> tuple[Tensor, Tensor]:
    """Sums over the n tokens of the cross-entropy, and of RWKV's logit penalty.

    Arguments: hidden (n,D); head from (n,D) to logits (n,V); labels (n,) int64.
    The penalty is `logit_penalty/2 · max(logits)²`, whose gradient is `logit_penalty · max` at the largest logit: it
    keeps logits near 0. Add both for the backward pass; divide by the number of tokens that the step trains on.
    Both results are float32 scalars. Source of the penalty: L2Wrap of RWKV-LM.
    """
    size = max(1, MOST_LOGITS // max(1, int(getattr(head, "out_features", MOST_LOGITS))))
    pieces = list(zip(torch.split(hidden, size), torch.split(labels, size), strict=True))
    if len(pieces) == 1:
        return _piece(hidden, head, labels, logit_penalty)
    sums = [checkpoint(_piece, h, head, n, logit_penalty, use_reentrant=False) for h, n in pieces]
    return torch.stack([s[0] for s in sums]).sum(), torch.stack([s[1] for s in sums]).sum()


def _piece(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, logit_penalty: float
) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    largest = logits.max(-1).values
    return F.cross_entropy(logits, labels, reduction="sum"), logit_penalty / 2 * largest.square().sum()
