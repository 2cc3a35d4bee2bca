"""What shows in a terminal how far a run of `prepare` has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .resume import State

MB = 1e6


@contextmanager
def progress_bar(console: Console, total: int | None) -> Iterator[Callable[[State, int], None]]:
    """A bar in a terminal, and nothing elsewhere; it is told a state and the bytes of the files that led to it.

    `total` is all of these bytes; without one, there is no share and no time that is left.
    """
    columns = BarColumn(bar_width=24), TextColumn("{task.fields[shown]}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("prepare", total=total, shown="")
        began, text, place = 0.0, -1, 0

        def show(state: State, at: int) -> None:
            nonlocal began, text, place
            size = state.counts.bytes
            if text < 0:  # from the first block on: processes take a while to start, and some may be done already
                began, text, place = time.monotonic(), size, at
            seconds = max(time.monotonic() - began, 1e-9)
            rate = (size - text) / MB / seconds
            shown = f"{state.documents:,} documents, {size / MB:,.0f} MB, {rate:.1f} MB/s"
            if total:
                shown = f"{min(at / total, 1):.0%}, {shown}"
            if total and at > place:
                left = max(total - at, 0) / (at - place) * seconds
                shown += f", {timedelta(seconds=round(left))} left"
            progress.update(task, completed=at, shown=shown)

        yield show
