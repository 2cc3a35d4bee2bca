"""A layer's matrix, dense or stored in fewer bits: what adapters call, and products with a frozen one rest on.

Axes: n tokens, I inputs, O outputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """A matrix without bias, used in the dtype of its input; (…, in) → (…, out)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Matrix(Protocol):
    """A frozen W (O,I), however it is stored."""

    @property
    def rows(self) -> int:
        """O."""

    def times(self, x: Tensor) -> Tensor:
        """x (n,I) → x Wᵀ (n,O), in the dtype of x."""

    def back(self, dy: Tensor) -> Tensor:
        """dy (n,O) → dy W (n,I), in the dtype of dy."""


class Dense(NamedTuple):
    """A matrix that is a tensor."""

    weight: Tensor

    @property
    def rows(self) -> int:
        return len(self.weight)

    def times(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def back(self, dy: Tensor) -> Tensor:
        return dy @ self.weight


class QuantizedLinear(Linear, ABC):
    """A frozen matrix stored in 8 or 4 bits a weight. It is a `Matrix`, and its buffers are what is stored.

    `dtype` is that of the model's activations, in which `dense` gives the weight where nothing else is asked for.
    """

    quant: ClassVar[str]
    """As `--quant` calls it."""

    def __init__(self, shape: tuple[int, int], stored: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # there is no weight to train
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self.register_parameter("bias", None)
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)

    @classmethod
    @abstractmethod
    def stored(cls, weight: Tensor) -> dict[str, Tensor]:
        """The buffers that hold a dense weight (O,I); on its device."""

    @staticmethod
    @abstractmethod
    def layout(rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each buffer of a matrix (O,I)."""

    @classmethod
    def blank(cls, weight: Tensor) -> dict[str, Tensor]:
        """As `stored`, on the meta device: without values, but those that `to_file` writes as text."""
        layout = cls.layout(weight.shape[0], weight.shape[1])
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in layout.items()}

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None, rows: slice = slice(None)) -> Tensor:
        """The weight (O,I), or these rows of it, as they are computed with."""

    @abstractmethod
    def to_file(self) -> dict[str, Tensor]:
        """What a model file holds in the place of the weight, by what follows the matrix's name."""

    @classmethod
    @abstractmethod
    def from_file(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """The buffers, from what `to_file` gives, and the settings among it."""

    @classmethod
    def bytes_of(cls, rows: int, columns: int) -> int:
        """How many the buffers of a matrix (O,I) take."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in cls.layout(rows, columns).values())

    @property
    def rows(self) -> int:
        return self.out_features

    def is_finite(self) -> bool:
        """Whether the weight holds neither NaN nor Inf."""
        return all(bool(b.isfinite().all()) for b in self.buffers() if b.dtype == torch.float32)

    def times(self, x: Tensor) -> Tensor:
        return x @ self.dense(x.dtype).T

    def back(self, dy: Tensor) -> Tensor:
        return dy @ self.dense(dy.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        return f"{self.quant}, in_features={self.in_features}, out_features={self.out_features}"


class _Product(torch.autograd.Function):
    """x Wᵀ for a frozen W, of which nothing is kept but W as it is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix, ctx.shape = matrix, x.shape
        return matrix.times(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], matrix.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix.back(dy.reshape(-1, dy.shape[-1])).view(ctx.shape), None


def dense_weight(layer: Any) -> Tensor | None:
    """The weight (O,I) of a layer that does nothing but multiply by it; None for any other.

    One with a bias, with hooks, of a class of its own, or whose weight is stored in another form (quantised, sharded)
    is another.
    """
    if type(layer) not in (nn.Linear, Linear) or layer.bias is not None or has_hooks(layer):
        return None
    is_dense = type(layer.weight) in (nn.Parameter, Tensor) and layer.weight.is_floating_point()
    return layer.weight if is_dense else None


def frozen_matrix(layer: object, x: Tensor) -> Matrix | None:
    """The matrix of a layer that only multiplies by it, if it does not train and suits the dtype of its input `x`."""
    if isinstance(layer, QuantizedLinear):
        return None if has_hooks(layer) else layer
    weight = dense_weight(layer)
    fits = weight is not None and not weight.requires_grad and weight.dtype == x.dtype
    return Dense(weight) if weight is not None and fits else None


def has_hooks(layer: nn.Module) -> bool:
    """Whether calling the layer does more than its forward."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(map(bool, hooks))
