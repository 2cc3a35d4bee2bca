"""`rwkv-peft prepare`: text to a binidx pair, with all cores and resumable; and a pair back to text.

While it works there is a folder PREFIX.partial: the tokens so far (`ids`), the tokens of each document (`sizes`), and
`state.json`, which says how many of them count, and of which settings and sources. Whatever ends a run, the same
command goes on from there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..config import PrepareConfig, shares_of
from ..data.binidx import is_binidx, magic_prime, prefix_of, put_in_place
from ..data.sources import Item, Split, files_of, read_items
from ..errors import ConfigError, DataError
from .encoding import Block, BlockEncoder, Counts, Recipe, blocks_of
from .resume import Partial, State, find_state, refuse_existing, remove, settings_of
from .to_text import TEXT_SUFFIXES, write_back
from .workers import Workers

SMALL = 2  # blocks that are not worth other processes
MB = 1e6


def prepare(config: PrepareConfig, console: Console | None = None) -> None:
    """Write the documents of `config.data` as PREFIX.bin and PREFIX.idx, or those of binidx pairs as text.

    The tokens are those of training: each segment of an example by itself, and token 0 or the stop token at its end;
    `--split` counts documents. The order is that of the sources, whatever the number of processes. A line at the end
    says what was written, and another what RWKV-LM wants to know of it.

    Raises:
        ConfigError: a setting that cannot be honoured, the output is there, or PREFIX.partial is another run's.
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
            raise ConfigError(f"--out {config.out}: text is made of binidx pairs only; give --out the prefix of a pair")
        if not config.overwrite:
            refuse_existing(config.out)
        _say(console, write_back(config))
    elif pairs:
        raise ConfigError(f"--data {pairs[0]}: is tokens already; to get its text, let --out end in .jsonl or .txt")
    else:
        _to_tokens(config, prefix_of(str(config.out)), console)


def _to_tokens(config: PrepareConfig, prefix: str, console: Console) -> None:
    """Text to a pair; what an earlier run has done is not done again."""
    recipe, split = Recipe.of(config), Split.parse(config.split)
    encoder = BlockEncoder(recipe)
    notes = [note for source in config.data for note in _left_out(source, config.split)]
    before = find_state(config, prefix, settings_of(config, recipe, encoder.stop))
    if before.documents:
        _say(console, f"{prefix}.partial: going on after {before.documents:,} documents")
    began = time.monotonic()
    state = before if before.is_whole else _encode(config, prefix, before, encoder, console)
    seconds = time.monotonic() - began
    if not state.documents:
        remove(prefix)
        raise DataError(f"{state.counts.problem} (the first of {state.counts.skipped} skipped; none is left)")
    first, last, _ = split.of(state.documents).indices(state.documents)
    if first >= last:
        raise DataError(f"--split {config.split}: none of the {state.documents:,} documents; choose a wider one")
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
    """Encode every item behind `before`, or until --split has enough; returns the state at the end."""
    if before.counts.skipped and config.on_bad_line == "stop":
        raise DataError(before.counts.problem)
    most = Split.parse(config.split).most
    sources = (read_items(source, config.split, config.subset, config.separator) for source in config.data)
    items = islice(chain.from_iterable(sources), before.counts.items, None)
    with _results(config.jobs, encoder, items) as blocks, _partial(prefix, before) as done, _bar(console) as show:
        try:
            for block in blocks:
                if block.counts.problem and config.on_bad_line == "stop":
                    raise DataError(block.counts.problem)
                done.add(block)
                show(done.state)
                if most is not None and done.state.documents >= most:
                    break
            done.save(is_whole=True)
        except (KeyboardInterrupt, ConfigError, DataError):
            if done.keep():
                _say(
                    console,
                    f"{prefix}.partial: keeps {done.state.documents:,} documents; the same command goes on after them, "
                    "unless a source changes: then add --overwrite",
                )
            raise
    return done.state


@contextmanager
def _results(jobs: int | None, encoder: BlockEncoder, items: Iterator[Item]) -> Iterator[Iterator[Block]]:
    """The blocks of `items`, in their order: from other processes if there are many items."""
    blocks = blocks_of(items)
    first = list(islice(blocks, SMALL))
    blocks = chain(first, blocks)
    jobs = jobs or _cores()
    if jobs == 1 or len(first) < SMALL:
        yield map(encoder, blocks)
        return
    workers: Workers[list[Item], Block] = Workers(jobs, partial(BlockEncoder, encoder.recipe))
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


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[State], None]]:
    """What shows how far a run has come: in a terminal only."""
    columns = BarColumn(bar_width=24), TextColumn("{task.fields[shown]}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("prepare", total=None, shown="")
        began, before = time.monotonic(), -1

        def show(state: State) -> None:
            nonlocal began, before
            size = state.counts.bytes
            if before < 0:  # from the first block on: processes take a while to start
                began, before = time.monotonic(), size
            rate = (size - before) / MB / max(time.monotonic() - began, 1e-9)
            progress.update(task, shown=f"{state.documents:,} documents, {size / MB:,.0f} MB, {rate:.1f} MB/s")

        yield show


def _left_out(source: str, split: str) -> Iterator[str]:
    """What should be told of a folder. Raises ConfigError if it holds binidx pairs, which are tokens already."""
    if not Path(source).is_dir():
        return
    found = files_of(source, split)
    if found.pairs:
        raise ConfigError(f"--data {source}: holds tokens already, {found.pairs[0]}.bin; name the files of text in it")
    if found.left_out:
        yield f"{source}: {len(found.left_out)} files of other splits left out"


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
