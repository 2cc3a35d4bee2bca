"""One RWKV-7 layer, forward and backward: `python benchmarks/layer.py`, with `--profile` the kernels one by one.

The second layer of a random model, since the first has no value residual. Three cases: the base frozen with LoRA, the
base frozen alone (only the gradients of its inputs are made), and all weights trained. On a GPU the time is split by
what the kernels do: matrix products, the recurrence, everything else, and gaps in which the GPU waits.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from measure import Call, arguments, describe, kernels, milliseconds, peak_mib, print_table, synchronise, write_json
from random_model import SIZES, random_model
from rwkv_peft.adapters import attach_adapter
from rwkv_peft.config import AdapterConfig
from rwkv_peft.doctor.selftest import random_inputs
from rwkv_peft.models import ModelState, Rwkv
from rwkv_peft.models.base import Shared
from rwkv_peft.models.layers import Documents
from rwkv_peft.ops import choose_backend

SHAPES = {"cuda": "8,4096,2048", "cpu": "1,128,128"}
CASES = {"LoRA": "base frozen, LoRA", "frozen": "base frozen, alone", "full": "all weights trained"}
MATMUL = ("gemm", "gemv", "cutlass", "nvjet", "cublas", "xmma", "splitk")
GENERAL = ("at::", "memcpy", "memset")  # kernels that any part may use
COLUMNS = ["case", "ms", "matmul", "wkv", "else", "gaps", "by matmul", "MiB"]


def layer_call(case: str, B: int, T: int, D: int, rank: int, op: str, device: torch.device) -> Call:
    """Forward and backward of the layer, once."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = replace(SIZES["1.5B"][1], layers=2, width=D, ffn=4 * D, vocab_size=256)
    model: Rwkv = random_model("x070", sizes, dtype, device, op).train()
    for p in model.parameters():
        p.requires_grad_(case == "full")
    if case == "LoRA":
        attach_adapter(model, AdapterConfig(peft="lora", rank=rank))
    x, embedded, v_first = (torch.randn(B, T, D, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    dy, layer = torch.randn_like(x), model.layers()[1]
    documents = Documents(torch.ones(B, T, dtype=torch.long, device=device), None)
    state = ModelState.zeros(model, B)
    trained = [p for p in layer.parameters() if p.requires_grad]

    def call() -> tuple[Tensor, ...]:
        y, *_ = layer(x, Shared(embedded, v_first), state.wkv[1], state.shift[1], documents, model.op)
        return torch.autograd.grad(y, [x, v_first, *trained], dy)

    return call


def recurrence_kernels(B: int, T: int, D: int, op: str, device: torch.device) -> set[str]:
    """Names of the kernels that the operator alone runs."""
    N = 64
    inputs = [x.bfloat16().requires_grad_() for x in random_inputs(7, B, T, D // N, N, device)]
    wkv, dy = choose_backend(op, device, N).wkv7, torch.randn_like(inputs[0])
    found = kernels(lambda: torch.autograd.grad(wkv(*inputs)[0], inputs, dy), repeats=1)
    return {name for name in found if not any(word in name.lower() for word in (*GENERAL, *MATMUL))}


def kind_of(kernel: str, recurrence: set[str]) -> str:
    """What a kernel is for."""
    is_matmul = any(word in kernel.lower() for word in MATMUL)
    return "wkv" if kernel in recurrence else "matmul" if is_matmul else "else"


def measure(case: str, args: Any) -> dict[str, Any]:
    """A row of the table; with `--profile`, the kernels are printed."""
    device = torch.device(args.device)
    B, T, D = map(int, (args.shape or SHAPES[device.type]).split(","))
    call = layer_call(case, B, T, D, args.rank, args.op, device)
    row: dict[str, Any] = {"case": CASES[case], "ms": milliseconds(call, device, args.repeats)}
    row["MiB"] = peak_mib(call, device)
    if device.type != "cuda":
        return row
    found, recurrence = kernels(call, args.repeats), recurrence_kernels(B, T, D, args.op, device)
    for kind in ("matmul", "wkv", "else"):
        row[kind] = sum(time for name, time in found.items() if kind_of(name, recurrence) == kind) / 1e3
    row["gaps"] = max(0.0, row["ms"] - sum(found.values()) / 1e3)
    row["by matmul"] = row["ms"] / row["matmul"]
    row["kernels"] = dict(found.most_common())
    if args.profile:
        print(f"\n{CASES[case]}: the {args.top} longest kernels, in milliseconds")
        for name, time in found.most_common(args.top):
            print(f"{time / 1e3:8.3f}  {kind_of(name, recurrence):6}  {name[:100]}")
    return row


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", metavar="B,T,D")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--op", default="auto")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="print the longest kernels")
    parser.add_argument("--top", type=int, default=20, help="how many of them")
    args = parser.parse_args()
    device, rows = torch.device(args.device), []
    for case in args.cases:
        rows.append(measure(case, args))
        gc.collect()
        synchronise(device)
    shape = args.shape or SHAPES[device.type]
    print(f"\nOne RWKV-7 layer, (B,T,D) = ({shape}), LoRA of rank {args.rank}, --op {args.op}; {describe(device)}")
    print_table(rows, [c for c in COLUMNS if any(row.get(c) is not None for row in rows)])
    write_json(args.json, device, rows)


if __name__ == "__main__":
    main()
