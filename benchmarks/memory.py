"""What a GPU must have: the tables of the original's README, measured here: `python benchmarks/memory.py`.

Each cell is a run of a few steps at ctx 1024, one row, with checkpoints of whole layers, LoRA and PiSSA of rank 64 and
bone of 32, 8-bit AdamW, adapters in bf16, the embedding in the CPU's memory; `--plain` has AdamW's averages and the
adapters in float32. A cell is the GiB that the process takes of the card, beside the original's GB on an RTX 4090; in
brackets torch's largest allocation. With `--quant-head` the head is quantised too where the matrices are.
"""

from __future__ import annotations

import gc
from itertools import product
from typing import Any

import torch

from measure import GIB, arguments, describe, in_one_line, print_table, synchronise, write_json
from plan import STEPS, Case
from random_model import SIZES, random_model
from rwkv_peft.adapters import attach
from rwkv_peft.models import Rwkv
from rwkv_peft.training.engine import lean_memory
from rwkv_peft.training.model import prepare
from step import random_batches, run_steps

METHODS = ("state", "lora", "bone", "pissa")
# GB of the original, by format and size, in the order of METHODS; a 3B of the original is the 2.9B here
ORIGINAL = {
    "none": {"0.1B": (2.6, 2.7, 2.7, 2.6), "0.4B": (3.1, 3.4, 3.1, 3.4), "1.5B": (5.3, 5.6, 5.6, 5.6),
             "2.9B": (8.2, 8.8, 8.8, 8.8)},
    "int8": {"0.1B": (2.4, 2.5, 2.5, 2.5), "0.4B": (2.9, 2.9, 2.9, 3.0), "1.5B": (4.1, 4.6, 4.5, 4.6),
             "2.9B": (5.7, 6.7, 6.7, 6.7)},
    "nf4": {"0.1B": (2.5, 2.4, 2.4, 2.4), "0.4B": (2.8, 2.7, 2.7, 2.7), "1.5B": (3.7, 3.9, 3.9, 3.9),
            "2.9B": (4.7, 5.7, 5.7, 5.7)},
}  # fmt: skip
LEAN = {"optim": "adamw8bit", "master_weights": "bf16"}


def measure(size: str, method: str, quant: str, args: Any) -> dict[str, Any]:
    """GiB of a run."""
    more = {"quant": quant, "quant_head": args.quant_head and quant != "none", **({} if args.plain else LEAN)}
    case = Case(size, method, checkpoint="block", more=more)
    config, device = case.config("bf16"), torch.device(args.device)
    version, sizes = SIZES[size]
    row: dict[str, Any] = {"size": size, "method": method, "quant": quant}
    try:
        model = random_model(version, sizes, torch.bfloat16, device, "auto", quant, config.quant_head, "cpu")
        prepare(model, config)
        torch.cuda.reset_peak_memory_stats(device)
        run_steps(model, config, random_batches(sizes.vocab_size, case.ctx, case.rows, False), STEPS)
        synchronise(device)
    except (RuntimeError, MemoryError) as error:
        return row | {"failed": in_one_line(error)}
    free, total = torch.cuda.mem_get_info(device)
    return row | {"peak": torch.cuda.max_memory_allocated(device) / GIB, "process": (total - free) / GIB}


def rounded(model: Rwkv, name: str) -> Any:
    """The weight that PiSSA starts from: of random weights there is no file, so the rounded one."""
    return model.get_submodule(name).base.dense  # type: ignore[union-attr]


def table(rows: list[dict[str, Any]], quant: str) -> list[dict[str, Any]]:
    """Sizes down, methods across."""
    found = {(row["size"], row["method"]): row for row in rows if row["quant"] == quant}
    lines = []
    for size in dict.fromkeys(row["size"] for row in rows):
        line = {"model": size}
        for i, method in enumerate(METHODS):
            row = found.get((size, method))
            if row is not None:
                theirs = ORIGINAL.get(quant, {}).get(size, (None,) * len(METHODS))[i]
                ours = row.get("failed") or f"{row['process']:.2f} ({row['peak']:.2f})"
                line[method] = ours if theirs is None else f"{ours} / {theirs}"
        lines.append(line)
    return lines


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(ORIGINAL["none"]), choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--quants", nargs="+", default=list(ORIGINAL))
    parser.add_argument("--quant-head", action="store_true")
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    device, rows = torch.device(args.device), []
    if device.type != "cuda":
        parser.error("needs a GPU")
    lean_memory(device)
    attach.original_weight = rounded  # type: ignore[assignment]
    for size, method, quant in product(args.sizes, args.methods, args.quants):
        rows.append(measure(size, method, quant, args))
        print(rows[-1], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    print(f"GiB of the process (of torch at most) / the original's GB; {describe(device)}")
    for quant in args.quants:
        print(f"\n{quant}")
        print_table(table(rows, quant), ["model", *METHODS])
    write_json(args.json, device, rows)


if __name__ == "__main__":
    main()
