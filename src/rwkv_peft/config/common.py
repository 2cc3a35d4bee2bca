"""What the settings of several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError

Dtype = Literal["fp32", "bf16", "fp16"]
Op = Literal["auto", "triton", "cuda", "fla", "torch", "reference"]
Quant = Literal["none", "int8", "nf4", "fp4", "fp8"]
OnBadLine = Literal["stop", "skip"]
Overlong = Literal["split", "truncate", "drop"]
TokenizerName = Literal["auto", "world", "byte"]

# Marks that the command line reads
ADVANCED = "advanced"  # only --help-all shows it
ESCAPES = "escapes"  # in a flag's text, a backslash and n stand for a line break


def flag_of(name: str) -> str:
    """A setting's flag."""
    return "--" + name.replace("_", "-")


def words(value: Any) -> tuple[Any, ...]:
    """Several values, of which Python callers may give just one."""
    return (value,) if isinstance(value, str | Path) else tuple(value)


def at_least(flag: str, value: int, least: int, remedy: str) -> None:
    """Raise `ConfigError` if `value` is below `least`."""
    if value < least:
        raise ConfigError(f"{flag} {value}: must be at least {least}; {remedy}")
