"""Settings of the commands that use a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from ..errors import ConfigError
from .common import ESCAPES, Op, Quant, TokenizerName, at_least, words


@dataclass
class MergeConfig:
    """Add an adapter to its base and write a model file that any RWKV program loads."""

    base: Path
    """The model that the adapter was trained on."""
    adapter: list[Path]
    """Adapter folder, or an adapter `.pth` of the original program; of several, each adds its own change."""
    out: Path
    """File to write: `.pth` or `.safetensors`."""
    dtype: Literal["same", "fp32", "bf16", "fp16"] = "same"
    """Number format of the written tensors. [each as in the base]"""
    overwrite: bool = False
    """Replace the file if it exists."""
    alpha: float | None = None
    """For an original LoRA `.pth`, which does not hold it: the lora_alpha that it was trained with."""
    pissa_init: Path | None = None
    """For an original PiSSA `.pth`: its file of initial values. [init_pissa.pth beside it]"""
    onto: Literal["dense", "trained"] = "dense"
    """After training with --quant: add to the base as it is, or to its matrices rounded as they were in training."""

    def __post_init__(self) -> None:
        self.adapter = [Path(path) for path in words(self.adapter)]


@dataclass
class ExportConfig:
    """Write a model with its matrices in 8 or 4 bits, so that it is small, and loads fast."""

    model: Path
    """Model file: `.pth` or `.safetensors`."""
    out: Path
    """File to write: `.safetensors`, with the names of bitsandbytes."""
    quant: Literal["int8", "nf4", "fp4", "fp8"] = "nf4"
    """Format of the layers' matrices."""
    quant_head: bool = False
    """The head too."""
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
    adapter: tuple[Path, ...] = ()
    """Adapter folder trained on that model, or an adapter `.pth` of the original program; several add up."""
    state: Path | None = None
    """State file to begin with, e.g. `state.pth` of a state tuning. [the adapter's or the model's own, or none]"""
    alpha: float | None = None
    """For an original LoRA `.pth`, which does not hold it: the lora_alpha that it was trained with."""
    pissa_init: Path | None = None
    """For an original PiSSA `.pth`: its file of initial values. [init_pissa.pth beside it]"""
    tokenizer: TokenizerName = "auto"
    """How text becomes tokens. [world for a vocabulary of 65536, byte for up to 512]"""
    special_tokens: tuple[str, ...] = ()
    """Texts that are one token each. [the adapter's]"""
    stop_token: str | None = None
    """What ends an answer beside token 0: the id of a token, or its text. [the adapter's]"""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the weights. [bf16 on a GPU, fp32 on a CPU]"""
    quant: Quant = "none"
    """Keep the matrices in 8 or 4 bits; a file that holds them so is loaded as it is."""
    quant_head: bool = False
    """The head too."""
    device: str = "auto"
    """`cpu`, `cuda` or `cuda:N`. [a GPU if there is one]"""
    op: Op = "auto"
    """Operator of the recurrence. [the best that runs here]"""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        self.adapter = tuple(Path(path) for path in words(self.adapter))
        self.special_tokens = words(self.special_tokens)


@dataclass
class GenerateConfig(InferenceConfig):
    """Continue a prompt."""

    prompt: Annotated[str, ESCAPES] = "User: Hello!\n\nAssistant:"
    """Text to continue; `\\n` stands for a line break."""


@dataclass
class ChatConfig(InferenceConfig):
    """Talk with a model."""

    template: str | None = None
    """How the conversation becomes text: rwkv, g1-think and its kin, instruction, raw, a Jinja file. [the adapter's]"""
    system: Annotated[str, ESCAPES] = ""
    """What the model is told before the first turn; `\\n` stands for a line break."""


@dataclass
class DemoConfig:
    """Tune the tiny model that comes with the program, on data that comes with it; two minutes on a laptop."""

    out: Path = Path("runs/demo")
    """Folder of the run; an earlier demo in it is replaced."""


@dataclass
class DoctorConfig:
    """What this machine has, which operators run on it and why others do not, whether they compute the right numbers,
    and how fast it is."""

    device: str = "auto"
    """What to look at: `cpu`, `cuda` or `cuda:N`. [a GPU if there is one]"""
    seconds: float = 5.0
    """How long the test of speed takes, about; 0 leaves it out."""

    def check(self) -> None:
        """Raise `ConfigError` where a value is out of range."""
        if not 0 <= self.seconds <= 3600:
            raise ConfigError(f"--seconds {self.seconds:g}: must be from 0 to 3600; 5 is usual")
