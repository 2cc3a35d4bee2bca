"""What an old command line trains: method, settings, parts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..config import FOREIGN, TrainConfig, check_part
from ..errors import ConfigError
from ..yaml_config import convert, settings_of, suggestion
from .line import Old, Values

# The keys of each JSON config, and the setting that each is
KEYS: dict[str, dict[str, str]] = {
    "lora_config": {"lora_load": "adapter", "lora_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"},
    "pissa_config": {
        "pissa_load": "adapter", "pissa_init": "pissa_init", "pissa_r": "rank", "svd_niter": "svd_iterations",
    },
    "disha_config": {"mode": "peft", "load": "adapter", "r": "rank"},
    "bone_config": {"bone_mode": "peft", "bone_load": "adapter", "bone_r": "rank"},
    "miss_config": {"mode": "peft", "load": "adapter", "r": "rank"},
}  # fmt: skip
IGNORED_KEYS = ("lora_parts", "pissa_parts")
# method → the config that is its own; the first is its default
CONFIGS: dict[str, tuple[str, ...]] = {
    "lora": ("lora_config",),
    "pissa": ("pissa_config",),
    "bone": ("disha_config", "bone_config", "miss_config"),
}
FLAT: dict[str, dict[str, str]] = {
    "lora": {"lora_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_load": "adapter"},
    "pissa": {"lora_r": "rank", "svd_niter": "svd_iterations", "pissa_load": "adapter", "pissa_init": "pissa_init"},
}
METHODS = {
    "none": "full", "": "full", "lora": "lora", "pissa": "pissa", "disha": "bone", "bone": "bone", "miss": "bone",
    "bat": "bat", "state": "state",
}  # fmt: skip
MODES = {"bone": "bone", "bat": "bat", "mode": "bone", "": "bone"}
# Hugging Face PEFT's settings that are ours, with its defaults
HF_DEFAULTS: dict[str, Values] = {
    "lora": {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False},
    "bone": {"r": 64},
}
HF_KEYS = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rank_stabilised", "use_dora": "dora",
}  # fmt: skip
HF_TARGETS = ("receptance", "key", "value", "output")


def method_of(old: Old) -> Values:
    """Method, its settings, and the parts that train."""
    with_state = tunes_state(old)
    name = "pissa" if old["PISSA"] else "lora" if old["lora"] else old["peft"]
    hf = "peft_config" in old and name not in ("none", "", "state")
    if hf:
        values = hugging_face(old, name)
    elif name in METHODS:
        values = own_method(old, METHODS[name])
    else:
        known = " ".join(filter(None, METHODS))
        raise ConfigError(f"--peft {name}: allowed are {known}; and with --peft_config, what Hugging Face PEFT has")
    if values["peft"] in ("full", "state"):
        values["peft"] = "state" if with_state else values["peft"]
        if "train_parts" in old:
            trains = "the state alone" if values["peft"] == "state" else "every weight"
            old.note("train_parts", f"no effect, as in the original: {trains} trains")
        return values | ({"train_parts": ["none"]} if values["peft"] == "state" else {})
    parts = parts_of(old, hf)
    if with_state:  # beside an adapter, at the same rate as all else
        old.note("state_tune" if old["state_tune"] else "train_type", "the state trains beside the adapter and parts")
        parts, values["lr_state"] = [*parts, "state"], old["lr_init"]
    return values | {"train_parts": parts or ["none"]}


def tunes_state(old: Old) -> bool:
    """Whether an initial state trains. Raises ConfigError for infinite context."""
    if old["train_type"] == "infctx":
        raise ConfigError(
            "--train_type infctx: infinite context is not there yet; leave it out, and take a larger --ctx_len with "
            "--grad_cp 1"
        )
    kind = old.choice("train_type", {"none": "", "": "", "finetune": "", "state": "state"})
    return bool(kind == "state" or old["state_tune"] or old["peft"] == "state")


def own_method(old: Old, peft: str) -> Values:
    """A method of the original's own, with the settings of its JSON config and of the flat flags."""
    values: Values = {"peft": peft}
    family = "bone" if peft == "bat" else peft
    flags = CONFIGS.get(family, ())
    used = next((flag for flag in flags if flag in old), flags[0] if flags else "")
    if used:
        values |= config_values(old, used)
        values["peft"] = "bat" if peft == "bat" else values["peft"]
    flat = FLAT.get(family, {})
    for flag, setting in flat.items():
        if flag in old:
            values |= given_value(old, flag, setting, old[flag])
    for flag in dict.fromkeys((*KEYS, "peft_config", *FLAT["lora"], *FLAT["pissa"])):
        if flag in old and flag != used and flag not in flat and old[flag] is not None:  # which checks its form
            old.note(flag, f"no effect with --peft {'none' if peft == 'full' else peft}")
    if "adapter" in values:  # which has its own, where the line says nothing; but no alpha, as a `.pth`
        given = {"peft", "adapter", *(["alpha"] if values["adapter"].endswith(".pth") else [])}
        given |= {setting for key, setting in KEYS[used].items() if key in old.said(used)}
        given |= {setting for flag, setting in flat.items() if flag in old}
        values = {name: value for name, value in values.items() if name in given}
    if "lora_parts" in old or (old["lora"] and "adapter" not in values):
        values |= lora_targets(old)
    if "pissa_init" in values and "adapter" not in values:
        old.notes.append(f"pissa_init {values.pop('pissa_init')}: no effect without pissa_load")
    return values


def config_values(old: Old, flag: str) -> Values:
    """The settings that a JSON config means."""
    values: Values = {"peft": next(method for method, flags in CONFIGS.items() if flag in flags)}
    known, given = KEYS[flag], old[flag]
    if flag == "bone_config" and flag in old and "bone_mode" not in given:
        values["peft"] = "bat"
        old.note(flag, "Bone, while it had no bone_mode, was what is called bat now")
    for key, value in given.items():
        if key in IGNORED_KEYS:
            continue
        if key not in known:
            raise ConfigError(f"--{flag}: {key} is no key of it{suggestion(key, known)}; allowed are {' '.join(known)}")
        if known[key] != "peft":
            values |= given_value(old, f"{flag} {key}", known[key], value)
        elif isinstance(value, str) and value in MODES:
            values["peft"] = MODES[value]
        else:
            raise ConfigError(f"--{flag} {key} {value}: allowed are bone bat")
    return values


def given_value(old: Old, where: str, setting: str, value: Any) -> Values:
    """One setting, or none for an empty path.

    The original began a new adapter if the file to load was not there, and its scripts need that: `--lora_load rwkv-0`.
    """
    if setting in ("adapter", "pissa_init"):
        if not isinstance(value, str):
            raise ConfigError(f"--{where} {value}: must be a path, or empty")
        if setting == "adapter" and value and not value.endswith(".pth") and not Path(value).exists():
            old.notes.append(f"--{where} {value}: no such file, so a new adapter begins, as in the original")
            return {}
        return {setting: value} if value else {}
    if value is None:
        raise ConfigError(f"--{where} null: must be a number")
    return {setting: convert(value, settings_of(TrainConfig)[setting].hint, f"--{where}")}


def lora_targets(old: Old) -> Values:
    """The matrices that `--lora_parts` names."""
    parts = old["lora_parts"].split(",")
    gate = () if "7" in old.version else ("att.gate",)
    matrices = {
        "att": ("att.receptance", "att.key", "att.value", "att.output", *gate),
        "ffn": ("ffn.key", "ffn.value", *(("ffn.receptance",) if gate else ())),
    }
    chosen = [name for name in matrices if name in parts]
    if not chosen:
        raise ConfigError(f"--lora_parts {old['lora_parts']}: adapts nothing; add att, ffn or both")
    return {} if len(chosen) == len(matrices) else {"targets": list(matrices[chosen[0]])}


def hugging_face(old: Old, name: str) -> Values:
    """A method of Hugging Face PEFT: ours where it is one of ours, with nothing but what we have."""
    given, method = old["peft_config"], METHODS.get(name, name)
    defaults = HF_DEFAULTS.get(method, {})
    for flag in KEYS:
        if flag in old:
            old.note(flag, "no effect with --peft_config")
    if defaults and given.keys() <= defaults.keys():
        where = "--peft_config"
        settings = {HF_KEYS[key]: (key, value) for key, value in (defaults | given).items()}
        hints = settings_of(TrainConfig)
        values = {s: convert(value, hints[s].hint, f"{where} {key}") for s, (key, value) in settings.items()}
        return {"peft": method, **values, "targets": list(HF_TARGETS)}
    name = "miss" if method == "bone" else name
    return {"peft": f"{FOREIGN}{name.upper()}", "peft_config": json.dumps(given), "targets": list(HF_TARGETS)}


def parts_of(old: Old, hf: bool) -> list[str]:
    """The parts that train beside an adapter, each once."""
    if ("lora_parts" in old or old["lora"]) and "train_parts" not in old:
        parts = [part for part in ("time", "ln") if part in old["lora_parts"].split(",")]
    elif hf and "train_parts" not in old:
        parts = []
    else:
        parts = [part for part in re.findall(r"\w+", " ".join(old["train_parts"])) if part != "none"]
    parts += ["emb", "head"] if old["emb"] else []
    for part in parts:
        check_part(part)
    if "time" in parts and "7" in old.version:
        old.notes.append(
            "--train_parts time: in RWKV-7 x_* w0 a0 v0 k_k k_a r_k; the original, which looked for `time` in names, "
            "left them frozen, as --train_parts ln does"
        )
    return list(dict.fromkeys(parts))
