"""What the kernels share: products of tiles, and how exact they are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)  # kernels run on CPU tensors, one program after the other

EXACT, BF16, ROUNDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def product_kind(dtype: torch.dtype) -> int:
    """How `dot` multiplies for inputs of a dtype: float32 as exactly as float32 is, others with bf16 operands."""
    if dtype == torch.float32:
        return 0
    return 2 if INTERPRETED else 1  # the interpreter's product of bf16 tiles is wrong


@triton.jit
def dot(a, b, KIND: tl.constexpr):
    """The product of two tiles, summed in float32."""
    if KIND == 0:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    elif KIND == 1:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32))


@triton.jit
def dot_unrounded(a, b, KIND: tl.constexpr):
    """As `dot`, with b rounded to bf16 and of a what bf16 leaves out too, at the price of a second product."""
    if KIND == 0:
        return dot(a, b, KIND)
    elif KIND == 1:
        return dot(a, b, KIND) + dot(a - a.to(tl.bfloat16).to(tl.float32), b, KIND)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.bfloat16).to(tl.float32))
