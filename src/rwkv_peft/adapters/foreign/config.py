"""The settings of Hugging Face PEFT's methods: from ours to PEFT's, to and from its `adapter_config.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn

from ...checkpoint import first_line
from ...config import FOREIGN, AdapterConfig
from ...errors import CheckpointError, ConfigError
from ...packages import optional
from ..lora import STARTS
from ..saved import GENERAL

UNTOLD = 2**31  # AdaLoRA's number of steps while nobody knows it
PROMPTS = "works on the prompts of attention, which RWKV has not; --peft state learns what comes before a text"
UNFIT = {
    "ADAMSS": "clusters the rows of the base anew when it is loaded, which another machine does otherwise",
    "ADAPTION_PROMPT": PROMPTS,
    "POLY": "needs the number of a task beside every example",
    "SHADOW": "needs the decoder blocks of a Transformers model",
    "TRAINABLE_TOKENS": "trains rows of the embedding; --train-parts emb does that",
    "XLORA": "mixes finished adapters of a Transformers model",
}
UNFIT_SETTINGS = {
    "alora_invocation_tokens": "works only where PEFT itself prepares each call",
    "trainable_token_indices": "trains rows of the embedding; --train-parts emb does that",
}


def library(name: str) -> Any:
    """A module of PEFT. Raises ConfigError if it is not installed."""
    return optional(name, f"--peft {FOREIGN}METHOD")


def make_config(model: nn.Module, config: AdapterConfig, targets: Sequence[str]) -> Any:
    """An object of PEFT's config class of the method. Raises ConfigError."""
    kinds = {kind.value: cls for kind, cls in library("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    fit = sorted(name for name, cls in kinds.items() if name not in UNFIT and "target_modules" in setting_names(cls))
    method = config.peft.removeprefix(FOREIGN)
    if method not in fit:
        why = UNFIT.get(method, PROMPTS) if method in kinds else "PEFT has no such method"
        raise ConfigError(f"--peft {config.peft}: {why}; allowed are {' '.join(fit)}{hint(method, fit)}")
    check_settings(method, kinds[method], config.peft_config)
    chosen = {
        "target_modules": list(targets), **defaults(method, model, config, targets), **without_layers(config, targets),
    }  # fmt: skip
    try:
        made = kinds[method](**chosen)
        check_made(method, made)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"--peft-config: not for {method}: {first_line(error)}") from error
    return made


def without_layers(config: AdapterConfig, targets: Sequence[str]) -> dict[str, Any]:
    """The settings, with whole names for `layers_to_transform`, which PEFT does not find in names like ours.

    Raises ConfigError if it leaves no matrix.
    """
    layers = config.peft_config.get("layers_to_transform")
    if layers is None or "target_modules" in config.peft_config:
        return config.peft_config
    numbers = {str(number) for number in (layers if isinstance(layers, list) else [layers])}
    names = [name for name in targets if name.startswith("blocks.") and name.split(".")[1] in numbers]
    if not names:
        raise ConfigError(f"--peft-config layers_to_transform {layers}: the model has no such layer")
    kept = {k: v for k, v in config.peft_config.items() if k not in ("layers_to_transform", "layers_pattern")}
    return {**kept, "target_modules": names}


def check_made(method: str, made: Any) -> None:
    """Raise ValueError for values that PEFT itself takes, and that cannot work here."""
    if method == "ADALORA" and not 0 < made.target_r < made.init_r:
        raise ValueError(f"target_r {made.target_r} must be below init_r {made.init_r}, and above 0")
    if method == "ADALORA" and made.deltaT < 1:
        raise ValueError(f"deltaT {made.deltaT} must be at least 1")
    start = getattr(made, "init_lora_weights", True)
    if isinstance(start, str) and start not in STARTS:
        remedy = "take --peft pissa, or let PEFT save a plain LoRA, with path_initial_model_for_weight_conversion"
        allowed = " ".join(STARTS)
        raise ValueError(f"init_lora_weights {start} changes the base or needs data; allowed are {allowed}; {remedy}")


def check_settings(method: str, kind: type, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting that the method has not, or that is no number where one is wanted."""
    known = {field.name: field.default for field in dataclasses.fields(kind)}
    allowed = sorted(known.keys() - GENERAL)
    for key, value in given.items():
        if key not in allowed:
            means = f"{method} has no such setting; allowed are {' '.join(allowed)}{hint(key, allowed)}"
            raise ConfigError(f"--peft-config {key}: {means}")
        if value and key in UNFIT_SETTINGS:
            raise ConfigError(f"--peft-config {key}: {UNFIT_SETTINGS[key]}; leave it out")
        if is_number(known[key]) and value is not None and not is_number(value):
            raise ConfigError(f"--peft-config {key} {value!r}: must be a number; {method}'s default is {known[key]}")


def setting_names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def hint(word: str, allowed: Sequence[str]) -> str:
    near = get_close_matches(word, allowed, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def defaults(method: str, model: nn.Module, config: AdapterConfig, targets: Sequence[str]) -> dict[str, Any]:
    """Settings that PEFT wants, or whose defaults do not suit this model."""
    matrices: list[Any] = [model.get_submodule(name) for name in targets]
    size = math.gcd(*(n for matrix in matrices for n in (matrix.in_features, matrix.out_features)))
    block = max(n for n in range(1, 257) if size % n == 0)  # PEFT's default is 256
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


def to_json(config: Any, source: str) -> dict[str, Any]:
    """PEFT's `adapter_config.json`; `source` names the base."""
    pruned = {"rank_pattern": None} if config.peft_type == "ADALORA" else {}  # we save every rank
    return {**plain(config.to_dict()), "base_model_name_or_path": source, "inference_mode": True, **pruned}


def config_of(path: Path, settings: Mapping[str, Any]) -> AdapterConfig:
    """The settings that an `adapter_config.json` means. Raises CheckpointError if it names no method."""
    kind = settings.get("peft_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{path}/adapter_config.json: names no method as peft_type; copy the folder again")
    return AdapterConfig(FOREIGN + kind, peft_config={k: v for k, v in settings.items() if k not in GENERAL})


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset | list | tuple):
        items = [plain(item) for item in value]
        return sorted(items) if isinstance(value, set | frozenset) else items
    return value.value if isinstance(value, Enum) else value
