"""An old command line to today's settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from ..config import TrainConfig, at_least
from ..errors import ConfigError
from ..yaml_config import settings_of
from .data import data_of
from .line import Old, Values, read
from .method import method_of
from .table import TABLE

PRECISIONS = {"bf16": "bf16", "bf16-true": "bf16", "fp32": "fp32", "tf32": "fp32"}
DEVICES = {"gpu": "auto", "cuda": "auto", "auto": "auto", "cpu": "cpu"}
QUANTS = {"": "none", "4bit": "fp4"} | {name: name for name in ("none", "int8", "nf4", "fp4", "fp8")}


@dataclass
class Translation:
    """An old command line, as today's settings."""

    values: Values
    """Settings and their values, as a YAML file has them."""
    claims: dict[str, Any]
    """Old flags whose value is to be checked against the model file or the machine."""
    notes: list[str]
    """Lines to print."""


def translate(argv: Sequence[str], version_of: Callable[[str], str] | None = None) -> Translation:
    """Today's settings for an old command line. Raises ConfigError, of one line, for what it cannot mean.

    `version_of` tells the version of a model file, for lines that do not; without it they mean the original's default.
    """
    old = read(argv)
    for name in old.given:
        row = TABLE[name]
        if row.refused and (row.form is bool or str(old[name]) not in row.harmless):
            raise ConfigError(f"{old.shown(name)}: {row.text}")
    old.version = old["my_testing"]
    if version_of and "my_testing" not in old and old["load_model"]:
        old.version = version_of(old["load_model"])
    values = {**run_of(old), **data_of(old), **steps_of(old), **optimiser_of(old), **method_of(old), **machine_of(old)}
    without_effect(old)
    return Translation(values, claims_of(old), old.notes)


def run_of(old: Old) -> Values:
    """Model, folder and seed."""
    if not old["load_model"]:
        raise ConfigError(
            "--load_model: missing; training a new model from nothing is not there yet, so name a model file"
        )
    return {"model": old["load_model"], "out": old["proj_dir"], "seed": max(0, old["random_seed"])}


# Steps, rates, machine


def steps_of(old: Old) -> Values:
    """Size and number of steps."""
    for name in ("ctx_len", "micro_bsz", "accumulate_grad_batches", "epoch_steps", "epoch_count"):
        at_least(f"--{name}", old[name], 1, f"the original's default is {TABLE[name].default}")
    epochs = max(1, min(old["epoch_count"], old["my_exit"] - old["epoch_begin"] + 1))
    steps = math.ceil(old["epoch_steps"] / old["accumulate_grad_batches"])
    return {
        "micro_batch": old["micro_bsz"],
        "grad_accum": old["accumulate_grad_batches"],
        "max_steps": epochs * steps,
    }


def optimiser_of(old: Old) -> Values:
    """Learning rates and the optimiser."""
    lr, final, warmup = old["lr_init"], old["lr_final"], max(0, old["warmup_steps"])
    is_wsd = old.choice("lr_schedule", {"cos": "cosine", "wsd": "wsd"}) == "wsd"
    schedule = "constant" if lr == final else "cosine"
    if is_wsd and schedule == "constant":
        old.note("lr_schedule", "no effect where --lr_final is --lr_init, as in the original")
    elif is_wsd:
        warmup, final = warmup or 100, 0.0
        old.note(
            "lr_schedule",
            f"a warm-up of {warmup} steps and a cosine to 0, as in the original; --schedule wsd of today is another",
        )
    if old["optim"] == "adam_mini":
        old.note("optim", "runs as adamw, which it imitates; --optim adamw8bit and adafactor need less memory")
    ours = get_args(settings_of(TrainConfig)["optim"].hint)
    optimisers = {"none": "adamw", "adam_mini": "adamw", "": "adamw"} | {name: name for name in ours}
    values: Values = {
        "lr": lr, "lr_final": final, "schedule": schedule, "warmup_steps": warmup,
        "layerwise_lr": old["layerwise_lr"] > 0 and "7" not in old.version,
        "optim": old.choice("optim", optimisers), "betas": [old["beta1"], old["beta2"]], "adam_eps": old["adam_eps"],
        "weight_decay": old["weight_decay"],
    }  # fmt: skip
    return values | ({"weight_decay_final": old["weight_decay_final"]} if old["weight_decay_final"] > 0 else {})


def machine_of(old: Old) -> Values:
    """Device, precision, checkpointing."""
    again = "block" if old["grad_cp"] > 0 else "none"
    values: Values = {"device": old.choice("accelerator", DEVICES), "grad_checkpoint": again}
    values["quant"] = old.choice("quant", QUANTS)
    if "precision" not in old:
        return values
    if old["precision"] == "fp16":
        raise ConfigError("--precision fp16: not there yet; choose bf16, or fp32 where a GPU has no bf16")
    if old["precision"] == "tf32":
        old.note("precision", "fp32 is taken, without the shortened products of tf32")
    return values | {"precision": old.choice("precision", PRECISIONS)}


# What has no effect, and what is checked


def without_effect(old: Old) -> None:
    """A line for each flag that does nothing or is to come; one for all that say what the original does anyway."""
    silent = []
    for name in old.given:
        row, value = TABLE[name], old[name]
        if row.kind == "explained":
            if row.form is not bool and value == Old({})[name]:
                silent.append(f"--{name}")
            else:
                old.note(name, row.text)
        elif row.kind == "later" and str(value) not in row.harmless:
            old.note(name, row.text)
    if silent:
        old.notes.append(f"{' '.join(silent)}: nothing to do")


def claims_of(old: Old) -> dict[str, Any]:
    """What the line says of the model and the machine."""
    asked = {name: old[name] for name in old.given if TABLE[name].kind == "checked"}
    claims = {name: value for name, value in asked.items() if (value > 0 if isinstance(value, int) else value)}
    if "accelerator" in old and old["accelerator"] in ("gpu", "cuda"):
        claims["accelerator"] = old["accelerator"]
    return claims
