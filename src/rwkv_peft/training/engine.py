"""Processes: the only file that knows how many there are. For now there is one."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

STACK_LIMIT, STACK = 0, 256  # bytes for each of a GPU's threads: 1024, the default, are 264 MiB on an H100
Number = TypeVar("Number", int, float)


def lean_memory(device: torch.device) -> None:
    """Let torch's memory of a GPU grow and shrink by pages, so that it does not end up in pieces; and others take less.

    To be called before anything is on the GPU; what the user has set stays.
    """
    if device.type != "cuda":
        return
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # 8 MiB, where cuBLAS takes 32 on a Hopper card
    driver = {"linux": "libcuda.so.1", "win32": "nvcuda.dll"}.get(sys.platform, "")
    with torch.cuda.device(device), suppress(OSError):  # where the driver has another name, the stacks stay as they are
        torch.cuda.mem_get_info()  # makes CUDA's context, whose limits are meant
        ctypes.CDLL(driver).cuCtxSetLimit(STACK_LIMIT, ctypes.c_size_t(STACK))


class SingleProcess:
    """One process, one device."""

    rank = 0
    world_size = 1

    def sum(self, value: Number) -> Number:
        """The sum of every process's value."""
        return value

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradient; one call for each micro-batch."""
        with torch.autograd.set_multithreading_enabled(False):  # with one device, another thread only has to be woken
            loss.backward()  # type: ignore[no-untyped-call]

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` (0: leave them), and return the norm they had."""
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for p in parameters:
            if p.grad is not None:
                kinds.setdefault(p.grad.dtype, []).append(p.grad)
        norms = [
            norm for dtype, gradients in kinds.items()
            for norm in torch._foreach_norm(gradients, dtype=torch.promote_types(dtype, torch.float32))
        ]  # fmt: skip
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        if max_norm > 0:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for dtype, gradients in kinds.items():
                torch._foreach_mul_(gradients, scale.to(dtype))
        return norm

    def step(self, optimizer: torch.optim.Optimizer, keep_gradients: bool = False) -> None:
        """Change the parameters, and drop the gradients; or make them 0 where they are."""
        optimizer.step()
        optimizer.zero_grad(set_to_none=not keep_gradients)
