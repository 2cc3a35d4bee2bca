"""Adding an adapter of PEFT's that was saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, ConfigError
from ..saved import SavedAdapter, file_name
from .attaching import attach, detach
from .config import library
from .saving import tensors
from .side import of
from .single import factors, take_factors, with_pruned


def load(model: nn.Module, saved: SavedAdapter, path: Path | str) -> None:
    """Add a saved adapter, exactly as it was; for training to go on, or to be used.

    Raises ConfigError if PEFT is not there; CheckpointError, and leaves the model as it was, if the adapter is not
    whole, or not of this base.
    """
    library("peft")
    assert saved.config is not None
    before = dict(model.named_modules())
    weights = [(p, p.data, p._version, p.requires_grad) for p in model.parameters()]
    given = saved.config.peft_config
    pruned = (given.get("rank_pattern") or {}) if saved.config.peft.endswith("ADALORA") else {}
    try:
        attach(model, replace(saved.config, peft_config=given | ({"rank_pattern": None} if pruned else {})), ())
    except ConfigError as error:
        raise CheckpointError(f"{path}: does not fit this base, or this version of PEFT ({error})") from error
    found, fresh = of(model), tensors(model)
    assert found is not None
    found.total_step = None  # the next run's
    whole = factors(model) | with_pruned(saved.tensors, fresh, pruned)  # PEFT's own folders have no factors
    try:
        check_whole(path, whole, fresh)
    except CheckpointError:
        detach(model, before, weights)
        raise
    take_factors(model, whole)
    state = {file_name(name): t for name, t in whole.items() if name not in factors(model)}
    library("peft").set_peft_model_state_dict(found.peft, state)


def check_whole(path: Path | str, given: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if these tensors are not all that a new adapter has, in its shapes."""
    odd = sorted(given.keys() ^ fresh.keys())
    if odd:
        raise CheckpointError(f"{path}: {odd[0]} is missing or has no use; copy the folder again")
    for name, tensor in fresh.items():
        got, want = tuple(given[name].shape), tuple(tensor.shape)
        if got != want:
            raise CheckpointError(f"{path}: {name} is {got}, not {want}: does not fit this base; name its own base")
        if ".frod_V." in name and not torch.allclose(given[name].to(tensor), tensor, rtol=1e-3, atol=1e-5):
            what = "its factors of the base come out otherwise here, by another base, precision or machine"
            raise CheckpointError(f"{path}: {what}; load it as it was trained")
