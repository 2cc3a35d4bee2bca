"""What this machine has: one line each, also where something cannot be told."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __version__
from ..ops.cuda.build import find_nvcc
from ..ops.quant.fp8 import has_fp8

Line = tuple[str, str]
"""A label, and the text beside it."""

GIB = 2**30
NOT_INSTALLED = "not installed"
PACKAGES = {"triton": "triton", "fla": "flash-linear-attention", "peft": "peft"}


def describe(device: torch.device) -> Iterator[Line]:
    """The programs, the GPUs, the processor, memory and disk."""
    yield "rwkv-peft", __version__
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "Python", platform.python_version()
    yield "torch", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
    for name, package in PACKAGES.items():
        yield name, installed(package)
    yield "nvcc", nvcc()
    yield "driver", driver() or NOT_INSTALLED
    yield from gpus(device)
    yield "CPU", f"{processor()}, {os.cpu_count()} threads, of which torch uses {torch.get_num_threads()}"
    yield "memory", memory()
    yield "disk", f"{shutil.disk_usage(Path.cwd()).free / GIB:,.0f} GiB free in {Path.cwd()}"


def installed(package: str) -> str:
    """The version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED


def gpus(device: torch.device) -> Iterator[Line]:
    """Each GPU that torch sees, or why it may see none."""
    if not torch.cuda.is_available():
        reason = ""
        if driver():
            wrong = "this torch is made without CUDA" if torch.version.cuda is None else "the driver may be too old"
            reason = f", though there is a driver: {wrong}; https://pytorch.org has the torch for it"
        yield "GPU", f"none that torch sees{reason}"
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        text = f"{card.name}, {card.total_memory / GIB:.1f} GiB, compute capability {card.major}.{card.minor}"
        if device.type == "cuda" and index == (device.index or 0):
            text += f", {torch.cuda.mem_get_info(device)[0] / GIB:.1f} GiB free"
            text += ", products in fp8" if has_fp8(device) else ""
        yield f"GPU {index}", text


def driver() -> str:
    """The version of NVIDIA's driver; empty where there is none."""
    return output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def nvcc() -> str:
    """The version of CUDA's compiler, which the backend `cuda` needs."""
    place = find_nvcc()
    found = re.search(r"release ([\d.]+)", output(place, "--version")) if place else None
    return f"{found[1]} ({place})" if found else NOT_INSTALLED


def output(*command: str) -> str:
    """What a program prints; empty if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def processor() -> str:
    """The name of the processor."""
    found = re.search(r"^model name\s*:\s*(.+)$", read("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def memory() -> str:
    """Main memory; in a container, what it may use."""
    kib = {name: int(amount) for name, amount in re.findall(r"^(\w+):\s+(\d+) kB", read("/proc/meminfo"), re.MULTILINE)}
    if "MemTotal" not in kib:
        return "not known on this system"
    text = f"{kib['MemTotal'] / 2**20:,.0f} GiB, {kib.get('MemAvailable', 0) / 2**20:,.0f} GiB free"
    limit = read("/sys/fs/cgroup/memory.max").strip()
    return f"{text}, {int(limit) / GIB:,.0f} GiB for this container" if limit.isdigit() else text


def read(path: str) -> str:
    """The text of a system file; empty where it is not there."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
