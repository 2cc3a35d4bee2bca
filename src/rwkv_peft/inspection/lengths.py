"""How the lengths of examples are spread: as lines of text, and as a picture. n examples, b bins."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..files import write_atomic

Integers = npt.NDArray[np.int64]

MOST_BINS = 16
WIDTH = 40  # letters of the longest bar
FULL, PLAIN = "█", "#"
# Where bins of the logarithmic scale begin within a power of ten, from fine to coarse
SERIES = ((1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
NARROW = 4  # up to this ratio of the longest to the shortest, bins are all as wide


def statistics(lengths: Integers) -> str:
    """The least, the usual and the largest of lengths (n,)."""
    middle, many, most = np.percentile(lengths, (50, 90, 99))
    return (
        f"min {lengths.min():,}, median {middle:,.0f}, mean {lengths.mean():,.1f}, p90 {many:,.0f}, p99 {most:,.0f}, "
        f"max {lengths.max():,}"
    )


def bins_of(least: int, largest: int) -> Integers:
    """(b+1,) where each of at most 16 bins begins, and where the last one ends, in round numbers.

    They grow with the length, but where all lengths are nearly the same. The first holds `least`, the last `largest`.
    """
    if is_narrow(least, largest):
        steps = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
        step = next(step for step in steps if largest // step - least // step < MOST_BINS)
        return np.arange(least // step * step, (largest // step + 2) * step, step)
    powers = range(int(math.log10(largest)) + 2)
    for series in SERIES:
        places = sorted({math.ceil(begin * 10**power) for power in powers for begin in series})
        first = max(i for i, place in enumerate(places) if place <= least)
        last = min(i for i, place in enumerate(places) if place > largest)
        if last - first <= MOST_BINS:
            break
    return np.array(places[first : last + 1])


def is_narrow(least: int, largest: int) -> bool:
    """Whether all lengths are so near each other, or so short, that their bins are all as wide."""
    return largest < NARROW * least or largest < MOST_BINS


def histogram(lengths: Integers, plain: bool) -> Iterator[str]:
    """Lines with the number of `lengths` (n,) in each bin; `plain` is without letters that a terminal may lack."""
    edges = bins_of(int(lengths.min()), int(lengths.max()))
    counts, _ = np.histogram(lengths, edges)
    names = [_name(int(begin), int(end) - 1, "-" if plain else "–") for begin, end in pairwise(edges)]
    wide, digits = max(map(len, names)), len(f"{counts.max():,}")
    for name, count in zip(names, counts.tolist(), strict=True):
        bar = (PLAIN if plain else FULL) * max(round(WIDTH * count / int(counts.max())), int(count > 0))
        yield f"{name:>{wide}}  {count:>{digits},}  {bar}".rstrip()


def _name(begin: int, last: int, dash: str) -> str:
    return f"{begin:,}" if begin == last else f"{begin:,}{dash}{last:,}"


def draw(path: Path, lengths: Integers, ctx_len: int) -> None:
    """Draw the same into a PNG file, with a line where --ctx-len is. Raises OutputError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    edges = bins_of(int(lengths.min()), int(lengths.max()))
    counts, _ = np.histogram(lengths, edges)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="examples", title="Lengths of the examples")
    axes.stairs(counts, edges, fill=True, color="#b8c4d6", edgecolor="#1f4e9c")
    axes.set_xscale("linear" if is_narrow(int(lengths.min()), int(lengths.max())) else "log")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axvline(ctx_len, color="#c2410c", linewidth=2, label=f"--ctx-len {ctx_len:,}")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))
