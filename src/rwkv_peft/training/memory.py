"""The memory plan of a run: told at its beginning, and where memory ends after all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ..adapters import SavedAdapter
from ..config import TrainConfig
from ..errors import ConfigError, TrainingError, is_out_of_memory
from ..loading import find_device
from ..plan import Card, Outline, Plan, advice, card_here, plan, ram_warning
from ..plan.memory import MARGIN, gib
from ..plan.weights import is_foreign

SHARE = 0.9  # of what was to be had, that settings proposed after a failure must fit into


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to need."""

    config: TrainConfig
    """Resolved."""
    saved: SavedAdapter | None
    outline: Outline
    planned: Plan

    @staticmethod
    def of(config: TrainConfig, saved: SavedAdapter | None) -> Forecast:
        """From the model's header, the settings, and what is free on the device now."""
        device, outline = find_device(config.device), Outline.of_file(config.model, config, saved)
        return Forecast(config, saved, outline, plan(config, outline, card_here(device), device.type == "cuda"))

    def check(self) -> None:
        """Raise ConfigError if the run would not fit on the GPU by far; of PEFT's own methods nothing is known."""
        if self.planned.fits(MARGIN) or is_foreign(self.config):
            return
        card = self.planned.card
        assert card.free is not None
        tip = advice(self.config, self.outline, card, self.saved)
        raise ConfigError(
            f"--device {self.config.device}: the run needs about {gib(self.planned.needs)}, {gib(card.free)} are free; "
            f"{tip}"
        )

    def lines(self) -> Iterator[str]:
        """For the beginning of a run."""
        yield f"memory {self.planned.summary()}"
        if self.planned.measured:
            yield f"time   {self.planned.time()}"
        warning = ram_warning(self.planned)
        if warning:
            yield f"note   {warning}"

    def explained(self, error: Exception) -> Exception:
        """A TrainingError of one line if `error` says that memory ended, else `error` itself."""
        if not is_out_of_memory(error) or isinstance(error, TrainingError):
            return error
        planned = self.planned
        needs = f"out of memory; the run was expected to need about {gib(planned.process)}"
        if not planned.on_gpu:
            return TrainingError(f"{needs}; try a smaller --micro-batch, --ctx-len or --rank")
        free = planned.process if planned.card.free is None else min(planned.process, planned.card.free)
        card = replace(planned.card, free=SHARE * free) if planned.card.free else Card(SHARE * free)
        had = "" if planned.card.free is None else f", and {gib(planned.card.free)} were free"
        return TrainingError(f"{needs}{had}; {advice(self.config, self.outline, card, self.saved)}")

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Where memory ends inside, `explained`."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            told = self.explained(error)
            if told is error:
                raise
            raise told from error
