"""Quantised matrices: how long their dense weights and their products take, beside bf16: `benchmarks/quant.py`.

A row is a matrix (outputs, inputs) and a number of tokens. Times are in ms: `dense` makes the weight, `forward` is
x Wᵀ, `backward` is dy W, each with what it takes to read the format. `error` is the forward product's, relative to that
of the dense bf16 weight; `bits` are those of a weight as stored. Where bitsandbytes is installed, `theirs` is what it
takes to make the dense weight, and `differ` the share of its indices that are not ours, in percent.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch

from measure import arguments, describe, milliseconds, print_table, write_json
from rwkv_peft.ops.matrix import Dense, Matrix
from rwkv_peft.ops.quant import QUANTS, QuantizedLinear, quantize

SHAPES = [(768, 768), (2048, 2048), (8192, 2048), (2048, 8192), (2560, 2560), (10240, 2560), (2560, 10240)]
COLUMNS = [
    "shape", "tokens", "quant", "bits", "dense", "theirs", "differ", "forward", "backward", "times bf16", "error",
]  # fmt: skip


def measure(weight: torch.Tensor, tokens: int, quant: str, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    device = weight.device
    x, dy = (torch.randn(tokens, n, device=device, dtype=weight.dtype) for n in reversed(weight.shape))
    plain = Dense(weight)
    matrix: Matrix = plain if quant == "none" else quantize(weight, quant, weight.dtype)
    row = {"shape": "×".join(map(str, weight.shape)), "tokens": tokens, "quant": quant, "bits": 16.0}
    if isinstance(matrix, QuantizedLinear):
        row["bits"] = 8 * matrix.bytes_of(*weight.shape) / weight.numel()
        row["dense"] = milliseconds(matrix.dense, device, repeats)
        row |= of_bitsandbytes(weight, matrix, repeats)
    row["forward"] = milliseconds(lambda: matrix.times(x), device, repeats)
    row["backward"] = milliseconds(lambda: matrix.back(dy), device, repeats)
    own, other = matrix.times(x).float(), plain.times(x).float()
    return row | {"error": float((own - other).norm() / other.norm())}


def of_bitsandbytes(weight: torch.Tensor, ours: QuantizedLinear, repeats: int) -> dict[str, float]:
    """The same by that package, where it is and has the format."""
    if find_spec("bitsandbytes") is None or ours.quant == "fp8":
        return {}
    functional = import_module("bitsandbytes.functional")
    if ours.quant == "int8":
        index, state = functional.quantize_blockwise(weight, blocksize=256)
        call = partial(functional.dequantize_blockwise, index, state)
    else:
        index, state = functional.quantize_4bit(weight, quant_type=ours.quant, compress_statistics=True)
        call = partial(functional.dequantize_4bit, index, state)
    differ = float((index.view(-1) != ours.weight.view(-1)).float().mean())
    return {"theirs": milliseconds(call, weight.device, repeats), "differ": 100 * differ}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", help="outputs,inputs")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 16384])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    device = torch.device(args.device)
    shapes = [tuple(map(int, s.split(","))) for s in args.shapes] if args.shapes else SHAPES
    rows: list[dict[str, Any]] = []
    for shape, tokens in product(shapes, args.tokens):
        weight = (torch.randn(shape, device=device) / shape[1] ** 0.5).bfloat16()
        for quant in ("none", *QUANTS):
            rows.append(measure(weight, tokens, quant, args.repeats))
            plain = next(row for row in reversed(rows) if row["quant"] == "none")
            rows[-1]["times bf16"] = sum(rows[-1][k] for k in ("forward", "backward")) / sum(
                plain[k] for k in ("forward", "backward")
            )
            print(rows[-1], flush=True)
    print(f"Products; {describe(device)}")
    print_table(rows, COLUMNS)
    write_json(args.json, device, rows)


if __name__ == "__main__":
    main()
