"""What every adapter method shares: it takes a matrix's place in the model, and the matrix keeps its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..config import AdapterConfig


class AdaptedLinear(nn.Module, ABC):
    """A frozen base matrix with trained tensors beside it.

    The base is only called, or asked for its dense weight, so that any linear layer can be one. It shares its
    parameters and buffers with this module instead of being its child: so `blocks.0.att.key.weight` keeps that name,
    and the trained tensors are `blocks.0.att.key.<tensor>`.
    """

    tensors: ClassVar[tuple[str, ...]]
    """Names of the trained tensors in this module, as the adapter folder has them."""
    peft_type: ClassVar[str]
    """PEFT's name of the method."""

    def __init__(self, base: nn.Linear, config: AdapterConfig) -> None:
        super().__init__()
        self._parameters = base._parameters
        self._buffers = base._buffers
        self._base = (base,)  # in a tuple, which hides it from nn.Module
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def base(self) -> nn.Linear:
        return self._base[0]

    def trained(self) -> dict[str, nn.Parameter]:
        """The adapter's own parameters by name."""
        return {name: self.get_parameter(name) for name in self.tensors}

    @staticmethod
    @abstractmethod
    def merged(weight: Tensor, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
        """The dense weight (out, in), float32, of a base `weight` with the adapter's `tensors` added."""

    @staticmethod
    @abstractmethod
    def to_peft(config: AdapterConfig) -> dict[str, Any]:
        """The method's own entries of PEFT's `adapter_config.json`."""

    @staticmethod
    @abstractmethod
    def from_peft(settings: Mapping[str, Any]) -> AdapterConfig:
        """The settings, without targets, that PEFT's entries mean. Raises KeyError, TypeError or ValueError."""
