"""PEFT's side of a model: kept in `model.foreign`, which nn.Module does not see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .config import library

NAME = "default"  # PEFT's name of an adapter that is alone


@dataclass
class Foreign:
    """PEFT's side of a model."""

    peft: Any
    """The `PeftModel` around the model."""
    total_step: int | None
    """AdaLoRA's number of steps, if it was given."""
    trained: set[str] = field(default_factory=set)
    """Names in the model of what the adapter trains."""
    unmerged: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    """While the adapter is merged: parameters of the base, and their values before."""

    @property
    def config(self) -> Any:
        return self.peft.peft_config[NAME]


def of(model: nn.Module) -> Foreign | None:
    """PEFT's side of the model, if it has an adapter of PEFT's."""
    return getattr(model, "foreign", None)


def layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by the names of what they adapt."""
    kind = library("peft.tuners.tuners_utils").BaseTunerLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def is_merged(model: nn.Module) -> bool:
    """Whether the adapter is in the weights now."""
    found = of(model)
    return found is not None and bool(found.unmerged)


def parameters(model: nn.Module) -> set[str]:
    """Names in the model of what the adapter trains; none if the model has no such adapter."""
    found = of(model)
    return set(found.trained) if found else set()
