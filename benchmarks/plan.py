"""The memory plan beside what torch allocates: `python benchmarks/plan.py`.

Each configuration is planned from its sizes alone, then made with random weights and trained for a few steps; `error`
is the plan's, in percent of the measured peak. On a CPU there are only predictions. With `--only TEXT`, those whose
name holds it. `outside GiB` is what the GPU has in use beyond what torch has reserved: the context that plans count.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from measure import GIB, arguments, describe, in_one_line, print_table, synchronise, write_json
from random_model import SIZES, random_model
from rwkv_peft.config import TrainConfig
from rwkv_peft.models import MODELS
from rwkv_peft.plan import Card, Outline, Plan, plan
from rwkv_peft.plan.cards import KNOWN
from rwkv_peft.training.engine import lean_memory
from rwkv_peft.training.model import prepare
from step import METHODS, random_batches, run_steps

COLUMNS = [
    "run", "trained", "frozen GiB", "learning GiB", "kept GiB", "at once GiB", "predicted GiB", "measured GiB",
    "error %", "process GiB", "measured process", "outside GiB", "failed",
]  # fmt: skip
STEPS = SimpleNamespace(warm_up=3, windows=1, steps=2)
PACKED_STEPS = SimpleNamespace(warm_up=14, windows=1, steps=2)  # so that every shape is met three times


@dataclass(frozen=True)
class Case:
    """A run to plan."""

    size: str
    method: str = "lora"
    ctx: int = 1024
    rows: int = 1
    checkpoint: str = "none"
    more: dict[str, Any] = field(default_factory=dict)
    """Other settings."""

    @property
    def name(self) -> str:
        more = "".join(f" {value}" if value is not True else f" {name}" for name, value in self.more.items())
        return f"{self.size} {self.method} {self.rows} × {self.ctx} {self.checkpoint}{more}"

    def config(self, precision: str) -> TrainConfig:
        settings = dict(METHODS[self.method], ctx_len=self.ctx, micro_batch=self.rows, precision=precision)
        settings |= {"grad_checkpoint": self.checkpoint, "sampling": "get", **self.more}
        return TrainConfig(Path("random"), ["random"], Path("unused"), **settings).resolved()


CASES = [
    Case("0.1B"), Case("0.1B", ctx=512, rows=8), Case("0.1B", ctx=4096, rows=8, checkpoint="block"),
    Case("0.1B", "full", ctx=512, rows=4), Case("0.1B", "full", rows=4, checkpoint="block"),
    Case("0.1B", "full", rows=4, more={"optim": "adamw8bit"}),
    Case("0.1B", "full", rows=4, more={"master_weights": "bf16"}),
    Case("0.4B", checkpoint="block"), Case("0.4B", "bone", rows=4), Case("0.4B", "bat", rows=4),
    Case("0.4B", "pissa", rows=4, checkpoint="selective"), Case("0.4B", "state", rows=8, checkpoint="selective"),
    Case("0.4B", "full", rows=2, checkpoint="block"),
    Case("1.5B"), Case("1.5B", rows=4, checkpoint="operator"), Case("1.5B", rows=4, checkpoint="selective"),
    Case("1.5B", ctx=8192, checkpoint="block"), Case("1.5B", "dora", rows=2), Case("1.5B", "bone", rows=8),
    Case("1.5B", more={"quant": "int8"}), Case("1.5B", more={"quant": "nf4"}), Case("1.5B", more={"quant": "fp8"}),
    Case("1.5B", rows=4, checkpoint="block", more={"quant": "nf4", "quant_head": True}),
    Case("1.5B", more={"optim": "adamw8bit"}), Case("1.5B", more={"grad_accum": 2}),
    Case("1.5B", more={"master_weights": "bf16"}), Case("1.5B", rows=8, more={"sampling": "pack"}),
    Case("0.4B", "full", rows=4, checkpoint="block", more={"sampling": "pack"}),
    Case("2.9B", checkpoint="block"), Case("2.9B", ctx=512, rows=4, checkpoint="selective"),
    Case("2.9B", "bone", checkpoint="block"), Case("2.9B", "state", checkpoint="block"),
    Case("2.9B", checkpoint="block", more={"quant": "nf4"}), Case("2.9B", ctx=8192, checkpoint="block"),
    Case("v6-1.6B"), Case("v6-1.6B", "bone", rows=4), Case("v6-1.6B", rows=4, checkpoint="selective"),
    Case("v6-1.6B", "state", rows=4, checkpoint="block"),
    Case("v5-1.5B"), Case("v5-1.5B", "bat", rows=4), Case("v5-1.5B", rows=4, checkpoint="selective"),
    Case("v5-1.5B", "pissa", rows=4, checkpoint="block"),
]  # fmt: skip


def predicted(case: Case, config: TrainConfig) -> tuple[dict[str, Any], Plan]:
    """A row of the table, and the plan behind it; of a GPU, wherever this runs."""
    version, sizes = SIZES[case.size]
    one = plan(config, Outline.of(MODELS[version], sizes, config), Card(KNOWN["H100"].free, "H100"))
    parts = {name: size / GIB for name, size in one.parts.items()}
    return {
        "run": case.name,
        "trained": one.trained,
        "frozen GiB": parts["weights"] + parts["quantised"] + parts["embedding"],
        "learning GiB": parts["trained"] + parts["gradients"] + parts["optimiser"],
        "kept GiB": parts["activations"],
        "at once GiB": parts["loss or layer"] + parts["workspace"],
        "predicted GiB": one.total / GIB,
        "process GiB": one.process / GIB,
    }, one


def measure(case: Case, args: Any) -> dict[str, Any]:
    """A row, with what was measured if there is a GPU."""
    device = torch.device(args.device)
    if device.type != "cuda":
        return predicted(case, case.config("bf16"))[0]
    config = case.config("bf16")
    version, sizes = SIZES[case.size]
    embedding = "gpu" if case.method == "full" or config.embedding == "gpu" else "cpu"
    model = random_model(version, sizes, torch.bfloat16, device, "auto", config.quant, config.quant_head, embedding)
    prepare(model, config)
    row, one = predicted(case, config)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    packed = config.sampling == "pack"
    batches = random_batches(sizes.vocab_size, case.ctx, case.rows, packed)
    try:
        run_steps(model, config, batches, PACKED_STEPS if packed else STEPS)
        synchronise(device)
    except (RuntimeError, MemoryError) as error:
        return row | {"failed": in_one_line(error)}
    peak, (free, total) = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)
    row |= {
        "measured GiB": peak / GIB,
        "error %": 100 * (one.total / peak - 1),
        "measured process": (total - free) / GIB,
    }
    return row | {"outside GiB": (total - free - torch.cuda.memory_reserved(device)) / GIB}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", help="part of a configuration's name")
    args = parser.parse_args()
    device, rows = torch.device(args.device), []
    lean_memory(device)
    print(f"Memory plans; {describe(device)}", flush=True)
    for case in CASES:
        if args.only in case.name:
            rows.append(measure(case, args))
            gc.collect()
            if device.type == "cuda":
                print(rows[-1], flush=True)
                torch.cuda.empty_cache()
    print_table(rows, [c for c in COLUMNS if any(row.get(c) is not None for row in rows)])
    write_json(args.json, device, rows)


if __name__ == "__main__":
    main()
