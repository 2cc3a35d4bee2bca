"""The loss on examples that are not trained on, the best adapter by it, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.sampling import Sampler
from ..models import Rwkv
from .engine import SingleProcess
from .step import batch_loss


@dataclass
class Evaluation:
    """Measures every `every` steps and at the last one; keeps the best."""

    sampler: Sampler
    """The examples in a fixed order."""
    every: int
    patience: int | None
    """Measurements without a new best one before `is_over`."""
    keep: Callable[[], Path]
    """Saves what is trained now as the best so far."""
    losses: dict[int, float] = field(default_factory=dict)
    """By step, which counts from 1."""
    best: Path | None = None

    @property
    def best_step(self) -> int:
        """The step after which the loss was lowest; the first of equals."""
        return min(self.losses, key=lambda step: self.losses[step])

    @property
    def is_over(self) -> bool:
        """Whether the best one is too long ago."""
        if self.patience is None or not self.losses:
            return False
        return sum(step > self.best_step for step in self.losses) >= self.patience

    def measure(self, model: Rwkv, step: int, engine: SingleProcess) -> float:
        """Mean cross-entropy of all targets, in nats; what is trained now is kept if it is the lowest so far."""
        loss = evaluate(model, self.sampler, engine)
        self.losses[step] = loss
        if math.isfinite(loss) and self.best_step == step:
            self.best = self.keep()
        return loss


@torch.no_grad()
def evaluate(model: Rwkv, sampler: Sampler, engine: SingleProcess) -> float:
    """Mean cross-entropy, in nats, of every target token of the sampler's first epoch; dropout is off meanwhile."""
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    targets = 0
    for step in range(sampler.steps(0, engine.world_size)):
        for batch in sampler.step(step, engine.rank, engine.world_size):
            total += batch_loss(model, batch, 0.0)[1].double().cpu()
            targets += len(batch.labels)
    model.train(was_training)
    return engine.sum(float(total)) / engine.sum(targets)
