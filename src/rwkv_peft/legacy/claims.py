"""What an old command line says of the model and the machine, compared with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .table import TABLE


def check_claims(claims: Mapping[str, Any], model: Path | str) -> list[str]:
    """Compare what a line says with the model file and the machine.

    Returns notes. Raises ConfigError where the line contradicts a file, CheckpointError if the model file is none.
    """
    from ..loading import check_model
    from ..packed import read_model

    asked = {name: value for name, value in claims.items() if TABLE[name].kind == "checked"}
    if asked:
        kind, sizes = check_model(model, read_model(model))
        found = {
            "my_testing": kind.version, "n_layer": sizes.layers, "n_embd": sizes.width, "vocab_size": sizes.vocab_size,
            "dim_att": sizes.width, "dim_ffn": sizes.ffn, "head_size_a": sizes.head_size, "head_size_divisor": 8,
            "pre_ffn": 0, "head_qk": 0, "tiny_att_dim": 0, "my_pos_emb": 0,
        }  # fmt: skip
        for name, value in asked.items():
            if value != found[name] and not (name == "my_testing" and generation(value) == generation(kind.version)):
                raise ConfigError(
                    f"--{name} {value}: the model file has {found[name]}; leave the flag out, or name the right model"
                )
    return no_gpu(str(claims["accelerator"])) if "accelerator" in claims else []


def version_of(model: str) -> str:
    """The version of a model file, e.g. x070. Raises CheckpointError if it is none."""
    from ..loading import check_model
    from ..packed import read_model

    return check_model(model, read_model(model))[0].version


def generation(version: str) -> str:
    """7 for x070 and its variants, as the original saw it."""
    return next((digit for digit in "765" if digit in version), version)


def no_gpu(accelerator: str) -> list[str]:
    """A note if there is no GPU."""
    import torch

    return [] if torch.cuda.is_available() else [f"--accelerator {accelerator}: no GPU here, so the CPU does it"]
