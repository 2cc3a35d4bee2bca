"""What came out of a step: read when it is there, so that a GPU need not stop for it."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from ..errors import TrainingError
from .adamw import LeanAdamW
from .metrics import Metrics, StepRecord


class Outcome:
    """The loss of a step and the norm of its gradient, which a GPU may still be computing."""

    def __init__(self, step: int, loss: Tensor, norm: Tensor) -> None:
        self.step = step
        self.values = torch.stack((loss, norm.to(loss.dtype)))
        self.copy, self.event = self.values, None
        if self.values.is_cuda:
            self.copy = torch.empty(2, pin_memory=True).copy_(self.values, non_blocking=True)
            self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.event.record()

    def read(self) -> tuple[float, float]:
        """Loss and norm. Raises TrainingError if one is NaN or Inf."""
        if self.event is not None:
            self.event.synchronize()
        loss, norm = self.copy.tolist()
        for what, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                raise TrainingError(f"step {self.step}: the {what} is {value}; try a lower --lr, or --precision fp32")
        return loss, norm


class Guard:
    """Lets no NaN or Inf into the parameters.

    AdamW on a GPU is told to skip the step, and all after it, by a number there; others wait for the outcome.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.waits = device.type != "cuda" or type(optimizer) not in (torch.optim.AdamW, LeanAdamW)
        self.bad = torch.zeros((), device=device)

    def check(self, outcome: Outcome) -> None:
        """To be called before the optimiser's step. Raises TrainingError if the outcome is known to be NaN or Inf."""
        if self.waits:
            outcome.read()
            return
        self.bad = torch.maximum(self.bad, (~torch.isfinite(outcome.values).all()).float())
        self.optimizer.found_inf = self.bad  # type: ignore[attr-defined]


class Log:
    """Writes the record of a step when the next one is under way, so that nothing waits for it meanwhile."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.waiting: tuple[Outcome, float, int] | None = None
        self.tokens = 0
        self.began = time.perf_counter()

    def add(self, outcome: Outcome, lr: float, tokens: int) -> None:
        """Take a step of so many tokens, and write the one before. Raises TrainingError if that gave NaN or Inf."""
        self.write()
        self.waiting = outcome, lr, tokens

    def write(self, eval_loss: float | None = None) -> None:
        """Write the step that waits, if one does. Raises TrainingError if it gave NaN or Inf."""
        if self.waiting is None:
            return
        (outcome, lr, tokens), self.waiting = self.waiting, None
        loss, norm = outcome.read()
        self.tokens += tokens
        speed = tokens / (time.perf_counter() - self.began)
        self.metrics.add(StepRecord(outcome.step, self.tokens, loss, lr, norm, speed, eval_loss=eval_loss))
        self.began = time.perf_counter()
