"""Settings of a memory plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from .common import ADVANCED
from .train import TrainConfig


@dataclass
class PlanConfig(TrainConfig):
    """Say what a run would need of the GPU, of RAM and of the disk, from the model's header alone."""

    data: Annotated[list[str], ADVANCED] = field(default_factory=list)
    """Not needed here."""
    out: Annotated[Path, ADVANCED] = Path("out")
    """Not needed here."""
    fit: str = ""
    """Memory to fit into, e.g. `12GiB` or `12000MiB`: settings with which the run fits are proposed."""
    card: str = ""
    """Card that the run is for: its memory, e.g. `24GiB`, or `H100`. [the GPU of this machine, if it has one]"""
    device: str = "cuda"
    """`cuda` or `cuda:N`, which need not be there, or `cpu`."""

    def check_reading(self) -> None:
        """As of a run, where data are named."""
        if self.data:
            super().check_reading()
