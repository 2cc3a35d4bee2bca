"""Parts of a model that train in full: time, ln, emb, head, and the learned initial states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from ..config import check_part
from ..errors import ConfigError
from .state_tuning import add_shift, add_state

LEARNED = ("state", "shift")  # parts that a plain model does not have


def freeze(model: nn.Module) -> None:
    """Let nothing train."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def make_trainable(model: nn.Module, names: Iterable[str]) -> None:
    """Let these parameters train; they are kept in float32, whatever the model computes in."""
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def add_parts(model: nn.Module, parts: Iterable[str]) -> None:
    """Make room for the parts that a plain model does not have: learned states."""
    for part in parts:
        if part == "state":
            add_state(model)
        elif part == "shift":
            add_shift(model)


def part_names(model: nn.Module, part: str) -> list[str]:
    """Names of the parameters of a part. Raises ConfigError if the part is unknown, or the model has none of it."""
    check_part(part)
    names = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name in _own_part(path, module, part)
        if module._parameters.get(name) is not None
    ]
    if not names:
        raise ConfigError(f"--train-parts {part}: matches nothing in this model; leave it out")
    return names


def _own_part(path: str, module: nn.Module, part: str) -> Iterator[str]:
    """Names within one module; layers name their own vectors in `time_parameters`."""
    if part == "time":
        yield from getattr(module, "time_parameters", ())
    elif part in LEARNED:
        yield {"state": "time_state", "shift": "shift_state"}[part]
    elif part == "ln" and isinstance(module, nn.LayerNorm | nn.GroupNorm):
        yield from ("weight", "bias")
    elif part == path:  # emb, head
        yield "weight"
