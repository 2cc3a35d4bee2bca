"""Every other method of Hugging Face PEFT, through PEFT itself: `--peft peft:OFT`.

PEFT puts its own layers in the place of the model's, which become their `base_layer`. Its side of the model is kept in
`model.foreign`, which nn.Module does not see. PEFT is an optional package, imported where it is used.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import first_line
from ..config import AdapterConfig
from ..errors import CheckpointError, ConfigError
from .foreign_settings import config_of, library, make_config, to_json
from .saved import PREFIX, SavedAdapter, file_name

__all__ = [
    "attach", "config_of", "extra_loss", "file_name", "follow", "load", "merge", "merged_tensors", "parameters",
    "settings", "tensors", "unmerge",
]  # fmt: skip

NAME = "default"  # PEFT's name of an adapter that is alone

Weights = list[tuple[nn.Parameter, Tensor, int, bool]]  # with their data, its version, and whether they train


@dataclass
class Foreign:
    """PEFT's side of a model."""

    peft: Any
    """The `PeftModel` around the model."""
    total_step: int | None
    """AdaLoRA's number of steps, if it was given."""
    trained: set[str] = field(default_factory=set)
    """Names in the model of what the adapter trains."""
    unmerged: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    """While the adapter is merged: parameters of the base, and their values before."""

    @property
    def config(self) -> Any:
        return self.peft.peft_config[NAME]


def of(model: nn.Module) -> Foreign | None:
    """PEFT's side of the model, if it has an adapter of PEFT's."""
    return getattr(model, "foreign", None)


def layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by the names of what they adapt."""
    kind = library("peft.tuners.tuners_utils").BaseTunerLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def attach(model: nn.Module, config: AdapterConfig, targets: Sequence[str], beside: Iterable[str] = ()) -> None:
    """Add the adapter that PEFT has under this name to the matrices; it alone trains, in float32.

    `beside` names parameters that will train too; they must stay where they are. Raises ConfigError, and leaves the
    model as it was, if PEFT is not there, or has no such method, or the method does not fit this model or its settings.
    """
    peft = library("peft")
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


def finish(model: nn.Module, weights: Weights, beside: Iterable[str]) -> None:
    """Keep the adapter in float32, and its results in the dtype of its inputs, whatever the base's.

    Raises ValueError if more trains than the adapter, or the base is not what and where it was.
    """
    own, found = layers(model), of(model)
    assert found is not None
    for layer in own.values():
        base = {id(tensor) for tensor in own_tensors(layer.get_base_layer())}
        for tensor in own_tensors(layer):
            if id(tensor) not in base and tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                tensor.data = tensor.data.float()
        layer.register_forward_hook(same_dtype)
    model.train(model.training)
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
    whole = with_pruned(saved.tensors, fresh, pruned)
    try:
        check_whole(path, whole, fresh)
    except CheckpointError:
        detach(model, before, weights)
        raise
    library("peft").set_peft_model_state_dict(found.peft, {file_name(name): t for name, t in whole.items()})


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


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors as PEFT saves them, without `base_model.model.`; none if the model has no such adapter."""
    found = of(model)
    if found is None:
        return {}
    merged, config = bool(found.unmerged), found.config
    if merged:
        unmerge(model)
    if config.peft_type == "ADALORA":  # or PEFT leaves out the ranks that are 0 now, but may train again
        pattern, config.rank_pattern = config.rank_pattern, None
    state = library("peft").get_peft_model_state_dict(found.peft, save_embedding_layers=False)
    if config.peft_type == "ADALORA":
        config.rank_pattern = pattern
    if merged:
        merge(model)
    seen: set[int] = set()
    for name, tensor in state.items():  # a file cannot hold one tensor under two names
        state[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


def parameters(model: nn.Module) -> set[str]:
    """Names in the model of what the adapter trains; none if the model has no such adapter."""
    found = of(model)
    return set(found.trained) if found else set()


def settings(model: nn.Module) -> dict[str, Any]:
    """PEFT's `adapter_config.json`; empty if the model has no such adapter."""
    found = of(model)
    return to_json(found.config, getattr(model, "source", "")) if found else {}


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
        except (NotImplementedError, ValueError) as error:
            unmerge(model)
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


def follow(model: nn.Module, optimizer: torch.optim.Optimizer, total: int) -> None:
    """Let a method that shares out its ranks while it trains (AdaLoRA, AdaMSS) do so after each of `total` steps.

    Nothing for all others. Raises ConfigError if its schedule does not fit into the steps.
    """
    found = of(model)
    if found is None or not hasattr(found.peft.base_model, "update_and_allocate"):
        return
    tuner, config, steps = found.peft.base_model, found.config, itertools.count(1)
    if config.peft_type == "ADALORA":
        config.total_step = found.total_step or total
        if config.tinit + config.tfinal >= config.total_step:
            got = f"tinit {config.tinit} and tfinal {config.tfinal}"
            raise ConfigError(f"--peft-config: {got} must leave some of {config.total_step} steps; give smaller ones")
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
