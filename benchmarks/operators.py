"""The recurrence of a version on every backend: `python benchmarks/operators.py --version 7 --shapes 8,4096,32`.

For each shape (B,T,H) and backend: milliseconds forward (which keeps what the backward pass needs) and forward with
backward, launched one by one and as a CUDA graph, and one by one without autograd's own thread, as training does; MiB
allocated at most beyond the inputs; and the largest relative L2 error of y and of the gradients, against the float64
recurrence on the same inputs. `nothing` is an autograd function that computes nothing. Inputs are random, spread as in
trained models; the head size is 64. Peers that are installed (`fla`) are backends like the others.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from measure import (
    arguments,
    describe,
    in_one_line,
    kernels,
    milliseconds,
    peak_mib,
    print_table,
    replay_milliseconds,
    write_json,
)
from rwkv_peft.doctor.selftest import INPUTS, random_inputs, relative_error, results, wkv_of
from rwkv_peft.ops import BACKENDS, reference

SHAPES = {
    "cuda": ["8,4096,32", "1,1024,12", "8,1024,32", "2,4096,64", "4,4096,40", "1,16384,40"],
    "cpu": ["1,512,4"],
}
NOTHING = "nothing"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = [
    "shape", "backend", "forward", "both", "one thread", "forward graph", "both graph", "MiB", "error", "of", "failed",
]  # fmt: skip


class Nothing(torch.autograd.Function):
    """Takes and gives what an operator does and computes nothing: what autograd itself costs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return torch.empty_like(inputs[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def measure(name: str, version: int, shape: str, N: int, dtype: torch.dtype, args: Any) -> dict[str, Any]:
    """A row of the table."""
    device = torch.device(args.device)
    B, T, H = map(int, shape.split(","))
    inputs = [x.to(dtype).requires_grad_() for x in random_inputs(version, B, T, H, N, device)]
    dy = torch.randn(B, T, H, N, device=device, dtype=dtype)
    wkv = None if name == NOTHING else wkv_of(name, version)

    def forward() -> Tensor:
        return Nothing.apply(*inputs) if wkv is None else wkv(*inputs)[0]

    def both() -> tuple[Tensor, ...]:
        y = forward()
        return y, *torch.autograd.grad(y, inputs, dy)

    row: dict[str, Any] = {"version": version, "shape": shape, "backend": name, "dtype": args.dtype}
    try:
        row["forward"] = milliseconds(forward, device, args.repeats)
        row["both"] = milliseconds(both, device, args.repeats)
        with torch.autograd.set_multithreading_enabled(False):
            row["one thread"] = milliseconds(both, device, args.repeats)
        row["MiB"] = peak_mib(both, device)
        if args.graph:
            row["forward graph"] = replay_milliseconds(forward, device, args.repeats)
            row["both graph"] = replay_milliseconds(both, device, args.repeats)
        if args.kernels:
            row["kernels"] = dict(kernels(both, args.repeats).most_common())
            print(f"\n{name} {shape}, microseconds of each kernel")
            for kernel, time in row["kernels"].items():
                print(f"{time:8.1f}  {kernel[:100]}")
        if wkv is not None and args.error_tokens >= T:
            row["errors"] = errors(name, version, inputs, dy)
            row["of"] = max(row["errors"], key=row["errors"].get)
            row["error"] = row["errors"][row["of"]]
    except Exception as error:  # of memory, a compiler, a library
        row["failed"] = in_one_line(error)
    return row


def errors(name: str, version: int, inputs: list[Tensor], dy: Tensor) -> dict[str, float]:
    """The relative error of y and of each gradient, on the first head of the first row.

    Rows share u, and RWKV-5's w, so that there all rows are compared.
    """
    rows = slice(None) if version < 7 else slice(1)

    def part(x: Tensor) -> Tensor:
        return x.detach()[:1] if x.ndim == 2 else x.detach()[rows, :, :1]

    exact = [part(x).double() for x in inputs]
    want = results(getattr(reference, f"wkv{version}"), exact, None, [part(dy).double()])
    got = results(wkv_of(name, version), inputs, None, [dy])
    names = ("y", *INPUTS[version])
    pairs = zip((got[0], *got[2:]), (want[0], *want[2:]), strict=True)
    return {n: relative_error(part(x), y) for n, (x, y) in zip(names, pairs, strict=True)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--version", type=int, choices=[5, 6, 7], default=7)
    parser.add_argument("--shapes", nargs="+", metavar="B,T,H")
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), help="[all that run here but reference]")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--graph", action="store_true", help="measure CUDA graphs too")
    parser.add_argument("--kernels", action="store_true", help="print how long each kernel takes")
    parser.add_argument("--error-tokens", type=int, default=4096, help="longest T whose error is measured")
    args = parser.parse_args()
    device, N = torch.device(args.device), args.head_size
    args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    usual = [n for n, b in BACKENDS.items() if n != "reference" and b.supports(device, N) is None]
    rows = []
    print(f"RWKV-{args.version} operator, head size {N}, {args.dtype}, milliseconds; {describe(device)}", flush=True)
    for shape in args.shapes or SHAPES[device.type]:
        for name in [NOTHING, *(args.backends or usual)]:
            rows.append(measure(name, args.version, shape, N, DTYPES[args.dtype], args))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print_table(rows, [c for c in COLUMNS if any(row.get(c) is not None for row in rows)])
    write_json(args.json, device, rows)


if __name__ == "__main__":
    main()
