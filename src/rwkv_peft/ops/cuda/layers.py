"""Between a layer's matrix products, around our CUDA operators: Triton's kernels where there are any, else PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from .. import triton
from ..pieces import PLAIN, Pieces
from . import chunked7, has_tensor_cores


def _piece(name: str, *args: Any) -> Any:
    return getattr(triton.PIECES if triton.is_installed() else PLAIN, name)(*args)


def core7(wkv7: Any, r: Tensor, *rest: Any) -> Any:
    """The same function as `pieces.core7`; on tensor cores as one Function with the operator inside."""
    vectors = rest[7]
    if triton.is_installed() and r.dtype in chunked7.DTYPES and has_tensor_cores(r.device, vectors.r_k.shape[1]):
        from ..triton.core7 import core7

        return partial(core7, raw=chunked7.RAW)(wkv7, r, *rest)
    return PLAIN.core7(wkv7, r, *rest)


PIECES = Pieces(
    norm_mix=partial(_piece, "norm_mix"),
    mix_more=partial(_piece, "mix_more"),
    core7=core7,
    gated_output=partial(_piece, "gated_output"),
    gated=partial(_piece, "gated"),
    relu2=partial(_piece, "relu2"),
)
