"""Errors that a user can meet and mend. Each message says what, got, allowed, remedy."""

from __future__ import annotations

import sys


class RwkvPeftError(Exception):
    """Base of every error that the command line prints as one message and exit code 2."""


class ConfigError(RwkvPeftError, ValueError):
    """A setting that cannot be honoured; the message begins with the setting's flag."""


class DataError(RwkvPeftError, ValueError):
    """Training data that cannot be used; the message begins with the file and the line."""


class CheckpointError(RwkvPeftError, ValueError):
    """A model, adapter or state file that cannot be used; the message begins with its path."""


class TrainingError(RwkvPeftError, ArithmeticError):
    """Training that cannot go on; the parameters are those of the last whole step."""


class OutputError(RwkvPeftError, OSError):
    """Something that could not be written; what was there before is untouched."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the GPU or here; torch has a type of its own only for the GPU."""
    kind = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    return isinstance(error, MemoryError | kind) or "can't allocate memory" in str(error)
