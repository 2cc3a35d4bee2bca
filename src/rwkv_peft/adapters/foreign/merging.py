"""Adding an adapter of PEFT's to the weights, and taking it out again."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ...checkpoint import first_line
from ...errors import ConfigError
from .side import layers, of


def merge(model: nn.Module) -> None:
    """Add the adapter to the weights. Raises ConfigError, and leaves them as they were, if the method cannot."""
    found = of(model)
    if found is None or found.unmerged:
        return
    for layer in layers(model).values():
        kept = [(p, p.data) for p in layer.get_base_layer().parameters()]
        found.unmerged += kept
        for parameter, data in kept:
            parameter.data = data.to(torch.float32, copy=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layer.merge()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            unmerge(model)
            if isinstance(error, torch.OutOfMemoryError):
                raise
            what = f"peft:{found.config.peft_type.value} cannot be merged: {first_line(error)}"
            raise ConfigError(f"{what}; run the base with the adapter instead") from error
        for parameter, data in kept:
            parameter.data = parameter.data.to(data.dtype)


def unmerge(model: nn.Module) -> None:
    """Put the weights back as they were, to the bit."""
    found = of(model)
    if found is None or not found.unmerged:
        return
    for layer in layers(model).values():
        if layer.merged:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layer.unmerge()  # near to what it was
        layer.merged_adapters.clear()
    for parameter, data in found.unmerged:
        parameter.data = data
    found.unmerged = []


def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that the adapter and the parts beside it change, merged, under official names."""
    merge(model)
    changed = {
        f"{name}.{leaf}": p.data
        for name, layer in layers(model).items()
        for leaf, p in layer.get_base_layer().named_parameters()
    }
    return changed | {name: model.get_parameter(name).data for name in getattr(model, "adapter_bases", ())}
