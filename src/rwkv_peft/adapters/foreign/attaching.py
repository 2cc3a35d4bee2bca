"""Putting an adapter of PEFT's into a model, and taking it out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint import first_line
from ...config import AdapterConfig
from ...errors import ConfigError
from .config import library, make_config
from .saving import tensors
from .side import Foreign, layers, of
from .single import prepare

Weights = list[tuple[nn.Parameter, Tensor, int, bool]]  # with their data, its version, and whether they train


def attach(model: nn.Module, config: AdapterConfig, targets: Sequence[str], beside: Iterable[str] = ()) -> None:
    """Add the adapter that PEFT has under this name to the matrices; it alone trains, in float32.

    `beside` names parameters that will train too; they must stay where they are. Raises ConfigError, and leaves the
    model as it was, if PEFT is not there, or has no such method, or the method does not fit this model or its settings.
    """
    peft = library("peft")
    if getattr(model, "quant", "none") != "none":
        raise ConfigError(
            f"--peft {config.peft}: PEFT's own methods need dense matrices; leave --quant out, or name the dense file"
        )
    made, before = make_config(model, config, targets), dict(model.named_modules())
    weights = [(p, p.data, p._version, p.requires_grad) for p in model.parameters()]
    try:
        prepare(model, made.peft_type)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # of our norms, which LN_TUNING copies
            wrapped = peft.get_peft_model(model, made)
        model.foreign = Foreign(wrapped, config.peft_config.get("total_step"))  # type: ignore[assignment]
        finish(model, weights, beside)
    except Exception as error:  # PEFT checks little: its settings can raise anything anywhere
        detach(model, before, weights)
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConfigError(
            f"--peft {config.peft}: does not fit: {first_line(error)}; try other --peft-config or --targets"
        ) from error


def finish(model: nn.Module, weights: Weights, beside: Iterable[str]) -> None:
    """Let the adapter alone train, in float32.

    Raises ValueError if more would train, or the base is not what and where it was.
    """
    own, found = layers(model), of(model)
    assert found is not None
    for layer in own.values():
        keep_in_float32(layer)
    model.train(model.training)
    freeze_what_is_not_saved(model)
    parameters = dict(model.named_parameters())
    found.trained = {name for name, p in parameters.items() if p.requires_grad}
    starts = tuple(f"{name}." for name in own)
    more = sorted(name for name in found.trained if not name.startswith(starts) or ".base_layer." in name)
    if more:
        raise ValueError(f"it trains {more[0]}, which is not its own; use --train-parts for that")
    moved = sorted(set(beside) - parameters.keys())
    if moved:
        raise ValueError(f"it adapts {moved[0]}, which --train-parts is to train; leave one of them out")
    for parameter, data, version, _ in weights:
        rounded = parameter.data.dtype != data.dtype  # by `prepare`
        if parameter._version != version or not (rounded or parameter.data_ptr() == data.data_ptr()):
            raise ValueError("it changes weights of the base, which an adapter folder does not hold")
        parameter.data = data


def keep_in_float32(layer: Any) -> None:
    """Keep what is the layer's own in float32, and its results in the dtype of its inputs, whatever the base's."""
    base = {id(tensor) for tensor in own_tensors(layer.get_base_layer())}
    for tensor in own_tensors(layer):
        if id(tensor) not in base and tensor.is_floating_point() and tensor.dtype.itemsize < 4:
            tensor.data = tensor.data.float()
    layer.register_forward_hook(same_dtype)


def freeze_what_is_not_saved(model: nn.Module) -> None:
    """Let nothing train that PEFT does not save, e.g. AdaLoRA's number of ranks, which trains there in bf16 alone."""
    saved = {tensor.data_ptr() for tensor in tensors(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.data_ptr() in saved)


def same_dtype(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook; the inputs of an embedding are whole numbers."""
    return output.to(inputs[0].dtype) if inputs[0].is_floating_point() else output


def own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def detach(model: nn.Module, before: Mapping[str, nn.Module], weights: Weights) -> None:
    """Put the model's own modules and weights back in their places."""
    for name, module in before.items():
        owner, _, leaf = name.rpartition(".")
        if name and getattr(before[owner], leaf) is not module:
            setattr(before[owner], leaf, module)
    for parameter, data, _, trains in weights:
        parameter.data = data
        parameter.requires_grad_(trains)
    for attribute in {"foreign", "peft_config"} & vars(model).keys():
        delattr(model, attribute)
