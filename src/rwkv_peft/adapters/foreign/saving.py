"""What the folder of an adapter of PEFT's holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..saved import PREFIX
from .config import library, to_json
from .side import of
from .single import factors


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors as PEFT saves them, without `base_model.model.`; none if the model has no such adapter.

    It must not be merged.
    """
    found = of(model)
    if found is None:
        return {}
    config = found.config
    if config.peft_type == "ADALORA":  # or PEFT leaves out the ranks that are 0 now, but may train again
        pattern, config.rank_pattern = config.rank_pattern, None
    state = library("peft").get_peft_model_state_dict(found.peft, save_embedding_layers=False)
    if config.peft_type == "ADALORA":
        config.rank_pattern = pattern
    seen: set[int] = set()
    for name, tensor in state.items():  # a file cannot hold one tensor under two names
        state[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()} | factors(model)


def settings(model: nn.Module) -> dict[str, Any]:
    """PEFT's `adapter_config.json`; empty if the model has no such adapter."""
    found = of(model)
    return to_json(found.config, getattr(model, "source", "")) if found else {}
