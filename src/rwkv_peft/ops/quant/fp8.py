"""fp8 (e4m3) with a scale for each row, and products in fp8 where a GPU has them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import triton
from ..matrix import QuantizedLinear
from .blocks import PART, parts

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
NAN = 127  # its bits but the sign


class Fp8Linear(QuantizedLinear):
    """One byte a weight: W = scale · values, with a scale a row."""

    quant = "fp8"
    weight: Tensor
    """(O,I) e4m3."""
    scale: Tensor
    """(O,1) float32."""

    @classmethod
    def stored(cls, weight: Tensor) -> dict[str, Tensor]:
        if weight.dtype.itemsize == 1:  # fp8 already, without a scale: torch computes little with it
            weight = weight.bfloat16()
        # times a number: a division by one is rounded otherwise on a GPU
        scale = weight.abs().amax(1, keepdim=True).float().clamp_(min=1e-30) * (1 / LARGEST)
        values = torch.empty_like(weight, dtype=E4M3, memory_format=torch.contiguous_format)
        for rows in parts(len(weight), max(1, PART // weight.shape[1])):
            values[rows] = (weight[rows].float() / scale[rows]).to(E4M3)
        return {"weight": values, "scale": scale}

    @staticmethod
    def layout(rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"weight": ((rows, columns), E4M3), "scale": ((rows, 1), torch.float32)}

    def is_finite(self) -> bool:
        return super().is_finite() and not bool((self.weight.view(torch.uint8) & 127 == NAN).any())

    def times(self, x: Tensor) -> Tensor:
        if not self.multiplies(x):
            return super().times(x)
        values, scale = triton.rows_to_fp8(x)
        return _product(values, self.weight, scale, self.scale, x.dtype)

    def back(self, dy: Tensor) -> Tensor:
        if not self.multiplies(dy):
            return super().back(dy)
        # the scales of W's rows cannot leave a sum over these, so they go into what is rounded
        values, scale = triton.rows_to_fp8(dy, self.scale.view(-1))
        return _product(values, triton.turned(self.weight), scale, self.scale.new_ones(self.in_features, 1), dy.dtype)

    def multiplies(self, x: Tensor) -> bool:
        """Whether a product with x can be one of fp8 numbers."""
        fits = self.out_features % 16 == 0 and self.in_features % 16 == 0 and len(x) > 0
        return x.is_cuda and x.dtype == torch.bfloat16 and fits and has_fp8(x.device)

    def dense(self, dtype: torch.dtype | None = None, rows: slice = slice(None)) -> Tensor:
        return (self.weight[rows].float() * self.scale[rows]).to(dtype or self.dtype)

    def to_file(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "weight_scale": self.scale}

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"weight": tensors["weight"], "scale": tensors["weight_scale"].float().view(-1, 1)}


@cache
def has_fp8(device: torch.device) -> bool:
    """Whether products of fp8 numbers that have a scale a row run on a device: with this card and this torch."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9) or not triton.is_installed():
        return False
    ones, scale = torch.ones(16, 16, device=device).to(E4M3), torch.ones(16, 1, device=device)
    try:
        found = _product(ones, ones, scale, scale, torch.bfloat16)
    except RuntimeError:
        return False
    return bool((found == 16).all())


def _product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """a (n,I) bᵀ for b (O,I), both e4m3, with their scales (n,1) and (O,1)."""
    return torch._scaled_mm(a, b.T, scale_a, scale_b.T, out_dtype=dtype, use_fast_accum=True)
