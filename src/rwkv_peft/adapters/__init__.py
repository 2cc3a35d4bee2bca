"""Adapters: put into a model, written and read as folders. To add a method: one file, one row in `ADAPTERS`."""

from __future__ import annotations

from .attach import ADAPTERS, attach_adapter
from .base import AdaptedLinear
from .folder import load_adapter, save_adapter

__all__ = ["ADAPTERS", "AdaptedLinear", "attach_adapter", "load_adapter", "save_adapter"]
