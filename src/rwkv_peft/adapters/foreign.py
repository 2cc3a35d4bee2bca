"""Every other method of Hugging Face PEFT, through PEFT itself: `--peft peft:OFT`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import AdapterConfig
from ..errors import CheckpointError
from .saved import SavedAdapter


def attach(model: nn.Module, config: AdapterConfig, targets: Sequence[str]) -> None:
    """Add the adapter that PEFT has under this name to the matrices."""
    raise NotImplementedError


def load(model: nn.Module, saved: SavedAdapter, path: Path | str) -> None:
    """Add a saved adapter."""
    raise NotImplementedError


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors as PEFT saves them; none if the model has no such adapter."""
    return {}


def parameters(model: nn.Module) -> set[str]:
    """Names of the adapter's parameters in the model."""
    return set()


def settings(model: nn.Module) -> dict[str, Any]:
    """PEFT's `adapter_config.json`."""
    return {}


def merge(model: nn.Module) -> None:
    """Add the adapter to the weights."""


def unmerge(model: nn.Module) -> None:
    """Put the weights back."""


def config_of(path: Path, settings: Mapping[str, Any]) -> AdapterConfig:
    """The settings that an `adapter_config.json` means."""
    raise CheckpointError(f"{path}: holds an adapter of type {settings.get('peft_type')}; not supported")
