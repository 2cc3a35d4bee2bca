"""What single methods of PEFT need besides: AdaLoRA, FRoD, GLoRA, PSOFT."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from .side import NAME, layers, of


def prepare(model: nn.Module, method: str) -> None:
    """Meet what two methods ask of the matrices of att and ffn."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name.split(".")[-2:-1] not in (["att"], ["ffn"]):
            continue
        if method == "GLORA":  # takes no subclass of Linear
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = module.weight
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, plain)
        if method == "FROD":  # solves for its factors, which a base in bf16 would round
            module.weight.data = module.weight.data.float()


def with_pruned(
    given: Mapping[str, Tensor], fresh: Mapping[str, Tensor], pattern: Mapping[str, Sequence[bool]]
) -> dict[str, Tensor]:
    """AdaLoRA's tensors with the ranks that PEFT leaves out of its files; their `lora_E` is 0, as in a new adapter."""
    whole = dict(given)
    for name, kept in pattern.items():
        ranks = torch.tensor(kept).nonzero().flatten()
        for leaf, axis in (("lora_E", 0), ("lora_A", 0), ("lora_B", 1)):
            own = name.replace("lora_E", leaf)
            if own in given and own in fresh and given[own].shape[axis] == len(ranks) < fresh[own].shape[axis]:
                whole[own] = fresh[own].cpu().index_copy(axis, ranks, given[own].to(fresh[own].dtype))
    return whole


def factors(model: nn.Module) -> dict[str, Tensor]:
    """PSOFT's frozen factors of each matrix, which PEFT takes from an SVD each time anew.

    Where that comes out otherwise (by another machine, or on another device), what was trained would mean nothing.
    """
    found = of(model)
    if found is None or found.config.peft_type != "PSOFT":
        return {}
    own = layers(model).items()
    return {f"{name}.psoft_{x}": cache(layer, x)[NAME] for name, layer in own for x in "AB"}


def take_factors(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Put factors of `given` in the place of those that were taken anew."""
    for name in factors(model).keys() & given.keys():
        matrix, _, x = name.rpartition(".psoft_")
        kept = cache(model.get_submodule(matrix), x)
        kept[NAME] = given[name].to(kept[NAME])


def cache(layer: Any, x: str) -> Any:
    return getattr(layer, f"_psoft_{x}_cache")


def follow(model: nn.Module, optimizer: torch.optim.Optimizer, total: int) -> None:
    """Let a method that shares out its ranks while it trains (AdaLoRA) do so after each of `total` steps.

    Nothing for all others. Raises ConfigError if its schedule does not fit into the steps.
    """
    found = of(model)
    if found is None or not hasattr(found.peft.base_model, "update_and_allocate"):
        return
    tuner, config, steps = found.peft.base_model, found.config, itertools.count(1)
    if config.peft_type == "ADALORA":
        config.total_step = found.total_step or total
        if config.tinit + config.tfinal >= config.total_step:
            got, remedy = f"tinit {config.tinit} and tfinal {config.tfinal}", "give smaller ones, or take more steps"
            raise ConfigError(f"--peft-config: {got} must leave some of {config.total_step} steps; {remedy}")
    # after the step, but before its gradients go: they tell which ranks matter
    optimizer.register_step_post_hook(lambda *_: tuner.update_and_allocate(next(steps)))


def extra_loss(model: nn.Module) -> Tensor | None:
    """What AdaLoRA adds to the loss of a step, once: how far its factors are from orthogonal ones. Others: None."""
    found = of(model)
    weight = getattr(found.config, "orth_reg_weight", 0.0) if found else 0.0
    if not weight:
        return None
    factors = [f for layer in layers(model).values() for f in (layer.lora_A[NAME], layer.lora_B[NAME].T)]  # (r,n)
    norms = [torch.linalg.matrix_norm(f @ f.T - torch.eye(len(f), device=f.device)) for f in factors]
    return torch.stack(norms).mean() * weight
