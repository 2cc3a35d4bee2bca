"""Learning rates and weight decays as pure functions of the step. The settings must be `resolved()`."""

from __future__ import annotations

import math

from ..config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of optimiser step `step` (from 0) of `total`, for a parameter group of `lr_scale` 1.

    It rises in a line to `lr` at step `warmup_steps - 1`, and then follows the schedule. At the last step it is
    `lr_final`, except where there is no step left to fall: `constant`, a warm-up as long as the run, a run of one step.

    cosine: half a wave from `lr` to `lr_final`. linear: a line. wsd: `lr` up to the last `wsd_decay` of all steps, then
    a line (warm-up, stable, decay; arXiv 2404.06395, and 2405.18392 for the line). constant: `lr`.
    """
    assert config.lr is not None and config.lr_final is not None
    if step < config.warmup_steps:
        return config.lr * ((step + 1) / config.warmup_steps)
    if config.schedule == "constant":
        return config.lr
    last, begin = total - 1, float(config.warmup_steps)
    if config.schedule == "wsd":
        begin = max(begin, last - config.wsd_decay * total)
    progress = share(step, begin, last)
    return between(config.lr, config.lr_final, wave(progress) if config.schedule == "cosine" else progress)


def weight_decay(config: TrainConfig, step: int, total: int) -> float:
    """The weight decay at step `step` (from 0) of `total`: half a cosine wave from the first step to the last."""
    assert config.weight_decay_final is not None
    return between(config.weight_decay, config.weight_decay_final, wave(share(step, 0, total - 1)))


def share(step: int, begin: float, end: float) -> float:
    """How much of the way from `begin` to `end` is done, from 0 to 1; 0 if it has no length."""
    return min(1.0, max(0.0, (step - begin) / (end - begin))) if end > begin else 0.0


def wave(progress: float) -> float:
    """Half a cosine wave, from 0 to 1."""
    return (1 - math.cos(math.pi * progress)) / 2


def between(first: float, last: float, progress: float) -> float:
    """From `first` at 0 to `last` at 1, exact at both."""
    way = last - first
    return first + way * progress if progress < 0.5 else last - way * (1 - progress)
