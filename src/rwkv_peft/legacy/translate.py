"""An old command line to today's settings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..config import TrainConfig, at_least
from ..errors import ConfigError
from ..yaml_config import settings_of
from .line import Old, Values, read
from .method import method_of
from .table import TABLE

JSON_FILES = (".jsonl", ".json")
PRECISIONS = {"bf16": "bf16", "bf16-true": "bf16", "fp32": "fp32", "tf32": "fp32"}
DEVICES = {"gpu": "auto", "cuda": "auto", "auto": "auto", "cpu": "cpu"}


@dataclass
class Translation:
    """An old command line, as today's settings."""

    values: Values
    """Settings and their values, as a YAML file has them."""
    claims: dict[str, Any]
    """Old flags whose value is to be checked against the model file, the data or the machine."""
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


# Data


def data_of(old: Old) -> Values:
    """Files, fields, and what becomes of long examples."""
    values: Values = {"data": data_files(old), "ctx_len": old["ctx_len"], "overlong": "truncate"}
    if "sft_field" in old:
        if len(old["sft_field"]) != 2:
            raise ConfigError(f"{old.shown('sft_field')}: must be 2 fields, the prompt's and the answer's")
        values["fields"] = old["sft_field"]
    if "sft_split" in old:
        values["split"] = old["sft_split"]
    if old["loss_mask"] == "se" and old["data_type"] != "sft":
        raise ConfigError(
            "--loss_mask se: masks between tokens of one's own are not there yet; leave it out, and write the lines as "
            "messages, of which the answers train"
        )
    return values


def data_files(old: Old) -> list[str]:
    """The data, which must be JSONL. Raises ConfigError if it is said to be anything else."""
    name, kind = old["data_file"], "jsonl"
    if "data_type" in old:
        kind = old["data_type"]
    if not name:
        raise ConfigError("--data_file: missing; name a JSONL file")
    path = Path(name)
    if kind not in ("jsonl", "sft"):
        if path.suffix not in JSON_FILES or not path.is_file():
            raise ConfigError(f"--data_type {kind}: such data is not there yet; give --data_file a JSONL file")
        old.note("data_type", f"{path.name} is JSONL, and read as such")
    if kind == "sft":
        old.note("data_type", "prompts take RWKV's own form, User: … Assistant: …, and answers end with token 0")
    if path.is_dir():
        files = sorted(str(file) for file in path.iterdir() if file.suffix in JSON_FILES)
        if not files:
            raise ConfigError(f"--data_file {name}: a folder without .jsonl or .json files; name one that has some")
        return files
    if not path.exists() and path.suffix not in JSON_FILES and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(
            f"--data_file {name}: no such file; if it is on the Hugging Face hub: that is not there yet, so fetch it "
            "and name the JSONL file"
        )
    return [name]


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
    values: Values = {"device": old.choice("accelerator", DEVICES), "grad_checkpoint": old["grad_cp"] > 0}
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
        if (name, value) == ("loss_mask", "qa"):
            old.note(name, "only answers train, of messages, conversations or two fields, as is usual here")
        elif row.kind == "explained":
            if (row.form is not bool and value == Old({})[name]) or (name, value) == ("loss_mask", "pad"):
                silent.append(f"--{name}")
            else:
                old.note(name, row.text)
        elif row.kind == "later" and str(value) not in row.harmless:
            old.note(name, row.text)
    if silent:
        old.notes.append(f"{' '.join(silent)}: nothing to do")


def claims_of(old: Old) -> dict[str, Any]:
    """What the line says of the model, the data and the machine."""
    asked = {name: old[name] for name in old.given if TABLE[name].kind == "checked"}
    claims = {name: value for name, value in asked.items() if (value > 0 if isinstance(value, int) else value)}
    if "loss_mask" in old:
        old.choice("loss_mask", dict.fromkeys(("none", "pad", "qa", "se"), ""))
        if old["loss_mask"] == "qa" and "sft_field" not in old:
            claims["loss_mask"] = "qa"
    if "accelerator" in old and old["accelerator"] in ("gpu", "cuda"):
        claims["accelerator"] = old["accelerator"]
    return claims
