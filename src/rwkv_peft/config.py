"""Every setting of every command, as dataclasses. Standard library only.

A field's docstring is its help text on the command line and names its unit. Checks that need nothing but the settings
themselves are here, in `check`; those that need a file or a device are where the file or the device is opened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from .errors import ConfigError

TRAIN_PARTS = ("time", "ln", "emb", "head")
ADAPTER_ONLY = ("rank", "alpha", "dropout", "targets", "train_parts")  # settings that full tuning has no use for

Dtype = Literal["fp32", "bf16", "fp16"]
Op = Literal["auto", "torch", "reference"]
OnBadLine = Literal["stop", "skip"]
Overlong = Literal["split", "truncate", "drop"]
TokenizerName = Literal["auto", "world", "byte"]

# Marks that the command line reads
ADVANCED = "advanced"  # only --help-all shows it
ESCAPES = "escapes"  # in a flag's text, a backslash and n stand for a line break


@dataclass
class AdapterConfig:
    """What `attach_adapter` adds to a model."""

    peft: Literal["lora"] = "lora"
    """Method."""
    rank: int = 32
    """Inner dimension of each adapter."""
    alpha: float | None = None
    """Scale: the adapter's product is multiplied by alpha/rank. [2 * rank]"""
    dropout: float = 0.0
    """Probability of zeroing an input of the adapter while training, from 0 to below 1."""
    targets: tuple[str, ...] = ()
    """Matrices to adapt, by the end of their name, e.g. `att.key` or `key`. [all matrices of att and ffn]"""

    def __post_init__(self) -> None:
        self.targets = words(self.targets)

    def check(self) -> None:
        """Raise `ConfigError` where a value is out of range."""
        at_least("--rank", self.rank, 1, "try 8, 16 or 32")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(f"--alpha {self.alpha}: must be above 0 and finite; twice the rank is usual")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout {self.dropout}: must be from 0 to below 1; try 0.05")


@dataclass
class TrainConfig:
    """Fine-tune a model on examples and write an adapter."""

    model: Path
    """Base model: an official `.pth` or `.safetensors` file."""
    data: list[Path]
    """JSONL files whose lines hold `text`, `messages`, `conversations`, or two fields named by --fields."""
    out: Path
    """Folder of this run; must be new or empty."""
    peft: Literal["lora", "full"] = "lora"
    """Method: `lora` trains an adapter, `full` every weight."""
    rank: int = 32
    """Inner dimension of each adapter."""
    alpha: float | None = None
    """Scale: the adapter's product is multiplied by alpha/rank. [2 * rank]"""
    dropout: Annotated[float, ADVANCED] = 0.0
    """Probability of zeroing an input of the adapter while training, from 0 to below 1."""
    targets: Annotated[tuple[str, ...], ADVANCED] = ()
    """Matrices to adapt, by the end of their name, e.g. `att.key` or `key`. [all matrices of att and ffn]"""
    train_parts: tuple[str, ...] = ("time", "ln")
    """Parts trained in full beside the adapter: time ln emb head, or none."""
    fields: tuple[str, str] | None = None
    """The two fields of a line that are prompt and response, e.g. `--fields question answer`."""
    tokenizer: Annotated[TokenizerName, ADVANCED] = "auto"
    """How text becomes tokens. [world for a vocabulary of 65536, byte for up to 512]"""
    ctx_len: int = 1024
    """Longest row of a batch, in tokens."""
    overlong: Annotated[Overlong, ADVANCED] = "split"
    """Examples longer than --ctx-len: `split` into rows, `truncate`, or `drop`; how many is printed."""
    on_bad_line: Annotated[OnBadLine, ADVANCED] = "stop"
    """A line that cannot be used: `stop` with its number, or `skip` and count it."""
    micro_batch: int = 8
    """Rows computed at once."""
    grad_accum: int = 1
    """Micro-batches added up before a step."""
    epochs: float = 1.0
    """Passes over the data; --max-steps ends the run earlier."""
    max_steps: int | None = None
    """Optimiser steps, however many epochs they take. [as --epochs says]"""
    lr: float = 2e-4
    """Peak learning rate."""
    lr_final: float = 2e-5
    """Learning rate at the last step."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, ADVANCED] = 0.0
    """AdamW's decay, on matrices only."""
    betas: Annotated[tuple[float, float], ADVANCED] = (0.9, 0.99)
    """AdamW's averaging factors."""
    adam_eps: Annotated[float, ADVANCED] = 1e-8
    """AdamW's epsilon."""
    clip: Annotated[float, ADVANCED] = 1.0
    """Largest norm of the gradient; 0 switches clipping off."""
    logit_penalty: Annotated[float, ADVANCED] = 1e-4
    """Strength of RWKV's pull of the largest logit to 0; 0 switches it off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the matrices. [bf16 on a GPU, fp32 on a CPU]"""
    grad_checkpoint: bool = False
    """Recompute each block in the backward pass: about a third slower, far less memory."""
    device: str = "auto"
    """`cpu`, `cuda` or `cuda:N`. [a GPU if there is one]"""
    op: Annotated[Op, ADVANCED] = "auto"
    """Operator of the recurrence. [the best that runs here]"""
    seed: int = 0
    """Seed of the order of examples, of new weights and of dropout."""

    def __post_init__(self) -> None:
        self.model, self.out = Path(self.model), Path(self.out)
        self.data = [Path(path) for path in words(self.data)]
        self.targets, self.train_parts = words(self.targets), words(self.train_parts)

    def check(self) -> None:
        """Raise `ConfigError` where a value is out of range or two settings contradict each other."""
        self.adapter().check()
        self.parts()
        for flag, value in (
            ("--ctx-len", self.ctx_len), ("--micro-batch", self.micro_batch), ("--grad-accum", self.grad_accum),
        ):  # fmt: skip
            at_least(flag, value, 1, "try 1024" if flag == "--ctx-len" else "try 1")
        if self.max_steps is not None:
            at_least("--max-steps", self.max_steps, 1, "leave it out to follow --epochs")
        if self.epochs <= 0:
            raise ConfigError(f"--epochs {self.epochs}: must be above 0; try 1")
        if self.lr <= 0 or self.lr_final < 0:
            raise ConfigError(
                f"--lr {self.lr} --lr-final {self.lr_final}: must be above 0 and at least 0; try 2e-4 2e-5"
            )
        for flag, number in (
            ("--warmup-steps", self.warmup_steps), ("--weight-decay", self.weight_decay), ("--clip", self.clip),
            ("--logit-penalty", self.logit_penalty), ("--seed", self.seed),
        ):  # fmt: skip
            if number < 0:
                raise ConfigError(f"{flag} {number}: must be at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"--betas {self.betas[0]} {self.betas[1]}: both must be from 0 to below 1; try 0.9 0.99")
        if self.adam_eps <= 0:
            raise ConfigError(f"--adam-eps {self.adam_eps}: must be above 0; try 1e-8")
        if not self.data:
            raise ConfigError("--data: got no file; name at least one JSONL file")

    def without_effect(self) -> list[str]:
        """Flags of settings that were changed, but mean nothing for the method."""
        given = [f.name for f in fields(self) if f.name in ADAPTER_ONLY and getattr(self, f.name) != f.default]
        return ["--" + name.replace("_", "-") for name in given] if self.peft == "full" else []

    def parts(self) -> tuple[str, ...]:
        """The trainable parts asked for, with `none` resolved. Raises `ConfigError` on an unknown name."""
        parts = () if self.train_parts == ("none",) else self.train_parts
        for part in parts:
            check_part(part)
        return parts

    def adapter(self) -> AdapterConfig:
        """The adapter's settings as `attach_adapter` takes them."""
        return AdapterConfig("lora", self.rank, self.alpha, self.dropout, tuple(self.targets))


@dataclass
class MergeConfig:
    """Add an adapter to its base and write a model file that any RWKV program loads."""

    base: Path
    """The model that the adapter was trained on."""
    adapter: Path
    """Adapter folder."""
    out: Path
    """File to write: `.pth` or `.safetensors`."""
    dtype: Literal["same", "fp32", "bf16", "fp16"] = "same"
    """Number format of the written tensors. [each as in the base]"""
    overwrite: bool = False
    """Replace the file if it exists."""


@dataclass
class SamplingConfig:
    """How the next token is chosen, and when to stop."""

    max_tokens: int = 256
    """Most tokens of an answer."""
    temperature: float = 1.0
    """Randomness; 0 always takes the likeliest token."""
    top_p: float = 0.5
    """Only the likeliest tokens that together have this probability are considered."""
    stop: Annotated[tuple[str, ...], ESCAPES] = ()
    """Texts that end the answer (the end token always does); `\\n` stands for a line break."""
    seed: int | None = None
    """Seed of the random choice. [a new one each time]"""

    def check(self) -> None:
        """Raise `ConfigError` where a value is out of range."""
        at_least("--max-tokens", self.max_tokens, 1, "try 256")
        if self.temperature < 0:
            raise ConfigError(f"--temperature {self.temperature}: must be at least 0; 0 is greedy, 1 is usual")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: must be above 0 and at most 1; try 0.5")


@dataclass
class InferenceConfig:
    """A model to run: a base, a base with its adapter, or a merged file."""

    model: Path
    """Model file: `.pth` or `.safetensors`."""
    adapter: Path | None = None
    """Adapter folder trained on that model."""
    tokenizer: TokenizerName = "auto"
    """How text becomes tokens. [world for a vocabulary of 65536, byte for up to 512]"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the weights. [bf16 on a GPU, fp32 on a CPU]"""
    device: str = "auto"
    """`cpu`, `cuda` or `cuda:N`. [a GPU if there is one]"""
    op: Op = "auto"
    """Operator of the recurrence. [the best that runs here]"""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass
class GenerateConfig(InferenceConfig):
    """Continue a prompt."""

    prompt: Annotated[str, ESCAPES] = "User: Hello!\n\nAssistant:"
    """Text to continue; `\\n` stands for a line break."""


@dataclass
class ChatConfig(InferenceConfig):
    """Talk with a model."""

    system: Annotated[str, ESCAPES] = ""
    """What the model is told before the first turn; `\\n` stands for a line break."""


@dataclass
class DemoConfig:
    """Tune the tiny model that comes with the program, on data that comes with it; two minutes on a laptop."""

    out: Path = Path("runs/demo")
    """Folder of the run; an earlier demo in it is replaced."""


def check_part(part: str) -> None:
    """Raise `ConfigError` if no part of a model is called so."""
    if part not in TRAIN_PARTS:
        raise ConfigError(f"--train-parts {part}: allowed are {' '.join(TRAIN_PARTS)}, or none alone")


def words(value: Any) -> tuple[Any, ...]:
    """Several values, of which Python callers may give just one."""
    return (value,) if isinstance(value, str | Path) else tuple(value)


def at_least(flag: str, value: int, least: int, remedy: str) -> None:
    """Raise `ConfigError` if `value` is below `least`."""
    if value < least:
        raise ConfigError(f"{flag} {value}: must be at least {least}; {remedy}")
