"""Putting an adapter into a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import nn

from ..config import AdapterConfig, words
from ..errors import ConfigError
from .base import AdaptedLinear
from .lora import LoraLinear
from .trainable import freeze, make_trainable, part_names

ADAPTERS: dict[str, type[AdaptedLinear]] = {"lora": LoraLinear}
DEFAULT_TARGETS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")

Model = TypeVar("Model", bound=nn.Module)


def attach_adapter(model: Model, config: AdapterConfig, train_parts: Iterable[str] = ()) -> Model:
    """Freeze `model` and add a new adapter to each target matrix, in place; only the adapter and `train_parts` train.

    Raises ConfigError if a setting is out of range, a target or part matches nothing, or an adapter is there already.
    """
    config.check()
    if config.peft not in ADAPTERS:
        raise ConfigError(f"--peft {config.peft}: unknown; allowed are {' '.join(ADAPTERS)}")
    if any(adapted(model)):
        raise ConfigError("the model has an adapter already; load the model anew")
    targets = find_targets(model, config.targets or DEFAULT_TARGETS)
    parts = [name for part in words(train_parts) for name in part_names(model, part)]
    freeze(model)
    for name in targets:
        owner, _, leaf = name.rpartition(".")
        layer = ADAPTERS[config.peft](model.get_submodule(name), config)  # type: ignore[arg-type]
        setattr(model.get_submodule(owner), leaf, layer.train(model.training))
    make_trainable(model, parts)
    model.adapter_config = config  # type: ignore[assignment]
    return model


def adapted(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Each adapted matrix and its name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, AdaptedLinear))


def find_targets(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Names of the matrices that end in one of `targets`, at a dot. Raises ConfigError if a target matches none."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = set()
    for target in targets:
        matches = {name for name in linears if f".{name}".endswith(f".{target}")}
        if not matches:
            kinds = sorted({".".join(name.split(".")[-2:]) for name in linears})
            raise ConfigError(f"--targets {target}: no matrix ends in it; allowed are {' '.join(kinds)}")
        found |= matches
    return [name for name in linears if name in found]
