"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from ..adapters import extra_loss
from ..config import TrainConfig
from ..data.sampling import Sampler
from ..errors import TrainingError
from ..models import Rwkv
from .engine import SingleProcess
from .evaluation import Evaluation
from .metrics import Metrics, StepRecord
from .optim import set_rates
from .step import batch_loss


def train_loop(
    config: TrainConfig,
    model: Rwkv,
    sampler: Sampler,
    optimizer: torch.optim.Optimizer,
    engine: SingleProcess,
    metrics: Metrics,
    stopped: Callable[[], bool],
    evaluation: Evaluation | None = None,
) -> None:
    """Train until the last step, until `stopped()`, or until the evaluation says that it gets no better.

    The loss of a step is the sum over its target tokens divided by their number, over all micro-batches and processes:
    how the step is cut into micro-batches does not change it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    tokens_seen = 0
    for step in range(metrics.total_steps):
        began = time.perf_counter()
        batches = sampler.step(step, engine.rank, engine.world_size)
        targets = engine.sum(sum(len(batch.labels) for batch in batches))
        step_loss = model.like.new_zeros((), dtype=torch.float32)
        for batch in batches:
            loss, penalty = batch_loss(model, batch, config.logit_penalty)
            engine.backward((loss + penalty) / targets)
            step_loss += loss.detach() / targets
        extra = extra_loss(model)
        if extra is not None:
            engine.backward(extra)

        lr = set_rates(optimizer, config, step, metrics.total_steps)
        norm = engine.clip(trained, config.clip)
        loss_value, norm_value = torch.stack((step_loss, norm)).tolist()
        check_finite(step + 1, loss_value, norm_value)
        engine.step(optimizer)

        tokens = engine.sum(sum(batch.inputs for batch in batches))
        tokens_seen += tokens
        speed = tokens / (time.perf_counter() - began)
        record = StepRecord(step + 1, tokens_seen, loss_value, lr, norm_value, speed)
        if evaluation and (step + 1 == metrics.total_steps or (step + 1) % evaluation.every == 0):
            record.eval_loss = evaluation.measure(model, step + 1, engine)
        metrics.add(record)
        if stopped() or (evaluation and evaluation.is_over):
            break


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raise TrainingError if the loss or the gradient is NaN or Inf; the parameters are those of the step before."""
    for what, value in (("loss", loss), ("gradient", norm)):
        if not math.isfinite(value):
            raise TrainingError(f"step {step}: the {what} is {value}; try a lower --lr, or --precision fp32")
