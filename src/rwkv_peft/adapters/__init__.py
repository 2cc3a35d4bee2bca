"""Adapters: put into a model, written and read as folders. To add a method: one file, one row in `ADAPTERS`."""

from __future__ import annotations

from .attach import ADAPTERS, attach_adapter, draws_random_numbers, is_foreign, merge_adapter, unmerge_adapter
from .base import AdaptedLinear
from .folder import attach_saved, load_adapter, save_adapter
from .foreign import extra_loss, follow
from .reading import read_adapter, read_adapters
from .saved import SavedAdapter

__all__ = [
    "ADAPTERS", "AdaptedLinear", "SavedAdapter", "attach_adapter", "attach_saved", "draws_random_numbers", "extra_loss",
    "follow", "is_foreign", "load_adapter", "merge_adapter", "read_adapter", "read_adapters", "save_adapter",
    "unmerge_adapter",
]  # fmt: skip
