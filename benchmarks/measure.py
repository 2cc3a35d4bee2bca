"""Times, memory and tables that the benchmarks share."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

MIB, GIB = 2**20, 2**30
WARM_UP = 0.25  # seconds
Row = Mapping[str, Any]
Call = Callable[[], object]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A command line with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    return parser


def describe(device: torch.device) -> dict[str, str]:
    """The machine that figures come from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%F"),
    }


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Call, device: torch.device, repeats: int) -> float:
    """The median of at least `repeats` calls, after two; of short ones a quarter of a second of each.

    On a GPU from the end of one to the end of the next, so a call that waits for the CPU counts too.
    """
    began, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - began < WARM_UP:
        call()
        synchronise(device)
        calls += 1
    repeats = max(repeats, calls)
    if device.type != "cuda":
        return 1e3 * statistics.median(seconds(call) for _ in range(repeats))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    synchronise(device)
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events))


def seconds(call: Call) -> float:
    """Of one call on the CPU."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def replay_milliseconds(call: Call, device: torch.device, repeats: int) -> float | None:
    """As `milliseconds`, of a CUDA graph of the call: what it costs without launches. None where it makes no graph."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            held = call()  # what a graph writes must not be freed while it lives
    except RuntimeError:  # it waits for the GPU, or reads from the CPU
        synchronise(device)
        return None
    took = milliseconds(graph.replay, device, repeats)
    del held, graph
    return took


def kernels(call: Call, repeats: int) -> Counter[str]:
    """Microseconds of each kernel in one call; on a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name] += event.time_range.elapsed_us() / repeats
    return found


def peak_mib(call: Call, device: torch.device) -> float | None:
    """What a call allocates at most beyond what is there, its results counted. None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    synchronise(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronise(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def in_one_line(error: Exception) -> str:
    """For a table."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def text_of(value: object) -> str:
    """A cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """The rows side by side, as a Markdown table."""
    cells = [list(columns), *([text_of(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    print(lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:], sep="\n", flush=True)


def write_json(file: Path | None, device: torch.device, rows: Sequence[Row]) -> None:
    """All that was measured, where a file was named."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"machine": describe(device), "rows": rows}, indent=1), encoding="utf-8")
