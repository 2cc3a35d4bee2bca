"""Every other method of Hugging Face PEFT, through PEFT itself: `--peft peft:OFT --peft-config '{"oft_block_size": 16}'`.

PEFT puts its own layers in the place of the model's, which become their `base_layer`. What it needs to know about them
is in `model.foreign`, which nn.Module does not see. PEFT is an optional package, imported where it is used.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import first_line
from ..config import FOREIGN, AdapterConfig
from ..errors import CheckpointError, ConfigError
from .saved import SavedAdapter

NAME = "default"  # PEFT's name of an adapter that is alone
PREFIX = "base_model.model."  # before the names in PEFT's files; the tensors that all layers share have "base_model."
UNTOLD = 2**31  # AdaLoRA's number of steps until `follow` knows it
PROMPTS = "works on the prompts of attention, which RWKV has not; --peft state learns what comes before a text"
UNFIT = {
    "ADAPTION_PROMPT": PROMPTS,
    "POLY": "needs the number of a task beside every example",
    "SHADOW": "needs the decoder blocks of a Transformers model",
    "TRAINABLE_TOKENS": "trains rows of the embedding; --train-parts emb does that",
    "XLORA": "mixes finished adapters of a Transformers model",
}
# entries of adapter_config.json that are not the method's
GENERAL = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
}  # fmt: skip


@dataclasses.dataclass
class Foreign:
    """PEFT's side of a model with an adapter of its."""

    peft: Any
    """The `PeftModel` around the model."""
    total_step: int | None
    """AdaLoRA's number of steps, if it was given."""
    unmerged: list[tuple[nn.Parameter, Tensor]] = dataclasses.field(default_factory=list)
    """While the adapter is merged: the base's parameters, and their values before."""

    @property
    def config(self) -> Any:
        return self.peft.peft_config[NAME]


def attach(model: nn.Module, config: AdapterConfig, targets: Sequence[str]) -> None:
    """Add the adapter that PEFT has under this name to the matrices; only it trains, in float32.

    Raises ConfigError, and leaves the model as it was, if PEFT is not there, or has no such method, or the method does
    not fit this model or these settings.
    """
    peft = library("peft")
    settings, before = make_config(model, config, targets), dict(model.named_modules())
    weights = [(p, p.data, p._version) for p in model.parameters()]
    try:
        if settings.peft_type == "GLORA":
            make_plain(model)
        model.foreign = Foreign(peft.get_peft_model(model, settings), config.peft_config.get("total_step"))  # type: ignore[assignment]
        check_attached(model, weights)
        dress(model)
    except Exception as error:  # whatever PEFT meets: it checks little itself
        detach(model, before, weights)
        if isinstance(error, torch.OutOfMemoryError):
            raise
        what = f"{first_line(error)}; give other settings as --peft-config, or other --targets"
        raise ConfigError(f"--peft {config.peft}: does not fit this model: {what}") from error


def make_config(model: nn.Module, config: AdapterConfig, targets: Sequence[str]) -> Any:
    """PEFT's own settings of the method. Raises ConfigError."""
    kinds = {kind.value: cls for kind, cls in library("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    fit = sorted(name for name, cls in kinds.items() if name not in UNFIT and hasattr(cls, "target_modules"))
    method = config.peft.removeprefix(FOREIGN).upper()
    if method not in fit:
        why = UNFIT.get(method, PROMPTS) if method in kinds else "PEFT has no such method"
        raise ConfigError(f"--peft {config.peft}: {why}; allowed are {' '.join(fit)}{hint(method, fit)}")
    known = {field.name: field for field in dataclasses.fields(kinds[method])}
    allowed = sorted(known.keys() - GENERAL)
    for key, value in config.peft_config.items():
        if key not in allowed:
            means = f"{method} has no such setting; allowed are {' '.join(allowed)}{hint(key, allowed)}"
            raise ConfigError(f"--peft-config {key}: {means}")
        default = known[key].default
        number = isinstance(default, int | float) and not isinstance(default, bool)
        if number and value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"--peft-config {key} {value!r}: must be a number; {method} takes {default} by default")
    chosen = {"target_modules": list(targets), **defaults(method, model, config, targets), **config.peft_config}
    try:
        made = kinds[method](**chosen)
        if method == "ADALORA" and not 0 < made.target_r < made.init_r:
            raise ValueError(f"target_r {made.target_r} must be below init_r {made.init_r}")
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"--peft-config {config.peft_config}: not for {method}: {first_line(error)}") from error
    return made


def defaults(method: str, model: nn.Module, config: AdapterConfig, targets: Sequence[str]) -> dict[str, Any]:
    """Settings that PEFT wants, or whose defaults do not suit this model."""
    sizes = [size for name in targets for size in model.get_parameter(f"{name}.weight").shape]
    block = max(n for n in range(1, 257) if math.gcd(*sizes) % n == 0)  # PEFT's default is 256
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)]
    known: dict[str, dict[str, Any]] = {
        "ADALORA": {"total_step": UNTOLD},
        "C3A": {"block_size": block},
        "FROD": {"progressbar": False},
        "IA3": {"feedforward_modules": r".*ffn\.value"},  # scaled at its input, as in the paper
        "LN_TUNING": {} if config.targets else {"target_modules": norms},
        "VBLORA": {"vector_length": block},
    }
    return known.get(method, {})


def check_attached(model: nn.Module, weights: Sequence[tuple[nn.Parameter, Tensor, int]]) -> None:
    """Raise ValueError if more trains than the adapter, or if the base is not what it was."""
    own = parameters(model)
    others = [name for name, p in model.named_parameters() if p.requires_grad and name not in own]
    if others:
        raise ValueError(f"{others[0]} is not the adapter's, --train-parts trains such")
    if any(p.data_ptr() != data.data_ptr() or p._version != version for p, data, version in weights):
        raise ValueError("it changes weights of the base, which an adapter folder does not hold")


def dress(model: nn.Module) -> None:
    """Keep the adapter in float32, and its results in the dtype of its inputs, whatever the base's."""
    for layer in layers(model).values():
        base = {id(tensor) for tensor in own_tensors(layer.get_base_layer())}
        for tensor in own_tensors(layer):
            if id(tensor) not in base and tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                tensor.data = tensor.data.float()
        layer.register_forward_hook(same_dtype)
    model.train(model.training)


def same_dtype(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook; an embedding's inputs are whole numbers."""
    return output.to(inputs[0].dtype) if inputs[0].is_floating_point() else output


def make_plain(model: nn.Module) -> None:
    """Give GLoRA, which takes no subclass, a torch.nn.Linear for each matrix of att and ffn; the weights are shared."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.split(".")[-2:-1] in (["att"], ["ffn"]):
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = module.weight
            model.set_submodule(name, plain)


def detach(
    model: nn.Module, before: Mapping[str, nn.Module], weights: Sequence[tuple[nn.Parameter, Tensor, int]] = ()
) -> None:
    """Put the model's own modules back in their places."""
    for name, module in before.items():
        owner, _, leaf = name.rpartition(".")
        if name and getattr(before[owner], leaf) is not module:
            setattr(before[owner], leaf, module)
    for parameter, data, _ in weights:
        parameter.data = data
    for attribute in {"foreign", "peft_config"} & vars(model).keys():
        delattr(model, attribute)


def load(model: nn.Module, saved: SavedAdapter, path: Path | str) -> None:
    """Add a saved adapter, exactly as it was. Raises CheckpointError, and leaves the model as it was, if it is not whole.

    Raises ConfigError if PEFT is not there.
    """
    library("peft")
    assert saved.config is not None
    before = dict(model.named_modules())
    pattern = saved.config.peft_config.get("rank_pattern") if saved.config.peft.endswith("ADALORA") else None
    settings = saved.config.peft_config | ({"rank_pattern": None} if pattern else {})
    try:
        attach(model, dataclasses.replace(saved.config, peft_config=settings), ())
    except ConfigError as error:
        raise CheckpointError(f"{path}: does not fit this base or this version of PEFT ({error})") from error
    found, expected = of(model), tensors(model)
    assert found is not None
    found.total_step = None  # of the run that comes, if any
    given = with_pruned(saved.tensors, expected, pattern or {})
    wrong = sorted(given.keys() ^ expected.keys()) or [n for n in expected if given[n].shape != expected[n].shape]
    if wrong:
        detach(model, before)
        where = given.get(wrong[0], expected.get(wrong[0]))
        raise CheckpointError(
            f"{path}: {wrong[0]} is missing, has no use or another shape{'' if where is None else ''}; copy it again"
        )
    whole = {name if name.startswith("base_model.") else PREFIX + name: tensor for name, tensor in given.items()}
    library("peft").set_peft_model_state_dict(found.peft, whole)


def with_pruned(
    given: Mapping[str, Tensor], whole: Mapping[str, Tensor], pattern: Mapping[str, Sequence[bool]]
) -> dict[str, Tensor]:
    """AdaLoRA's tensors with the ranks that PEFT leaves out of its files; their `lora_E` is 0, as in a new adapter."""
    full = dict(given)
    for name, kept in pattern.items():
        ranks = torch.tensor(kept).nonzero().flatten()
        for leaf, axis in (("lora_E", 0), ("lora_A", 0), ("lora_B", 1)):
            own = name.replace("lora_E", leaf)
            if own in given and own in whole and given[own].shape[axis] == len(ranks) <= whole[own].shape[axis]:
                full[own] = whole[own].cpu().index_copy(axis, ranks, given[own].to(whole[own].dtype))
    return full


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors as PEFT saves them, without `base_model.model.`; none if the model has no such adapter."""
    found = of(model)
    if found is None:
        return {}
    merged, config = bool(found.unmerged), found.config
    if merged:
        unmerge(model)
    pattern = getattr(config, "rank_pattern", None)
    if config.peft_type == "ADALORA":
        config.rank_pattern = None  # which would leave out ranks that are 0 now, but train again
    state = library("peft").get_peft_model_state_dict(found.peft, save_embedding_layers=False)
    if config.peft_type == "ADALORA":
        config.rank_pattern = pattern
    if merged:
        merge(model)
    seen: set[int] = set()
    for name, tensor in state.items():  # a file holds no two names of one tensor
        state[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


def parameters(model: nn.Module) -> set[str]:
    """Names of the adapter's parameters in the model."""
    starts = tuple(f"{name}." for name in layers(model))
    names = [name for name, _ in model.named_parameters() if name.startswith(starts)]
    return {name for name in names if ".base_layer." not in name}


def settings(model: nn.Module) -> dict[str, Any]:
    """PEFT's `adapter_config.json`."""
    found = of(model)
    if found is None:
        return {}
    own = {"base_model_name_or_path": getattr(model, "source", ""), "inference_mode": True}
    pruned = {"rank_pattern": None} if found.config.peft_type == "ADALORA" else {}
    return {**plain(found.config.to_dict()), **own, **pruned}


def config_of(path: Path, settings: Mapping[str, Any]) -> AdapterConfig:
    """The settings that an `adapter_config.json` means."""
    kind = settings.get("peft_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{path}/adapter_config.json: names no method as peft_type; copy the folder again")
    return AdapterConfig(FOREIGN + kind, peft_config={k: v for k, v in settings.items() if k not in GENERAL})


def merge(model: nn.Module) -> None:
    """Add the adapter to the weights. Raises ConfigError, and leaves them as they were, if the method cannot."""
    found = of(model)
    if found is None or found.unmerged:
        return
    for layer in layers(model).values():
        kept = [(p, p.data) for p in layer.get_base_layer().parameters()]
        found.unmerged += kept
        try:
            for parameter, data in kept:
                parameter.data = data.to(torch.float32, copy=True)
            with warnings.catch_warnings(action="ignore"):
                layer.merge()
        except (NotImplementedError, ValueError) as error:
            unmerge(model)
            method = found.config.peft_type.value
            raise ConfigError(f"peft:{method} cannot be merged ({first_line(error)}); use the adapter") from error
        for parameter, data in kept:
            parameter.data = parameter.data.to(data.dtype)


def unmerge(model: nn.Module) -> None:
    """Put the weights back as they were, to the bit."""
    found = of(model)
    if found is None or not found.unmerged:
        return
    for layer in layers(model).values():
        with warnings.catch_warnings(action="ignore"):
            if layer.merged:
                layer.unmerge()  # near to what it was, and PEFT knows of it
    for parameter, data in found.unmerged:
        parameter.data = data
    found.unmerged = []


def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights that the adapter and the parts beside it change, under official names, merged."""
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
    config, steps = found.config, itertools.count(1)
    if config.peft_type == "ADALORA":
        config.total_step = found.total_step or total
        if config.tinit + config.tfinal >= config.total_step:
            got = f"tinit {config.tinit} and tfinal {config.tfinal}"
            raise ConfigError(f"--peft-config: {got} must leave some of {config.total_step} steps; give smaller ones")
    # after the step and before its gradients are dropped, from which the importance of a rank is told
    optimizer.register_step_post_hook(lambda *_: found.peft.base_model.update_and_allocate(next(steps)))


def extra_loss(model: nn.Module) -> Tensor | None:
    """What AdaLoRA adds to the loss of a step, once: how far its factors are from orthogonal ones. Others: None."""
    found = of(model)
    weight = getattr(found.config, "orth_reg_weight", 0.0) if found else 0.0
    if not weight:
        return None
    factors = [f for layer in layers(model).values() for f in (layer.lora_A[NAME], layer.lora_B[NAME].T)]  # (r,n)
    norms = [torch.linalg.matrix_norm(f @ f.T - torch.eye(len(f), device=f.device)) for f in factors]
    return weight * torch.stack(norms).mean()


def of(model: nn.Module) -> Foreign | None:
    """PEFT's side of the model, if it has an adapter of PEFT's."""
    return getattr(model, "foreign", None)


def layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by the names of what they adapt."""
    if of(model) is None:
        return {}
    kind = library("peft.tuners.tuners_utils").BaseTunerLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def library(name: str) -> Any:
    """A module of PEFT. Raises ConfigError if it, or one that it needs, is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"--peft {FOREIGN}METHOD: needs the package peft ({error}); pip install peft") from error


def hint(word: str, allowed: Sequence[str]) -> str:
    near = get_close_matches(word, allowed, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset | list | tuple):
        items = [plain(item) for item in value]
        return sorted(items) if isinstance(value, set | frozenset) else items
    return value.value if isinstance(value, Enum) else value
