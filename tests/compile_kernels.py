"""Compile the Triton kernels that a model's training launches for an H100, which needs no GPU: `… x060 bf16`.

Layers run on the CPU with kernels that are compiled but not launched: what they leave in memory means nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import rwkv_peft as rp
from conftest import random_model, random_tokens
from rwkv_peft.models.layers import Documents
from rwkv_peft.ops import BACKENDS
from rwkv_peft.ops.adam import SMALL, Rates, averages_of, quantisers
from rwkv_peft.ops.quant import quantize
from rwkv_peft.ops.triton import activations, rows_of, rows_to_fp8, turned
from rwkv_peft.ops.triton.adam import Table
from rwkv_peft.ops.triton.loss import cross_entropy


class Hopper:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def main(version: str, precision: str) -> None:
    compiled: set[str] = set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.add(self.fn.__name__)
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    driver.set_active(Hopper())
    activations.INTERPRETED = True  # so that tensors of the CPU fit
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.pth")
        torch.save(random_model(version, layers=3, width=256, head_size=64), path)
        model = rp.load_model(path, precision, "cpu", op="torch")
    model.op = BACKENDS["triton"]
    rp.attach_adapter(model, rp.AdapterConfig(rank=8), ("time", "ln", "state"))
    documents = Documents(random_tokens(257, 1, 300), torch.tensor([0, 70, 70, 300]))
    model.hidden_of(documents).sum().backward()
    with torch.no_grad():  # layers in turn, their states handed on
        model(random_tokens(257, 2, 40))
    logits = torch.randn(8, 257, dtype=model.like.dtype)
    cross_entropy(logits, torch.arange(8), 1e-4, torch.empty(8, 2), logits)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    take_steps(dtype)
    unpack(dtype)
    print(*sorted(compiled))


def take_steps(dtype: torch.dtype) -> None:
    """Of AdamW, with averages of each number of bits; of numbers that are read 16 bytes at a time, and of others."""
    maps, skip = quantisers(torch.device("cpu")), torch.zeros(())
    for bits in (32, 8):
        for size in (SMALL, SMALL + 1):
            p = torch.zeros(size, dtype=dtype)
            p.grad = torch.zeros_like(p)
            table = Table([p], [averages_of(p, bits, paged=False)], [0])
            table.step(Rates.of(0.1, 0.1, (0.9, 0.99), 1e-8, 1, 0), maps, skip)


def unpack(dtype: torch.dtype) -> None:
    """Of quantised matrices, and of an embedding on the CPU."""
    weight = torch.randn(64, 256, dtype=dtype)
    for quant in ("int8", "nf4"):
        layer = quantize(weight, quant, dtype)
        layer.fill_by_kernel(torch.empty_like(weight), 0)
    for factors in (None, torch.ones(256)):
        rows_to_fp8(weight, factors)
    turned(weight.to(torch.float8_e4m3fn))
    rows_of(weight, torch.tensor([1, 2]))


if __name__ == "__main__":
    main(*sys.argv[1:])
