"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math

from ..config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of optimiser step `step` (from 0) of `total`: warm-up from 0, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total - 1 - config.warmup_steps)
    return config.lr_final + (config.lr - config.lr_final) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
