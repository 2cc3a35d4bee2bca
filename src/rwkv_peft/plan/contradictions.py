"""Settings that contradict the model's file, the adapter to go on with, or the device; before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..adapters import SavedAdapter
from ..adapters.attach import NO_DENSE, ends_in
from ..config import FOREIGN, MEANT_FOR, AdapterConfig, TrainConfig, flag_of
from ..errors import ConfigError
from ..loading import EMBEDDING, format_of
from ..packed import Entry, Packed


def check_settings(config: TrainConfig, path: Path, entries: Mapping[str, Entry], saved: SavedAdapter | None) -> None:
    """Raise ConfigError if the run by `config` cannot be: on the model in `path`, going on with `saved`.

    Raises CheckpointError if the file holds several formats.
    """
    config.check_base()  # once more: the method may be that of the adapter
    config.check_master_weights()
    if saved is not None:
        check_continued(config, saved)
        if EMBEDDING in saved.parts and config.embedding == "cpu":
            raise ConfigError(f"--embedding cpu: {config.adapter} trains the embedding; leave it out")
        if "head.weight" in saved.parts and config.quant_head:
            raise ConfigError(f"--quant-head: {config.adapter} trains the head; leave it out")
    if any(isinstance(entry, Packed) for entry in entries.values()):
        check_quantised(config, path, entries, saved)


def check_quantised(config: TrainConfig, path: Path, entries: Mapping[str, Entry], saved: SavedAdapter | None) -> None:
    """Raise ConfigError if the run needs dense matrices that the file has not."""
    quant = format_of(path, entries, config.quant, config.quant_head)
    if config.peft == "full":
        raise ConfigError(f"--peft full: {path} holds {quant}, which cannot train; name the dense file")
    if config.peft.startswith(FOREIGN):
        needs = "PEFT's own methods need dense matrices"
        raise ConfigError(f"--peft {config.peft}: {needs}, and {path} holds {quant}; name the dense file")
    if config.peft == "pissa" and saved is None:
        raise ConfigError(NO_DENSE.format(path))
    if isinstance(entries["head.weight"], Packed):
        if "head" in config.parts():
            raise ConfigError(f"--train-parts head: {path} holds it in {quant}; leave it out, or name the dense file")
        if saved is not None and "head.weight" in saved.parts:
            raise ConfigError(f"{config.adapter}: trains the head, which {path} holds in {quant}; name the dense file")


def check_continued(config: TrainConfig, saved: SavedAdapter) -> None:
    """Raise ConfigError if a setting was given that contradicts the adapter to go on with."""
    found, asked, plain = saved.config or AdapterConfig("state"), config.adapter_config(), AdapterConfig()
    for name in ("peft", "rank", "alpha", "rank_stabilised", "dora"):
        got, want = getattr(asked, name), getattr(found, name)
        if got not in (getattr(plain, name), want):
            shown = want if found.peft in MEANT_FOR.get(name, (found.peft,)) else f"none, as {found.peft}"
            raise ConfigError(f"{flag_of(name)} {got}: {config.adapter} has {shown}; leave it out")
    chosen = {target for target in found.targets if ends_in(target, asked.targets)}
    if asked.targets and found.targets and chosen != set(found.targets):
        raise ConfigError(f"--targets {' '.join(asked.targets)}: {config.adapter} has its own; leave it out")


def check_device(config: TrainConfig, on_gpu: bool) -> None:
    """Raise ConfigError if the run needs a GPU, and is on the CPU."""
    if on_gpu:
        return
    if config.optim.startswith("paged-"):
        plain = config.optim.removeprefix("paged-")
        raise ConfigError(f"--optim {config.optim}: needs a GPU, and the model is on cpu; use --optim {plain}")
    if config.master_weights == "bf16" and config.precision == "auto":
        raise ConfigError(
            "--master-weights bf16: not with --precision auto on cpu, where it is fp32; add --precision bf16, or leave "
            "it out"
        )
    if config.offload_checkpoints:
        raise ConfigError("--offload-checkpoints: needs a GPU, and the model is on cpu; leave it out")
    if config.embedding == "gpu":
        raise ConfigError("--embedding gpu: the run is on the CPU; leave it out")
