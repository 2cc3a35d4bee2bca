"""The training loop."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..adapters import extra_loss
from ..config import TrainConfig
from ..data.sampling import Sampler
from ..models import Rwkv
from .early import early_steps
from .engine import SingleProcess
from .evaluation import Evaluation
from .metrics import Metrics
from .optim import set_rates
from .outcome import Guard, Log, Outcome
from .step import MicroBatches


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
    one = config.grad_accum == 1
    micro_batches = MicroBatches(model, config.logit_penalty, engine.backward, config.graphs, alone=one)
    early = early_steps(config, model, optimizer, alone=one and not micro_batches.graphs and engine.world_size == 1)
    guard, log = Guard(optimizer, model.like.device), Log(metrics)
    for step in range(metrics.total_steps):
        batches = sampler.step(step, engine.rank, engine.world_size)
        targets = engine.sum(sum(len(batch.labels) for batch in batches))
        lr = set_rates(optimizer, config, step, metrics.total_steps)
        if early:
            early.begin()
        loss = model.like.new_zeros((), dtype=torch.float32)
        for batch in batches:
            loss += micro_batches.run(batch, targets)
        extra = extra_loss(model)
        if extra is not None:
            engine.backward(extra)

        outcome = Outcome(step + 1, loss, early.norm() if early else engine.clip(trained, config.clip))
        guard.check(outcome)
        if not early:
            engine.step(optimizer, keep_gradients=micro_batches.keeps_gradients)

        log.add(outcome, lr, engine.sum(sum(batch.inputs for batch in batches)))
        if evaluation and (step + 1 == metrics.total_steps or (step + 1) % evaluation.every == 0):
            outcome.read()
            with micro_batches.memory():
                log.write(evaluation.measure(model, step + 1, engine))
        elif guard.waits:
            log.write()
        if stopped() or (evaluation and evaluation.is_over):
            break
    log.write()
