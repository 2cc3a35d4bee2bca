"""The commands. Whatever is heavy is imported by the command that needs it, so that --help is instant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .config import (
    ChatConfig,
    DemoConfig,
    DoctorConfig,
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    MergeConfig,
    PlanConfig,
    PrepareConfig,
    TrainConfig,
)

INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One word after `rwkv-peft`."""

    help: str
    kind: type[Any]
    """The dataclass of its settings."""
    run: Callable[[Any], int | None]
    """Returns the exit code; None is 0."""
    positional: tuple[str, ...] = ()
    """Settings that may be given without their flag, in this order."""
    if_memory_ends: str = "choose a smaller model, or another --device"
    hint: str = ""
    """The last sentence of its help."""


def train(config: TrainConfig) -> int:
    """Fine-tune; a run that was stopped by hand has saved its adapter, but is not done."""
    from .training.run import train

    return INTERRUPTED if train(config).interrupted else 0


def demo(config: DemoConfig) -> None:
    """Tune the tiny model."""
    from .demo import run_demo

    run_demo(config)


def prepare(config: PrepareConfig) -> None:
    """Turn text into tokens, or back."""
    from .preparation import prepare

    prepare(config)


def plan(config: PlanConfig) -> int:
    """Say what a run would need; 1 if it does not fit."""
    from .plan import run_plan

    return 0 if run_plan(config) else 1


def inspect(config: InspectConfig) -> None:
    """Look at data, a model, an adapter or a state."""
    from .inspection import run_inspect

    run_inspect(config)


def merge(config: MergeConfig) -> None:
    """Merge, and say where the file is."""
    from .export.merge import merge

    c = config
    print(merge(c.base, c.adapter, c.out, c.dtype, c.overwrite, c.alpha, c.pissa_init, c.onto))


def export(config: ExportConfig) -> None:
    """Quantise a model file, and say where the result is."""
    from .export.quantised import export_quantised

    print(export_quantised(config.model, config.out, config.quant, config.quant_head, config.overwrite))


def generate(config: GenerateConfig) -> None:
    """Continue a prompt."""
    from .inference import run_generate

    run_generate(config)


def chat(config: ChatConfig) -> None:
    """Talk."""
    from .chat_repl import run_chat

    run_chat(config)


def doctor(config: DoctorConfig) -> int:
    """Look at the machine; 1 if something that could be used here computes wrong numbers."""
    from .doctor import run_doctor

    return 0 if run_doctor(config) else 1


COMMANDS = {
    "demo": Command("tune the tiny model that comes with the program, in two minutes", DemoConfig, demo),
    "train": Command(
        "fine-tune a model on examples and write an adapter",
        TrainConfig,
        train,
        if_memory_ends="try --grad-checkpoint block, or a smaller --micro-batch, --ctx-len or --rank",
        hint="The original's flags work too: docs/migration.md.",
    ),
    "plan": Command(
        "what a run would need of the GPU, RAM and disk, before anything is loaded: plan MODEL [settings of train]",
        PlanConfig,
        plan,
        ("model",),
        hint="--fit 12GiB proposes settings that fit.",
    ),
    "inspect": Command(
        "look at data as training would see it, or at a model, adapter or state: inspect PATH...",
        InspectConfig,
        inspect,
        ("data",),
        if_memory_ends="try --streaming, or a part of it, such as --split 'train[:10000]'",
    ),
    "prepare": Command(
        "turn text into tokens once, or back: prepare PATH... --out PREFIX",
        PrepareConfig,
        prepare,
        ("data",),
        if_memory_ends="try fewer --jobs",
    ),
    "merge": Command("add an adapter to its base: BASE ADAPTER OUT", MergeConfig, merge, ("base", "adapter", "out")),
    "export": Command(
        "write a model with its matrices in 8 or 4 bits: MODEL OUT", ExportConfig, export, ("model", "out")
    ),
    "generate": Command("continue a prompt", GenerateConfig, generate),
    "chat": Command("talk with a model", ChatConfig, chat),
    "doctor": Command(
        "what this machine has, which operators run on it, whether they are right, and how fast it is",
        DoctorConfig,
        doctor,
        if_memory_ends="close what else uses the device, or choose another --device",
    ),
}
