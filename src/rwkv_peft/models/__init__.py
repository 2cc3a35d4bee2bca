"""Models: one file a version, one forward for training and inference."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import CheckpointError
from .rwkv7 import Rwkv7, Rwkv7Sizes
from .state import ModelState

MODELS = {"x070": Rwkv7}
_NOT_YET = {".att.time_maa_x": "an RWKV-6", ".att.time_faaaa": "an RWKV-5", ".att.time_first": "an RWKV-4"}

__all__ = ["MODELS", "ModelState", "Rwkv7", "Rwkv7Sizes", "find_version"]


def find_version(names: Iterable[str]) -> type[Rwkv7]:
    """The class of the model whose tensors have these names. Raises CheckpointError if it is none that we know."""
    names = list(names)
    for kind in MODELS.values():
        if any(name.endswith(kind.mark) for name in names):
            return kind
    older = next((what for mark, what in _NOT_YET.items() if any(n.endswith(mark) for n in names)), None)
    what = (
        f"holds {older} model"
        if older
        else f"holds no RWKV model (its first tensors are {', '.join(names[:3]) or 'none'})"
    )
    raise CheckpointError(f"{what}; only RWKV-7 (x070) is supported; get an RWKV-7 file")
