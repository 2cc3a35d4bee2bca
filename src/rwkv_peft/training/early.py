"""Steps that are taken within the backward pass, so that the gradients of a whole model never exist at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import is_foreign
from ..config import TrainConfig
from ..models import Rwkv
from ..ops.adam import Rates
from .adamw import LeanAdamW


def early_steps(config: TrainConfig, model: Rwkv, optimizer: torch.optim.Optimizer, alone: bool) -> EarlySteps | None:
    """What takes the steps of a run, if they can be; `alone`: a step is one backward pass, whose gradients are its own.

    An adapter of PEFT's may have a loss of its own, which goes backward after the other.
    """
    if not isinstance(optimizer, LeanAdamW) or not alone or config.clip > 0 or is_foreign(model):
        return None
    return EarlySteps(optimizer, [p for p in model.parameters() if p.requires_grad])


class EarlySteps:
    """Changes each parameter as soon as its gradient is there, and drops that.

    For steps of one backward pass whose gradients nothing need see together: no clipping, no sum over micro-batches or
    processes. A gradient that is NaN or Inf changes nothing, nor does any that comes after; what came before it in the
    same pass has been used by then.
    """

    def __init__(self, optimizer: LeanAdamW, parameters: Sequence[Tensor]) -> None:
        self.optimizer = optimizer
        self.rates: dict[Tensor, Rates] = {}
        self.square = self.before = torch.zeros_like(optimizer.found_inf)
        for p in parameters:
            p.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """To be called before the backward pass, when the rates of the groups are set."""
        groups = self.optimizer.param_groups
        each = zip(groups, self.optimizer.next_rates(), strict=True)
        self.rates = {p: rates for group, rates in each for p in group["params"]}
        self.square, self.before = torch.zeros_like(self.square), self.optimizer.found_inf

    def norm(self) -> Tensor:
        """Of all gradients since `begin`, which are gone."""
        return self.square.sqrt()

    def _take(self, p: Tensor) -> None:
        assert p.grad is not None
        self.square = self.square + torch.linalg.vector_norm(p.grad, dtype=torch.float32).square()
        self.optimizer.found_inf = self.before + self.square * 0  # NaN, which is not 0, if the sum is not finite
        self.optimizer.change(p, self.rates[p])
        p.grad = None
