"""What a machine has, which operators run on it, whether they compute the right numbers, and how fast it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from rich.console import Console
from rich.text import Text

from ..config import DoctorConfig
from ..loading import find_device
from ..ops import BACKENDS, choose_backend
from .machine import Line, describe
from .selftest import HEAD_SIZE, VERSIONS, Check, check_backends
from .speed import speeds

STYLES = {"OK": "green", "FAILED": "bold red"}


def run_doctor(config: DoctorConfig, console: Console | None = None) -> bool:
    """Print a report, and return whether every backend that runs here computes the right numbers.

    Raises ConfigError if the device is not there.
    """
    config.check()
    device = find_device(config.device)
    console = console or Console()
    show(console, "Machine", describe(device))
    show(console, f"Operators on {name_of(device)}, head size {HEAD_SIZE}", backends(device))
    with console.status("") as status:
        checks = list(check_backends(device, lambda what: status.update(f"testing {what}")))
    show(console, "Self-test against float64: relative error of outputs and gradients", verdicts(checks))
    if config.seconds > 0:
        auto = choose_backend("auto", device, HEAD_SIZE).name
        right = [v for v in VERSIONS if all(c.passed for c in checks if (c.backend, c.version) == (auto, v))]
        with console.status("measuring"):
            lines = list(speeds(device, right, config.seconds))
        show(console, "Speed", lines)
    return all(check.passed for check in checks)


def show(console: Console, title: str, lines: Iterable[Line]) -> None:
    """Print a section; OK and FAILED in colour where there is one."""
    console.print(Text(title, style="bold"), soft_wrap=True)
    lines = list(lines)
    width = max((len(label) for label, _ in lines), default=0)
    for label, text in lines:
        line = Text(f"  {label:{width}}  {text}")
        for word, style in STYLES.items():
            line.highlight_words([word], style=style)
        console.print(line, soft_wrap=True)
    console.print()


def name_of(device: torch.device) -> str:
    """For people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def backends(device: torch.device) -> Iterator[Line]:
    """What `auto` takes, and for every backend whether it runs, or why not."""
    auto = choose_backend("auto", device, HEAD_SIZE).name
    for version in VERSIONS:
        yield f"RWKV-{version}", f"uses {auto}, the fastest that runs here"
    for name, backend in BACKENDS.items():
        reason = backend.supports(device, HEAD_SIZE)
        yield name, "runs" if reason is None else f"cannot run: {reason}"


def verdicts(checks: list[Check]) -> Iterator[Line]:
    """One line for each backend and version; of one that failed, what to choose in its place."""
    names = dict.fromkeys((check.backend, check.version) for check in checks)
    failed = {(check.backend, check.version) for check in checks if not check.passed}
    for backend, version in names:
        found = [check for check in checks if (check.backend, check.version) == (backend, version)]
        text = "   ".join(check.verdict() for check in found)
        if (backend, version) in failed:
            others = [other for other, v in names if v == version and (other, v) not in failed]
            text += f"; choose --op {others[0]}" if others else "; no operator here is right: please report it"
        yield f"{backend} RWKV-{version}", text
