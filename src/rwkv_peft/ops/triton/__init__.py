"""Operators and layers as Triton kernels; Triton is imported when the first of them is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ..pieces import Pieces

HEAD_SIZES = (64, 128)


def supports(device: torch.device, head_size: int) -> str | None:
    """None, or the reason why the kernels cannot run there."""
    if device.type != "cuda":
        return f"needs a GPU, and the model is on {device.type}"
    if not is_installed():
        return "the package triton is not installed; pip install triton"
    if head_size not in HEAD_SIZES:
        return f"knows heads of 64 and 128, not of {head_size}"
    return None


@cache
def is_installed() -> bool:
    """Whether Python finds the package triton."""
    return find_spec("triton") is not None


def _call(module: str, name: str, *args: Any, **settings: Any) -> Any:
    return getattr(import_module(f".{module}", __name__), name)(*args, **settings)


def _later(module: str, name: str) -> Callable[..., Any]:
    return partial(_call, module, name)


rows_of = _later("embedding", "rows_of")
dense_of_8_bits, dense_of_4_bits = _later("quant", "dense_of_8_bits"), _later("quant", "dense_of_4_bits")
rows_to_fp8, turned = _later("quant", "rows_to_fp8"), _later("quant", "turned")

# the same functions as in `reference` and `pieces`, where their arguments, shapes and results are described
wkv5, wkv6, wkv7 = _later("wkv6", "wkv5"), _later("wkv6", "wkv6"), _later("wkv7", "wkv7")
PIECES = Pieces(
    norm_mix=_later("mix", "norm_mix"),
    mix_more=_later("mix", "mix_more"),
    core7=_later("core7", "core7"),
    gated_output=_later("gated", "gated_output"),
    gated=_later("activations", "gated"),
    relu2=_later("activations", "relu2"),
)
