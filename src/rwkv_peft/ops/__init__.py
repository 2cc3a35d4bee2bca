"""Operators: the recurrence of each RWKV version on several backends, all computing the same function.

To add a backend: one file with its functions, one row in `BACKENDS`, best first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError
from . import chunked6, chunked7, cuda, fla, reference, triton
from .cuda import layers as cuda_layers
from .pieces import PLAIN, Pieces

Wkv = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators; handed to the model, never looked up from the environment."""

    name: str
    wkv5: Wkv
    wkv6: Wkv
    wkv7: Wkv
    supports: Callable[[torch.device, int], str | None]
    """(device, head size) → None, or the reason why it cannot run there."""
    pieces: Pieces = PLAIN
    """What lies between a layer's matrix products."""

    @cached_property
    def again(self) -> Backend:
        """The same backend, but the backward pass runs an operator anew and has not kept what it makes."""
        pieces = replace(self.pieces, core7=lambda _, *rest: _anew(self.pieces.core7, self.wkv7, *rest))
        wkv5, wkv6, wkv7 = (partial(_anew, wkv) for wkv in (self.wkv5, self.wkv6, self.wkv7))
        return replace(self, wkv5=wkv5, wkv6=wkv6, wkv7=wkv7, pieces=pieces)


def _anew(call: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False)


def _anywhere(device: torch.device, head_size: int) -> None:
    return None


BACKENDS = {
    "triton": Backend("triton", triton.wkv5, triton.wkv6, triton.wkv7, triton.supports, triton.PIECES),
    "cuda": Backend("cuda", cuda.wkv5, cuda.wkv6, cuda.wkv7, cuda.supports, cuda_layers.PIECES),
    "fla": Backend("fla", fla.wkv5, fla.wkv6, fla.wkv7, fla.supports),
    "torch": Backend("torch", chunked6.wkv5, chunked6.wkv6, chunked7.wkv7, _anywhere),
    "reference": Backend("reference", reference.wkv5, reference.wkv6, reference.wkv7, _anywhere),
}


def choose_backend(name: str, device: torch.device, head_size: int) -> Backend:
    """The backend called `name`, or for `auto` the fastest that runs on `device`.

    That is `cuda` where it has tensor cores and can be compiled, else the first of `BACKENDS` which can.
    Raises ConfigError if `name` is unknown or cannot run there.
    """
    if name == "auto":
        if cuda.is_fastest(device, head_size):
            return BACKENDS["cuda"]
        return next(b for b in BACKENDS.values() if b.supports(device, head_size) is None)
    if name not in BACKENDS:
        raise ConfigError(f"--op {name}: unknown; allowed are auto {' '.join(BACKENDS)}")
    reason = BACKENDS[name].supports(device, head_size)
    if reason is not None:
        raise ConfigError(f"--op {name}: {reason}; choose --op auto")
    return BACKENDS[name]
