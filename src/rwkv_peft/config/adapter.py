"""Methods and their settings."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .common import at_least, flag_of, words

TRAIN_PARTS = ("time", "ln", "emb", "head", "state", "shift")
METHODS = ("lora", "pissa", "bone", "bat", "state", "full")
ALIASES = {"miss": "bone", "disha": "bone"}  # other names of a method
LARGEST_RANK = 2**16  # no matrix has a longer side, but a damaged folder may claim one
FOREIGN = "peft:"  # before the name of a method of Hugging Face PEFT
# settings of one method or a few, and which
MEANT_FOR = {
    "rank": ("lora", "pissa", "bone", "bat"),
    "alpha": ("lora", "pissa"),
    "dropout": ("lora", "pissa"),
    "targets": ("lora", "pissa", "bone", "bat"),
    "rank_stabilised": ("lora",),
    "dora": ("lora",),
    "svd_iterations": ("pissa",),
    "peft_config": (),  # but for PEFT's own methods
}


@dataclass
class AdapterConfig:
    """What `attach_adapter` adds to a model."""

    peft: str = "lora"
    """Method: lora, pissa, bone (= miss), bat, state, or `peft:METHOD` for most others of Hugging Face PEFT."""
    rank: int = 32
    """Inner dimension of each adapter; bone and bat: width of a block."""
    alpha: float | None = None
    """Scale: the adapter's product is multiplied by alpha/rank. [2 * rank; pissa: rank]"""
    dropout: float = 0.0
    """Probability of zeroing an input of the adapter while training, from 0 to below 1."""
    targets: tuple[str, ...] = ()
    """Matrices to adapt, by the end of their name, e.g. `att.key` or `key`. [all matrices of att and ffn]"""
    rank_stabilised: bool = False
    """LoRA: scale by alpha/sqrt(rank) instead of alpha/rank, so that high ranks learn as fast."""
    dora: bool = False
    """LoRA: train the length of each row of the matrix apart from its direction (DoRA)."""
    svd_iterations: int = 4
    """PiSSA: rounds of the randomised SVD; 0 takes the exact one, which is slower."""
    peft_config: dict[str, Any] = field(default_factory=dict)
    """For `peft:METHOD`: the settings of PEFT's own config class."""

    def __post_init__(self) -> None:
        self.peft = method_name(self.peft)
        self.targets = words(self.targets)

    @property
    def scale(self) -> float:
        """What a LoRA's product is multiplied by."""
        alpha = self.alpha if self.alpha is not None else self.rank if self.peft == "pissa" else 2 * self.rank
        return alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def check(self) -> None:
        """Raise `ConfigError` where a value is out of range, or means nothing for the method."""
        check_method(self.peft)
        at_least("--rank", self.rank, 1, "try 8, 16 or 32")
        if self.rank > LARGEST_RANK:
            raise ConfigError(f"--rank {self.rank}: must be at most {LARGEST_RANK}; try 8, 16 or 32")
        at_least("--svd-iterations", self.svd_iterations, 0, "0 is the exact SVD, 4 is usual")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(f"--alpha {self.alpha}: must be above 0 and finite; twice the rank is usual")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout {self.dropout}: must be from 0 to below 1; try 0.05")
        for name in ("rank_stabilised", "dora"):
            if getattr(self, name) and self.peft not in MEANT_FOR[name]:
                raise ConfigError(f"{flag_of(name)}: only with --peft lora, not {self.peft}; leave it out")
        if self.peft_config and not self.peft.startswith(FOREIGN):
            raise ConfigError(f"--peft-config: only with --peft peft:METHOD, not {self.peft}; leave it out")


def method_name(peft: str) -> str:
    """A method's one name: aliases resolved, PEFT's in capitals."""
    return FOREIGN + peft[len(FOREIGN) :].upper() if peft.startswith(FOREIGN) else ALIASES.get(peft, peft)


def check_part(part: str) -> None:
    """Raise `ConfigError` if no part of a model is called so."""
    if part not in TRAIN_PARTS:
        raise ConfigError(f"--train-parts {part}: allowed are {' '.join(TRAIN_PARTS)}, or none alone")


def check_method(peft: str, allowed: tuple[str, ...] = METHODS[:-1]) -> None:
    """Raise `ConfigError` if no method is called so."""
    if peft not in allowed and not (peft.startswith(FOREIGN) and len(peft) > len(FOREIGN)):
        near = get_close_matches(peft, [*allowed, *ALIASES], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--peft {peft}: unknown; allowed are {' '.join(allowed)} and peft:METHOD{hint}")


def read_peft_config(text: str) -> dict[str, Any]:
    """The object that `text` is as JSON, or that the JSON file of that name holds. Raises `ConfigError`."""
    if not text.strip():
        return {}
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--peft-config {text}: no JSON object, nor a file of one ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--peft-config {text}: must be a JSON object, e.g. '{{\"r\": 8}}'")
    return found
