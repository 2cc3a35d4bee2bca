"""`rwkv-peft prepare`: text to a binidx pair, with all cores and resumable; and a pair back to text.

While it works there is a folder PREFIX.partial: the tokens so far (`ids`), the tokens of each document (`sizes`), and
`state.json`, which says how many of them count, and of which settings and sources. Whatever ends it, the same command
goes on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from os import cpu_count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..config import PrepareConfig, shares_of
from ..errors import ConfigError, DataError
from ..files import write_text
from .binidx import BinidxWriter, is_binidx, magic_prime, prefix_of, put_in_place
from .encoding import Block, BlockEncoder, Counts, Recipe, blocks_of
from .sources import Item, Split, files_of, fingerprint, read_items
from .to_text import TEXT_SUFFIXES, write_back
from .workers import Workers

SAVED_EVERY = 2.0  # seconds
SMALL = 2  # blocks that are not worth other processes
MB = 1e6


@dataclass
class State:
    """How far a run has come; JSON in the folder PREFIX.partial."""

    settings: dict[str, Any]
    """All that decides the tokens: the recipe, the sources and what tells whether they have changed."""
    documents: int = 0
    tokens: int = 0
    counts: Counts = field(default_factory=Counts)
    is_whole: bool = False
    """Whether every item is done, and only the pair is to be put in its place."""


def prepare(config: PrepareConfig, console: Console | None = None) -> None:
    """Write the documents of `config.data` as PREFIX.bin and PREFIX.idx, or those of binidx pairs as text.

    The tokens are those of training: each segment of an example by itself, and token 0 or the stop token at its end;
    `--split` counts documents. The order is that of the sources, whatever the number of processes. A line at the end
    says what was written, and another what RWKV-LM wants to know of it.

    Raises:
        ConfigError: a setting that cannot be honoured, the output is there already, or PREFIX.partial is of another run.
        DataError: a source that cannot be read, or an item that cannot be used (unless they are skipped).
        OutputError: what cannot be written.
    """
    config.check()
    console = console or Console()
    if any(share is not None for _, share in shares_of(config.data)):
        raise ConfigError(f"--data {' '.join(config.data)}: shares are for training; leave them out, all is prepared")
    pairs = [source for source in config.data if is_binidx(source)]
    if config.out.suffix.lower() in TEXT_SUFFIXES:
        if len(pairs) < len(config.data):
            raise ConfigError(f"--out {config.out}: a text file is made from binidx pairs only; give --out a prefix")
        _refuse(config, [config.out])
        _say(console, write_back(config))
        return
    if pairs:
        raise ConfigError(f"--data {pairs[0]}: is tokens already; to get its text back, let --out end in .jsonl or .txt")
    _to_tokens(config, prefix_of(str(config.out)), console)


def _to_tokens(config: PrepareConfig, prefix: str, console: Console) -> None:
    """Text to a pair; what was done before is not done again."""
    recipe, split = Recipe.of(config), Split.parse(config.split)
    encoder = BlockEncoder(recipe)
    for source in config.data:
        _warn(console, source, config.split)
    fresh = State(_settings(config, recipe, encoder.stop))
    state = _resume(config, prefix, fresh)
    if not state.is_whole:
        if state.counts.skipped and config.on_bad_line == "stop":
            raise DataError(state.counts.problem)
        began, before = time.monotonic(), state.counts.bytes
        if state.counts.items:
            _say(console, f"going on behind {state.documents:,} documents")
        _encode(config, prefix, state, encoder, split.most, console)
        rate = (state.counts.bytes - before) / max(time.monotonic() - began, 1e-9)
    else:
        rate = None
    chosen = split.of(state.documents)
    ...
