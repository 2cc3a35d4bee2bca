"""Models: one file a version, one forward for training and inference."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import CheckpointError
from .base import Rwkv
from .rwkv5 import Rwkv5, Rwkv5Sizes
from .rwkv6 import Rwkv6, Rwkv6Sizes
from .rwkv7 import Rwkv7, Rwkv7Sizes
from .rwkv7a import Rwkv7a, Rwkv7aSizes
from .state import SHIFT, STATES, WKV, ModelState, Sizes

# in the order in which their marks are looked for: a later version may hold an earlier one's
MODELS: dict[str, type[Rwkv]] = {kind.version: kind for kind in (Rwkv7a, Rwkv7, Rwkv6, Rwkv5)}

__all__ = [
    "MODELS",
    "SHIFT",
    "STATES",
    "WKV",
    "ModelState",
    "Rwkv",
    "Rwkv5",
    "Rwkv5Sizes",
    "Rwkv6",
    "Rwkv6Sizes",
    "Rwkv7",
    "Rwkv7Sizes",
    "Rwkv7a",
    "Rwkv7aSizes",
    "Sizes",
    "find_version",
]


def find_version(names: Iterable[str]) -> type[Rwkv]:
    """The class of the model whose tensors have these names. Raises CheckpointError if it is none that we know."""
    names = list(names)
    what = f"holds no RWKV model (its first tensors are {', '.join(names[:3]) or 'none'})"
    if any(".qkv." in name for name in names):
        what = "holds an RWKV-7b model"
    elif any(name.endswith(".att.time_first") for name in names):
        what = "holds an RWKV-4 or early RWKV-5 model"
    else:
        for kind in MODELS.values():
            if any(name.endswith(kind.mark) for name in names):
                return kind
    known = ", ".join(f"{kind.title} ({version})" for version, kind in MODELS.items())
    raise CheckpointError(f"{what}; supported are {known}; get such a file")
