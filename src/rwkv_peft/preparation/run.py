"""`rwkv-peft prepare`: text to a binidx pair, with all cores and resumable; and a pair back to text.

While it works there is a folder PREFIX.partial: the tokens so far (`ids`), the tokens of each document (`sizes`), and
`state.json`, which says how many of them count, and of which settings and sources. Whatever ends a run, the same
command goes on from there.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path

from rich.console import Console

from ..config import PrepareConfig, shares_of
from ..data.binidx import is_binidx, magic_prime, prefix_of, put_in_place
from ..data.sources import Piece, Split, files_of, read_pieces, size_of
from ..data.sources.places import has_texts, kind_of
from ..errors import ConfigError, DataError
from .encoding import Block, BlockEncoder, Counts, Recipe, blocks_of
from .lock import locked
from .progress import MB, progress_bar
from .resume import Partial, State, cut_off, find_state, refuse_existing, refuse_folders, remove, settings_of
from .to_text import TEXT_SUFFIXES, write_back
from .workers import Workers

SMALL = 2  # blocks that are not worth other processes


def prepare(config: PrepareConfig, console: Console | None = None) -> None:
    """Write the documents of `config.data` as PREFIX.bin and PREFIX.idx, or those of binidx pairs as text.

    The tokens are those of training: each segment of an example by itself, and token 0 or the stop token at its end;
    `--split` counts documents. The order is that of the sources, whatever the number of processes. A line at the end
    says what was written, and another what RWKV-LM wants to know of it.

    Raises:
        ConfigError: a setting that cannot be honoured, the output is there, PREFIX.partial is another run's, or
            another command is at work in it.
        DataError: a source that cannot be read, or an item that cannot be used (unless they are skipped).
        OutputError: what cannot be written.
    """
    config.check()
    console = console or Console()
    if any(share is not None for _, share in shares_of(config.data)):
        raise ConfigError(f"--data {' '.join(config.data)}: shares are for training; leave them out, all is prepared")
    pairs = [source for source in config.data if is_binidx(source)]
    refuse_folders(config.out)
    if config.out.suffix.lower() in TEXT_SUFFIXES:
        if len(pairs) < len(config.data):
            raise ConfigError(f"--out {config.out}: text is made of binidx pairs only; give --out the prefix of a pair")
        if not config.overwrite:
            refuse_existing(config.out)
        _say(console, write_back(config))
    elif pairs:
        raise ConfigError(f"--data {pairs[0]}: is tokens already; to get its text, let --out end in .jsonl or .txt")
    else:
        prefix = prefix_of(str(config.out))
        encoder = BlockEncoder(Recipe.of(config))
        notes = [note for source in config.data for note in _left_out(source, config.split)]
        notes += _idle(config)
        settings = settings_of(config, encoder.recipe, encoder.stop)
        with locked(prefix) as note:
            notes += [note] * bool(note)
            _to_tokens(config, find_state(config, prefix, settings), prefix, encoder, notes, console)


def _to_tokens(
    config: PrepareConfig, before: State, prefix: str, encoder: BlockEncoder, notes: list[str], console: Console
) -> None:
    """Text to a pair; what an earlier run has done is not done again."""
    split = Split.parse(config.split)
    if before.tokens:
        _say(console, f"{prefix}.partial: going on after {_done(before)}")
    began = time.monotonic()
    state = before if before.is_whole else _encode(config, prefix, before, encoder, console)
    seconds = time.monotonic() - began
    if not state.documents:
        remove(prefix)
        raise DataError(f"{state.counts.problem} (the first of {state.counts.skipped} skipped; none is left)")
    first, last, _ = split.of(state.documents).indices(state.documents)
    if first >= last:
        remove(prefix)
        raise DataError(f"--split {config.split}: none of the {state.documents:,} documents; choose a wider one")
    cut_off(prefix, state.tokens)
    tokens = put_in_place(prefix, first, last)
    remove(prefix)
    chosen = f"{last - first:,}" + (f" of {state.documents:,}" if last - first < state.documents else "")
    rate = (state.counts.bytes - before.counts.bytes) / MB / max(seconds, 1e-9)
    done = f"{chosen} documents, {tokens:,} tokens, {state.counts.bytes / MB:,.1f} MB of text, {rate:.1f} MB/s"
    _say(console, "; ".join([f"{prefix}.bin and .idx: {done}", *_told(state.counts), *notes]))
    prime = magic_prime(tokens, config.ctx_len)
    line = f"--my_exit_tokens {tokens} --magic_prime {prime} --ctx_len {config.ctx_len}"
    few = f"fewer tokens than three windows of --ctx-len {config.ctx_len}, so it has no --magic_prime"
    _say(console, f"for RWKV-LM: {line if prime else few}")


def _encode(config: PrepareConfig, prefix: str, before: State, encoder: BlockEncoder, console: Console) -> State:
    """Encode every piece behind `before`, or until --split has enough; returns the state at the end."""
    if before.counts.skipped and config.on_bad_line == "stop":
        raise DataError(before.counts.problem)
    most = Split.parse(config.split).most
    reading = Reading(config, before.counts.pieces)
    with (
        _results(config.jobs, encoder, reading.blocks()) as blocks,
        _partial(prefix, before) as done,
        progress_bar(console, reading.total) as show,
    ):
        try:
            for block in blocks:
                if block.counts.problem and config.on_bad_line == "stop":
                    raise DataError(block.counts.problem)
                done.add(block)
                show(done.state, reading.places.popleft())
                if most is not None and done.state.documents >= most:
                    done.finish(most)
                    return done.state
            done.finish(None)
        except (KeyboardInterrupt, ConfigError, DataError):
            if done.keep():
                _say(
                    console,
                    f"{prefix}.partial: keeps {_done(done.state)}; the same command goes on after them, "
                    "unless a source changes: then add --overwrite",
                )
            raise
    return done.state


class Reading:
    """The sources, read in blocks of pieces."""

    def __init__(self, config: PrepareConfig, skipped: int) -> None:
        """The first pieces, so many, are left away. Raises what `size_of` does."""
        self.config, self.skipped = config, skipped
        sizes = [size_of(source, config.split) for source in config.data]
        self.total = None if None in sizes else sum(size or 0 for size in sizes)
        """Bytes of all files, where they are known."""
        self.read = 0
        """Of these."""
        self.places: deque[int] = deque()
        """How many were read at the end of each block."""

    def blocks(self) -> Iterator[list[Piece]]:
        """The blocks. Raises what `read_pieces` does."""
        of = self.config
        pieces = chain.from_iterable(
            read_pieces(source, of.split, of.subset, of.separator, of.special_tokens, self._watch) for source in of.data
        )
        for block in blocks_of(islice(pieces, self.skipped, None)):
            self.places.append(self.read)
            yield block

    def _watch(self, size: int) -> None:
        self.read += size


@contextmanager
def _results(jobs: int | None, encoder: BlockEncoder, blocks: Iterator[list[Piece]]) -> Iterator[Iterator[Block]]:
    """What becomes of the blocks, in their order: in other processes if there are many."""
    first = list(islice(blocks, SMALL))
    blocks = chain(first, blocks)
    jobs = jobs or _cores()
    if jobs == 1 or len(first) < SMALL:
        yield map(encoder, blocks)
        return
    workers: Workers[list[Piece], Block] = Workers(jobs, partial(BlockEncoder, encoder.recipe))
    try:
        yield workers.map(blocks)
    finally:
        workers.close()


@contextmanager
def _partial(prefix: str, state: State) -> Iterator[Partial]:
    done = Partial(prefix, state)
    try:
        yield done
    finally:
        done.writer.close()


def _left_out(source: str, split: str) -> Iterator[str]:
    """What should be told of a folder. Raises ConfigError if it holds binidx pairs, which are tokens already."""
    if not Path(source).is_dir():
        return
    found = files_of(source, split)
    if found.pairs:
        raise ConfigError(f"--data {source}: holds tokens already, {found.pairs[0]}.bin; name the files of text in it")
    yield from found.notes(source)


def _idle(config: PrepareConfig) -> Iterator[str]:
    """What should be told of settings that were given and change nothing."""
    if config.separator and not any(has_texts(source, config.split) for source in config.data):
        yield "--separator: no effect, no source is a text file"
    if config.subset and not any(kind_of(source) == "hub" for source in config.data):
        yield "--subset: no effect, no source is a dataset of the hub"


def _done(state: State) -> str:
    """What an unfinished run has done."""
    return f"{state.documents:,} documents" + " and a part of the next one" * bool(state.begun)


def _told(counts: Counts) -> Iterator[str]:
    """What should be told of the items."""
    if counts.skipped:
        yield f"{counts.skipped:,} skipped, the first {counts.problem}"
    if counts.stops_inside:
        yield f"{counts.stops_inside:,} texts hold the stop token, where a model learns to stop"


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
