"""State files in the official form: `blocks.{i}.att.time_state` (H,N,N), row = value index, column = key index."""

from __future__ import annotations

from pathlib import Path

import torch

from ..checkpoint import check_finite, read_tensors, write_tensors
from ..errors import CheckpointError, ConfigError
from ..models import SHIFT, STATES, WKV, ModelState, Rwkv


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
    """The state in a file, for a batch of one, float32, on the CPU. Raises CheckpointError if it holds no state."""
    found = {name: t for name, t in read_tensors(path).items() if name.endswith(STATES)}
    layers = sum(name.endswith(STATES[0]) for name in found)
    if found and not layers:
        raise CheckpointError(f"{path}: holds token shifts alone; use it with its folder, as --adapter")
    try:
        wkv = torch.stack([found[WKV.format(i)].float() for i in range(layers)])[:, None]
        if wkv.ndim != 5 or wkv.shape[-1] != wkv.shape[-2]:
            raise ValueError(f"blocks.0.att.time_state has shape {tuple(wkv.shape[2:])}, not (H,N,N)")
        shift = torch.zeros(layers, 2, 1, wkv.shape[2] * wkv.shape[3])
        if len(found) > layers:
            rows = [torch.stack([found[name.format(i)].float() for name in SHIFT]) for i in range(layers)]
            shift = torch.stack(rows).reshape(shift.shape)
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: holds no whole state ({error}); allowed is blocks.*.att.time_state") from error
    for name, tensor in found.items():
        check_finite(path, name, tensor)
    return ModelState(wkv, shift)


def check_state(model: Rwkv, state: ModelState, path: Path | str) -> None:
    """Raise CheckpointError if the state, read from `path`, is none of this model."""
    layers, heads, head_size = (state.wkv.shape[i] for i in (0, 2, 3))
    s = model.sizes
    if (layers, heads, head_size) != (s.layers, s.heads, s.head_size):
        raise CheckpointError(
            f"{path}: a state of {layers} layers with {heads} heads of {head_size}; "
            f"the model has {s.layers} layers with {s.heads} heads of {s.head_size}; give a state of this model"
        )
