"""Graphics cards, sizes of memory as people write them, and speeds that were measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import ConfigError
from ..models import Sizes
from ..ops.quant.fp8 import has_fp8

GIB = 2**30
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
UNITS |= {"k": 2**10, "m": 2**20, "g": 2**30}  # as nvidia-smi's users write them
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
LEAST = 2**20  # less is a slip of the pen


@dataclass(frozen=True)
class Card:
    """Where a run is to fit."""

    free: float | None
    """Bytes for this process, its CUDA context included; None if no card is known."""
    name: str = ""
    fp8: bool = True
    has_context: bool = False
    """Whether this process has its CUDA context on it already, and `free` is without it."""


KNOWN = {"H100": Card(79.1 * GIB, "NVIDIA H100")}


class Measured(NamedTuple):
    """A line of docs/performance.md: one H100, bf16, LoRA of rank 64 unless another method is named."""

    layers: int
    width: int
    method: str
    tokens: int
    """Of a micro-batch."""
    speed: int
    """Tokens a second."""


BENCHMARKS = {
    "H100": [
        Measured(12, 768, "lora", 1024, 124_334),
        Measured(24, 1024, "lora", 1024, 50_424),
        Measured(24, 2048, "lora", 1024, 29_566),
        Measured(32, 2560, "lora", 1024, 16_677),
        Measured(32, 2560, "bone", 1024, 17_465),
        Measured(32, 2560, "state", 1024, 23_568),
        Measured(24, 2048, "pissa", 1024, 36_880),
        Measured(24, 2048, "bone", 1024, 39_081),
        Measured(24, 2048, "bat", 1024, 33_551),
        Measured(24, 2048, "state", 1024, 56_536),
        Measured(12, 768, "lora", 32_768, 333_697),
        Measured(24, 1024, "lora", 32_768, 117_219),
        Measured(24, 2048, "lora", 16_384, 45_699),
        Measured(32, 2560, "lora", 8192, 22_945),
    ]
}


def size_in_bytes(flag: str, text: str) -> float:
    """12GiB, 12GB, 12000MiB or 12G in bytes; a bare number is GiB. Raises ConfigError, which begins with `flag`."""
    match = SIZE.fullmatch(text)
    unit = match[2].lower() if match else "?"
    if match is None or unit not in UNITS:
        name = f", or {' or '.join(KNOWN)}" if flag == "--card" else ""
        raise ConfigError(f"{flag} {text}: must be a number and a unit{name}; try 12GiB, 12GB or 12000MiB")
    size = float(match[1]) * (UNITS[unit] if unit else GIB)
    if size < LEAST:
        raise ConfigError(f"{flag} {text}: must be at least 1MiB; try 12GiB")
    return size


def find_card(text: str, device: torch.device) -> Card:
    """The card that `--card` names, by its memory or its name; if it names none, the one that is here."""
    if not text:
        return card_here(device)
    if text.upper() in KNOWN:
        return KNOWN[text.upper()]
    return Card(size_in_bytes("--card", text), fp8=card_here(device).fp8)


def card_here(device: torch.device) -> Card:
    """The GPU of this machine that is called so; without one, a card of which nothing is known."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return Card(None)
    free, _ = torch.cuda.mem_get_info(device)
    return Card(free, torch.cuda.get_device_name(device), has_fp8(device), has_context=True)


def free_ram() -> float | None:
    """Bytes of the machine's memory that are to be had; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else 1024.0 * int(found)


def measured(card: Card, sizes: Sizes, version: int, method: str, tokens: int) -> Measured | None:
    """The nearest measured run of this model and method on this card, of at most twice the tokens, or half of them."""
    known = next((runs for name, runs in BENCHMARKS.items() if name in card.name), [])
    fitting = [
        run
        for run in known
        if (run.layers, run.width, run.method) == (sizes.layers, sizes.width, method)
        and version == 7
        and tokens / 2 <= run.tokens <= 2 * tokens
    ]
    return min(fitting, key=lambda run: abs(run.tokens - tokens), default=None)
