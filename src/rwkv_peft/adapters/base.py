"""What every adapter method shares: it takes a matrix's place in the model, and the matrix keeps its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import AdapterConfig
from ..errors import ConfigError
from ..ops.matrix import Matrix, QuantizedLinear, frozen_matrix
from .saved import GENERAL

TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")  # the tensors tell as much


def unshortened(x: Tensor) -> Tensor:
    """x in float32, if it has fewer bits."""
    return x.float() if x.dtype.itemsize < 4 else x


class AdaptedLinear(nn.Module, ABC):
    """A frozen base matrix with trained tensors beside it: y = W x + delta(x).

    The base is only called, or asked for its dense weight, so that any linear layer can be one. It shares its
    parameters and buffers with this module instead of being its child: so `blocks.0.att.key.weight` keeps that name,
    and the trained tensors are `blocks.0.att.key.<tensor>`. Further adapters of the same matrix are in `others`, and
    each adds what it would add alone.
    """

    tensors: ClassVar[tuple[str, ...]]
    """Every name that a tensor of this method can have in an adapter folder, within its matrix."""
    entries: ClassVar[tuple[str, ...]] = ()
    """Of PEFT's `adapter_config.json`, those that `from_peft` knows, or that change nothing."""
    peft_type: ClassVar[str]
    """PEFT's name of the method; one that PEFT has not, where it has no such method."""

    def __init__(self, base: nn.Linear, config: AdapterConfig, beside: bool = False) -> None:
        """`beside` another adapter of the base, which has the base's names already. Values come from `reset`."""
        self.check(config, base.in_features, base.out_features)
        super().__init__()
        if not beside:
            self._parameters = base._parameters
            self._buffers = base._buffers
        self._base = (base,)  # in a tuple, which hides it from nn.Module
        self._unmerged: tuple[Tensor, ...] = ()  # the base's weight while the adapter is merged into it
        self.config = config
        self.in_features, self.out_features = base.in_features, base.out_features
        self.others = nn.ModuleList()

    @property
    def is_merged(self) -> bool:
        return bool(self._unmerged)

    @property
    def base(self) -> nn.Linear:
        return self._base[0]

    @staticmethod
    def check(config: AdapterConfig, in_features: int, out_features: int) -> None:
        """Raise ConfigError if these settings do not fit a matrix (out, in)."""

    @property
    def number(self) -> torch.dtype:
        """The dtype that the base is computed with."""
        return self.base.dtype if isinstance(self.base, QuantizedLinear) else self.base.weight.dtype

    def dense(self) -> Tensor:
        """The base's weight (out, in) as it is computed with."""
        return self.base.dense() if isinstance(self.base, QuantizedLinear) else self.base.weight.detach()

    @abstractmethod
    def reset(self, original: Callable[[], Tensor] | None = None) -> None:
        """Give the trained tensors the values that they start from.

        `original` gives the weight (out, in) as it was before it was quantised, where it was.
        """

    @abstractmethod
    def delta(self, x: Tensor, product: Tensor) -> Tensor:
        """What the adapter adds to the base's `product` (…, out) of x (…, in)."""

    def fused(self, x: Tensor, matrix: Matrix) -> Tensor | None:
        """All of `by_formula` in the fewest passes, for a frozen base; None where these settings need the formula."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        if self._unmerged:
            merged: Tensor = self.base(x)
            return merged
        matrix = None if len(self.others) else frozen_matrix(self.base, x)
        total = None if matrix is None else self.fused(x, matrix)
        return self.by_formula(x) if total is None else total

    def by_formula(self, x: Tensor) -> Tensor:
        """What `forward` is, whatever the base is."""
        product: Tensor = self.base(x)
        total = product + self.delta(x, product)
        for other in self.others:
            total = total + other.delta(x, product)  # type: ignore[operator]
        return total

    def merge(self) -> None:
        """Add every adapter of the matrix to its weight; the weight as it was is kept for `unmerge`."""
        if self._unmerged:
            return
        if isinstance(self.base, QuantizedLinear):
            raise ConfigError(f"merge_adapter: the base is {self.base.quant}; load it with quant='none'")
        weight = self.base.weight
        self._unmerged = (weight.data,)
        merged = self.merged(weight.data, self.to_file(), self.config)
        for other in self.others:
            assert isinstance(other, AdaptedLinear)
            merged = merged + (other.merged(weight.data, other.to_file(), other.config) - weight.data.float())
        weight.data = merged.to(weight.dtype)

    def unmerge(self) -> None:
        """Put the weight back, to the bit."""
        if self._unmerged:
            self.base.weight.data = self._unmerged[0]
            self._unmerged = ()

    @classmethod
    def owns(cls, name: str) -> bool:
        """Whether a tensor of this name in an adapter folder can be one of the method."""
        return name.endswith(tuple(f".{own}" for own in cls.tensors))

    def trained(self) -> dict[str, nn.Parameter]:
        """The adapter's own parameters by name."""
        own = dict(self.named_parameters())
        return {name: own[name] for name in self.tensors if name in own}

    def to_file(self) -> dict[str, Tensor]:
        """The tensors as an adapter folder has them: in float32, however they are kept in training."""
        return {name: unshortened(parameter.data) for name, parameter in self.trained().items()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of `tensors`, which are in the form of `to_file`."""
        for name, parameter in self.trained().items():
            parameter.data = tensors[name].to(parameter.device, torch.float32, copy=True)

    @staticmethod
    @abstractmethod
    def merged(weight: Tensor, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
        """The dense weight (out, in), float32, of a base `weight` with the adapter's `tensors` (`to_file`) added."""

    @staticmethod
    @abstractmethod
    def to_peft(config: AdapterConfig) -> dict[str, Any]:
        """The method's own entries of PEFT's `adapter_config.json`."""

    @classmethod
    def reads(cls, settings: Mapping[str, Any]) -> bool:
        """Whether `from_peft` knows all that these entries ask for; if not, the folder is left to PEFT itself."""
        known = {*GENERAL, *TARGETS, *cls.entries}
        return all(key in known or not value or (key, value) == ("bias", "none") for key, value in settings.items())

    @staticmethod
    @abstractmethod
    def from_peft(settings: Mapping[str, Any]) -> AdapterConfig:
        """The settings, without targets, that these entries mean. Raises KeyError, TypeError or ValueError."""
