"""Putting an adapter into a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

from ..config import FOREIGN, AdapterConfig, check_part, words
from ..errors import ConfigError
from ..ops.matrix import QuantizedLinear
from ..packed import read_model
from . import foreign
from .base import AdaptedLinear
from .disha import BatLinear, BoneLinear
from .lora import LoraLinear, PissaLinear
from .trainable import LEARNED, add_parts, freeze, make_trainable, part_names

ADAPTERS: dict[str, type[AdaptedLinear]] = {
    "lora": LoraLinear, "pissa": PissaLinear, "bone": BoneLinear, "bat": BatLinear,
}  # fmt: skip

NO_DENSE = "--peft pissa: starts from dense matrices, which {} has not; name the dense file"
Model = TypeVar("Model", bound=nn.Module)


def attach_adapter(model: Model, config: AdapterConfig, train_parts: Iterable[str] = ()) -> Model:
    """Freeze `model` and add a new adapter to each target matrix, in place; only the adapter and `train_parts` train.

    With `state`, nothing is added to a matrix: the initial state of each layer trains.

    Raises ConfigError if a setting is out of range, a target or part matches nothing, or an adapter is there already.
    """
    config.check()
    if getattr(model, "adapter_config", None) is not None:
        raise ConfigError("the model has an adapter already; load the model anew")
    parts = [*(["state"] if config.peft == "state" else []), *words(train_parts)]
    targets = [] if config.peft == "state" else find_targets(model, config.targets)
    for part in parts:
        check_part(part)
    names = [name for part in parts if part not in LEARNED for name in part_names(model, part)]
    own = targets if config.peft in ADAPTERS else []
    check_apart({f"{target}.weight" for target in own}, names)
    for name in own:
        matrix = model.get_submodule(name)
        ADAPTERS[config.peft].check(config, matrix.in_features, matrix.out_features)  # type: ignore[arg-type]
    if config.peft.startswith(FOREIGN):
        foreign.attach(model, config, targets, names)
    add_parts(model, parts)
    names += [name for part in parts if part in LEARNED for name in part_names(model, part)]
    freeze(model)
    for name, layer in zip(own, wrap(model, config, own), strict=True):
        layer.reset(original_weight(model, name) if isinstance(layer.base, QuantizedLinear) else None)
    make_trainable(model, [*names, *foreign.parameters(model)])
    model.adapter_config = config  # type: ignore[assignment]
    model.adapter_count = 1  # type: ignore[assignment]
    return model


def original_weight(model: nn.Module, name: str) -> Callable[[], Tensor]:
    """Reads the weight of a matrix that is quantised here from the model's file.

    That raises ConfigError if the file holds it quantised too.
    """

    def read() -> Tensor:
        path = getattr(model, "path", None)
        entry = read_model(path)[f"{name}.weight"] if path else None
        if not isinstance(entry, Tensor):
            raise ConfigError(NO_DENSE.format(path))
        return entry

    return read


def check_apart(adapted: Collection[str], names: Iterable[str]) -> None:
    """Raise ConfigError if one of the parameters `names`, which are to train in full, has an adapter."""
    both = [name for name in names if name in adapted or ".base_layer." in name]
    if both:
        raise ConfigError(f"--train-parts: {both[0]} has an adapter, by --targets; leave it out of one of them")


def wrap(model: nn.Module, config: AdapterConfig, targets: Iterable[str]) -> list[AdaptedLinear]:
    """Put an adapter, without values yet, at each of these matrices; beside one that is there already."""
    layers = []
    for name in targets:
        base = model.get_submodule(name)
        if isinstance(base, AdaptedLinear):
            layer = ADAPTERS[config.peft](base.base, config, beside=True)
            base.others.append(layer)
        else:
            assert isinstance(base, nn.Linear)
            layer = ADAPTERS[config.peft](base, config)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, layer)
        layers.append(layer.train(model.training))
    return layers


def adapted(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Each adapted matrix and its name."""
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear) and ".others." not in name
    )


def merge_adapter(model: nn.Module) -> None:
    """Add the adapters to the weights of `model`, in place, so that it runs as fast as its base; see `unmerge_adapter`.

    The weights as they were are kept until then. The sums are rounded to the model's precision.
    """
    for _, layer in adapted(model):
        layer.merge()
    foreign.merge(model)


def unmerge_adapter(model: nn.Module) -> None:
    """Put the weights back as they were before `merge_adapter`, to the bit; the adapters work as before."""
    for _, layer in adapted(model):
        layer.unmerge()
    foreign.unmerge(model)


def is_merged(model: nn.Module) -> bool:
    """Whether the adapters are in the weights now."""
    return any(layer.is_merged for _, layer in adapted(model)) or foreign.is_merged(model)


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """The model with its adapters out of the weights, where they are in them."""
    merged = is_merged(model)
    if merged:
        unmerge_adapter(model)
    try:
        yield
    finally:
        if merged:
            merge_adapter(model)


def is_foreign(model: nn.Module) -> bool:
    """Whether the model has an adapter of Hugging Face PEFT."""
    return foreign.of(model) is not None


def draws_random_numbers(model: nn.Module) -> bool:
    """Whether a forward pass in training may draw random numbers, as dropout does."""
    own = (one for _, layer in adapted(model) for one in (layer, *layer.others))
    return is_foreign(model) or any(one.config.dropout > 0 for one in own)


def ends_in(name: str, targets: Iterable[str]) -> bool:
    """Whether a matrix's name ends, at a dot, in one of `targets`."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


def find_targets(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Names of the matrices that end in one of `targets`, at a dot; all of att and ffn if there is none.

    Raises ConfigError if a target matches none.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not tuple(targets):
        return [name for name in linears if name.split(".")[-2:-1] in (["att"], ["ffn"])]
    found = set()
    for target in targets:
        matches = {name for name in linears if ends_in(name, [target])}
        if not matches:
            kinds = sorted({".".join(name.split(".")[-2:]) for name in linears})
            raise ConfigError(f"--targets {target}: no matrix ends in it; allowed are {' '.join(kinds)}")
        found |= matches
    return [name for name in linears if name in found]
