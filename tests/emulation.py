"""Kernels in CUDA C++ on the CPU: their own source, compiled by g++ against `cuda_emulation.h`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_peft.ops.cuda.build import SOURCES

ORDERS = range(4)  # of threads and warps, for the variable EMULATION_ORDER
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def compiled(name: str, folder: Path) -> ctypes.CDLL:
    """Both directions of `chunked6` or `chunked7`."""
    target, header = folder / f"{name}.so", Path(__file__).with_name("cuda_emulation.h")
    command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", f'-DCUDA_EMULATION="{header}"', "-x", "c++"]
    sources = [str(SOURCES / f"{name}_{direction}.cu") for direction in ("forward", "backward")]
    subprocess.run([*command, *sources, "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def emulate(module: ModuleType, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module run its kernels on the CPU, what it allocates poisoned."""

    def run(name: str, call: ctypes.Structure, kernels: int, device: torch.device) -> None:
        assert getattr(library, name)(ctypes.byref(call), kernels, None) == 0

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **settings: allocate(*args, **settings).fill_(float("nan"))

    made: dict[Any, str] = {torch.Tensor: "new_empty", torch: "empty_like"}
    monkeypatch.setattr(module, "run", run)
    for owner, name in made.items():
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
