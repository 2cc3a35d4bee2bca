"""How fast `rwkv-peft prepare` is, and how much memory it takes: `python benchmarks/prepare.py [--size 1000]`.

It makes JSONL of {"text"} with documents of 1 to 4 KB, pieces of the text in this repository, and prepares it with one
process and with one a core. A core-second is one of processor time, of all processes together: on a machine with other
work, only MB per core-second tells how fast the program is. Memory is the largest sum of what all processes hold. It
needs psutil.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import random
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from rwkv_peft.config import PrepareConfig
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.preparation import prepare

ROOT = Path(__file__).parent.parent
MB = 1e6


@dataclass
class Run:
    """One run of `prepare`."""

    seconds: float
    core_seconds: float
    memory: int
    """Bytes."""


def make_data(path: Path, megabytes: int) -> int:
    """Write documents of about that much text together; returns the bytes of text."""
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.py")]
    text = "\n".join(source.read_text("utf-8") for source in sorted(sources))
    chance, size = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * MB:
            start, length = chance.randrange(len(text) - 4000), chance.randint(1000, 4000)
            document = text[start : start + length]
            size += len(document.encode())
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
    return size


def prepare_quietly(data: Path, out: Path, jobs: int) -> None:
    prepare(PrepareConfig(data=[str(data)], out=out, jobs=jobs, overwrite=True), Console(file=io.StringIO()))


def watch(data: Path, out: Path, jobs: int) -> Run:
    """Run `prepare` in a process of its own, and look at it and its children now and then."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = multiprocessing.get_context("spawn").Process(target=prepare_quietly, args=(data, out, jobs))
    process.start()
    top, memory = psutil.Process(process.pid), 0
    while process.is_alive():
        memory = max(memory, sum(map(memory_of, [top, *top.children(recursive=True)])))
        process.join(0.05)
    seconds = time.perf_counter() - began
    if process.exitcode:
        raise SystemExit(f"prepare ended with code {process.exitcode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    core_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, core_seconds, memory)


def memory_of(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Time `rwkv-peft prepare`.")
    parser.add_argument("--size", type=int, nargs="+", default=[50, 200], help="of the text, in MB")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, psutil.cpu_count() or 1])
    args = parser.parse_args()
    print(f"tokenizer: {Tokenizer.world().engine}; {psutil.cpu_count()} cores, load {psutil.getloadavg()[0]:.1f}")
    print("| text | jobs | MB/s | MB per core-second | peak memory |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in args.size:
            data, out = Path(folder, "data.jsonl"), Path(folder, "out")
            size = make_data(data, megabytes)
            for jobs in args.jobs:
                run = watch(data, out, jobs)
                print(
                    f"| {size / MB:,.0f} MB | {jobs} | {size / MB / run.seconds:.1f} | "
                    f"{size / MB / run.core_seconds:.1f} | {run.memory / MB:,.0f} MB |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
