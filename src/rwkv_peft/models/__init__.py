"""Models: one file a version, one forward for training and inference."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import CheckpointError
from .base import Rwkv
from .rwkv7 import Rwkv7, Rwkv7Sizes
from .state import ModelState, Sizes

MODELS: dict[str, type[Rwkv]] = {"x070": Rwkv7}

__all__ = ["MODELS", "ModelState", "Rwkv", "Rwkv7", "Rwkv7Sizes", "Sizes", "find_version"]


def find_version(names: Iterable[str]) -> type[Rwkv]:
    """The class of the model whose tensors have these names. Raises CheckpointError if it is none that we know."""
    names = list(names)
    for kind in MODELS.values():
        if any(name.endswith(kind.mark) for name in names):
            return kind
    older = any(name.endswith(".att.time_first") for name in names)
    what = (
        "holds an RWKV-4 or early RWKV-5 model"
        if older
        else f"holds no RWKV model (its first tensors are {', '.join(names[:3]) or 'none'})"
    )
    known = ", ".join(f"{kind.title} ({version})" for version, kind in MODELS.items())
    raise CheckpointError(f"{what}; supported are {known}; get such a file")
