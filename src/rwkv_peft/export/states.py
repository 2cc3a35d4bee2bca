"""State files in the official form: `blocks.{i}.att.time_state` (H,N,N), row = value index, column = key index."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..checkpoint import read_tensors, write_tensors
from ..errors import CheckpointError, ConfigError
from ..models import ModelState

WKV = "blocks.{}.att.time_state"
SHIFT = ("blocks.{}.att.shift_state", "blocks.{}.ffn.shift_state")  # (D,); ours, written only where they are not zero


def save_state(state: ModelState, path: Path | str) -> None:
    """Write the state of one document. Raises ConfigError if it holds several, OutputError if it cannot be written."""
    if state.wkv.shape[1] != 1:
        raise ConfigError(f"save_state: the state holds {state.wkv.shape[1]} documents; give one, e.g. state[0:1]")
    tensors = {WKV.format(i): wkv[0].float() for i, wkv in enumerate(state.wkv)}
    if bool(state.shift.any()):
        for i, pair in enumerate(state.shift):
            tensors |= {name.format(i): shift[0].float() for name, shift in zip(SHIFT, pair, strict=True)}
    write_tensors(path, tensors)


def load_state(path: Path | str) -> ModelState:
    """The state in a file, for a batch of one, on the CPU. Raises CheckpointError if it holds no state."""
    tensors = read_tensors(path)
    layers = sum(bool(re.fullmatch(r"blocks\.\d+\.att\.time_state", name)) for name in tensors)
    try:
        wkv = torch.stack([tensors[WKV.format(i)].float() for i in range(layers)])[:, None]
        if wkv.ndim != 5 or wkv.shape[-1] != wkv.shape[-2]:
            raise ValueError(f"blocks.0.att.time_state has shape {tuple(wkv.shape[2:])}, not (H,N,N)")
        shift = torch.zeros(layers, 2, 1, wkv.shape[2] * wkv.shape[3])
        if SHIFT[0].format(0) in tensors:
            shift = torch.stack(
                [torch.stack([tensors[n.format(i)].float()[None] for n in SHIFT]) for i in range(layers)]
            )
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: holds no whole state ({error}); allowed is blocks.*.att.time_state") from error
    return ModelState(wkv, shift)
