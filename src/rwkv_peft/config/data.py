"""Settings of what a model is trained on: where examples come from, what they become, and how they fill rows."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..errors import ConfigError
from .common import ADVANCED, ESCAPES, OnBadLine, Overlong, TokenizerName, at_least, words

Mask = Literal["auto", "all", "answers", "last", "pad", "qa", "se"]
Sampling = Literal["pack", "pad", "get", "only"]
Windows = Literal["tiles", "random", "prime"]
LONGEST_ROW = 2**31 - 1  # tokens
MICRO_BATCH = {"pack": 4, "pad": 8, "get": 4, "only": 1}  # rows at once, where no number is given


@dataclass(frozen=True)
class ChatForm:
    """How conversations were written in a training, which its adapter tells, so that a chat writes them alike."""

    template: str = "rwkv"
    """Its name, or the path of a Jinja file."""
    source: str = ""
    """The text of that file."""
    stop_token: str | None = None
    special_tokens: tuple[str, ...] = ()


@dataclass
class ReadConfig:
    """Where examples come from, and how they become tokens."""

    data: list[str]
    """What to read: files (JSONL, JSON, CSV, Parquet, text, each also .gz or .zst), folders of them, binidx prefixes,
    datasets of the Hugging Face hub. Of several, `A.jsonl:0.7 B.jsonl:0.3` gives each its share."""
    fields: tuple[str, str] | None = None
    """The two fields of an example that are prompt and response, e.g. `--fields question answer`."""
    template: str = "rwkv"
    """How conversations become text: rwkv, g1-think and its kin, instruction, raw, or a Jinja file."""
    stop_token: Annotated[str | None, ADVANCED] = None
    """What ends an answer: the id of a token, or its text. [0; what the template says]"""
    special_tokens: Annotated[tuple[str, ...], ADVANCED] = ()
    """Texts that become one token each, on ids that the vocabulary leaves unused; in this order."""
    tokenizer: Annotated[TokenizerName, ADVANCED] = "auto"
    """How text becomes tokens. [world for a vocabulary of 65536, byte for up to 512]"""
    split: Annotated[str, ADVANCED] = "train"
    """Which examples: `train` is all, `train[:1000]` the first thousand, `train[10%:]` all but the first tenth."""
    subset: Annotated[str, ADVANCED] = ""
    """Of a dataset on the hub: the name of its configuration."""
    separator: Annotated[str, ADVANCED, ESCAPES] = ""
    """Of text files: the text between two documents; `\\n` stands for a line break. [a file is one document]"""
    on_bad_line: Annotated[OnBadLine, ADVANCED] = "stop"
    """An example that cannot be used: `stop` with its number, or `skip` and count it."""

    def __post_init__(self) -> None:
        self.data = [os.fspath(path) for path in words(self.data)]
        self.special_tokens, self.template = words(self.special_tokens), os.fspath(self.template)
        if self.stop_token is not None:
            self.stop_token = str(self.stop_token)

    def check_reading(self) -> None:
        """Raise `ConfigError` where a value cannot be."""
        if not self.data:
            raise ConfigError("--data: got no file; name at least one")
        if any(not source.strip() for source in self.data):
            raise ConfigError("--data: one name is empty; is a variable of the shell not set?")
        if not _is_unicode(self.separator):
            raise ConfigError("--separator: is no UTF-8 text; write it as text")
        if "" in self.special_tokens or len(set(self.special_tokens)) < len(self.special_tokens):
            raise ConfigError("--special-tokens: must be different texts, none of them empty")


@dataclass
class DataConfig(ReadConfig):
    """How examples are masked, and how they fill rows."""

    mask: Annotated[Mask, ADVANCED] = "auto"
    """Which tokens are trained on: `all`, `answers`, the `last` answer, or the original's `pad`, `qa`, `se`. [answers;
    of plain text, all]"""
    mask_id: Annotated[str, ADVANCED] = ""
    """For --mask qa and se: the texts before what is masked and what is trained on, as JSON `{"mask0": "User:",
    "mask1": "Assistant:"}`."""
    sampling: Sampling = "pack"
    """How examples fill rows: `pack` whole ones side by side, `pad` one a row, `get` windows of the stream of all
    tokens, `only` one a step."""
    windows: Annotated[Windows, ADVANCED] = "tiles"
    """For --sampling get: `tiles` takes every token once an epoch, `random` any window, `prime` as RWKV-LM does."""
    pad_side: Annotated[Literal["right", "left"], ADVANCED] = "right"
    """For --sampling pad: where the padding is; no token sees it on either side."""
    ctx_len: int = 1024
    """Longest row of a batch, in tokens."""
    overlong: Annotated[Overlong, ADVANCED] = "split"
    """Examples longer than --ctx-len: `split` into rows, `truncate`, or `drop`; how many is printed."""
    streaming: Annotated[bool | None, ADVANCED] = None
    """Keep tokens in a temporary file instead of in memory. [if there are more than 256 MiB of them]"""

    def check_data(self) -> None:
        """Raise `ConfigError` where a value is out of range or two settings contradict each other."""
        self.check_reading()
        at_least("--ctx-len", self.ctx_len, 1, "512 or 1024 are usual")
        if self.ctx_len > LONGEST_ROW:
            raise ConfigError(f"--ctx-len {self.ctx_len}: must be at most {LONGEST_ROW}; 1024 or 4096 are usual")
        self.marks()
        if self.mask_id and self.mask not in ("qa", "se"):
            raise ConfigError(f"--mask-id: only with --mask qa or se, not {self.mask}; leave it out")

    def marks(self) -> tuple[str, str]:
        """The texts of --mask qa and se, before what is masked and what is trained on. Raises `ConfigError`."""
        if not self.mask_id:
            return ("User:", "Assistant:") if self.mask != "se" else ("0", "1")
        try:
            found = json.loads(self.mask_id)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.keys() != {"mask0", "mask1"} or not all(map(_is_text, found.values())):
            raise ConfigError(
                f'--mask-id {self.mask_id[:60]}: must be JSON of two texts, e.g. {{"mask0": "User:", "mask1": "Bot:"}}'
            )
        return found["mask0"], found["mask1"]


@dataclass
class _Prepared:
    """What preparing cannot do without."""

    data: list[str]
    out: Path
    """Prefix of the two files to write, PREFIX.bin and PREFIX.idx; or a `.jsonl` or `.txt` file to turn them into."""


@dataclass
class PrepareConfig(ReadConfig, _Prepared):
    """Turn text into tokens once: a binidx pair of files, which this and other RWKV trainers read; or back."""

    jobs: int | None = None
    """Processes that work at once. [one a core]"""
    ctx_len: int = 4096
    """Only for the line that is printed for RWKV-LM's own training: its --ctx_len."""
    overwrite: bool = False
    """Replace what is there under that name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.out = Path(self.out)

    def check(self) -> None:
        """Raise `ConfigError` where a value is out of range."""
        self.check_reading()
        at_least("--ctx-len", self.ctx_len, 1, "4096 is usual")
        if self.jobs is not None:
            at_least("--jobs", self.jobs, 1, "leave it out for one a core")


@dataclass
class InspectConfig(DataConfig):
    """Look at data as training would see it, or at a model, adapter or state file."""

    show: int = 0
    """Examples to show as the model will see them, what is masked in grey (between ⟦ and ⟧ without colours)."""
    picture: Path | None = None
    """PNG file to draw the lengths of the examples into."""
    model: Path | None = None
    """Model whose vocabulary decides the tokenizer. [World]"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.picture = Path(self.picture) if self.picture else None
        self.model = Path(self.model) if self.model else None

    def check(self) -> None:
        """Raise `ConfigError` where a value is out of range."""
        self.check_data()
        at_least("--show", self.show, 0, "try 3")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value) and _is_unicode(value)


def _is_unicode(text: str) -> bool:
    """Whether it has no half of a surrogate pair, as which Python reads what is no UTF-8."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def shares_of(data: list[str]) -> list[tuple[str, float | None]]:
    """Each source of --data and its share, or None for all if none is given.

    Raises ConfigError if only some have one, or if they do not sum to 1.
    """
    found = [_share(source) for source in data]
    shares = [share for _, share in found if share is not None]
    given = " ".join(data)
    if shares and len(shares) < len(found):
        raise ConfigError(f"--data {given}: only some have a share; give each one, or none")
    if any(not 0 < share <= 1 for share in shares) or (shares and not math.isclose(sum(shares), 1, abs_tol=1e-3)):
        raise ConfigError(f"--data {given}: the shares sum to {sum(shares):g}; each must be above 0, and their sum 1")
    return found


def _share(source: str) -> tuple[str, float | None]:
    path, colon, number = source.rpartition(":")
    if not colon or not path or Path(source).exists():
        return source, None
    try:
        return path, float(number)
    except ValueError:
        return source, None
