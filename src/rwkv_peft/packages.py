"""Packages that only some settings need: imported when they are."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from .errors import ConfigError


def optional(module: str, needed_by: str) -> Any:
    """A module of a package that may be missing. Raises ConfigError if it, or one that it needs, is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # or, without a GPU, it tells of packages it could use
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(f"{needed_by}: needs the package {package} ({error}); pip install {package}") from error
