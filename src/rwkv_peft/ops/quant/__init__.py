"""Matrices stored in few bits: `--quant` int8, nf4, fp4 (bitsandbytes' formats) and fp8.

To add a format: one class of `QuantizedLinear`, one row in `QUANTS`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..matrix import QuantizedLinear
from .blocks import Fp4Linear, Int8Linear, Nf4Linear
from .fp8 import Fp8Linear

QUANTS: dict[str, type[QuantizedLinear]] = {kind.quant: kind for kind in (Int8Linear, Nf4Linear, Fp4Linear, Fp8Linear)}


def quantize(weight: Tensor, quant: str, dtype: torch.dtype) -> QuantizedLinear:
    """A layer that stores the dense weight (O,I) so, on its device, for activations of this dtype."""
    kind = QUANTS[quant]
    with torch.no_grad():
        return kind((weight.shape[0], weight.shape[1]), kind.stored(weight), dtype)


def form_in_file(weight: Tensor, quant: str) -> dict[str, Tensor]:
    """What `to_file` of the quantised weight will give, of which dtypes and shapes are right; much faster than that."""
    kind = QUANTS[quant]
    with torch.no_grad():
        return kind((weight.shape[0], weight.shape[1]), kind.blank(weight), weight.dtype).to_file()


__all__ = ["QUANTS", "QuantizedLinear", "form_in_file", "quantize"]
