"""Whole training steps by the project's own loop, on random weights of official sizes: `python benchmarks/step.py`.

Without arguments, the runs of the original program that were measured on an H100, each beside its figures. Else every
combination of `--sizes`, `--methods`, `--ctx` and `--micro-batch`. Rows are full, and every token is trained on; with
`--packed` one row of as many tokens holds documents of all lengths, others at each step. Tokens a second are the median
of windows of steps after some to warm up; peak memory is what torch allocated, with the model; process memory is what
the GPU has in use, so leave it to this program alone.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

from measure import GIB, arguments, describe, in_one_line, print_table, synchronise, write_json
from random_model import SIZES, random_model
from rwkv_peft.checkpoint import DTYPES
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.batches import Batch
from rwkv_peft.models import Rwkv
from rwkv_peft.training.checkpointing import choose_checkpoint
from rwkv_peft.training.engine import SingleProcess, lean_memory
from rwkv_peft.training.loop import train_loop
from rwkv_peft.training.metrics import StepRecord
from rwkv_peft.training.model import prepare
from rwkv_peft.training.optim import build_optimizer
from rwkv_peft.yaml_config import convert, settings_of

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 64},
    "dora": {"rank": 64, "dora": True},
    "pissa": {"peft": "pissa", "rank": 64},
    "pissa-exact": {"peft": "pissa", "rank": 64, "svd_iterations": 0},
    "bone": {"peft": "bone", "rank": 32},
    "bat": {"peft": "bat", "rank": 32},
    "state": {"peft": "state"},
    "lora+state": {"rank": 64, "train_parts": ("time", "ln", "state")},
    "full": {"peft": "full"},
}


@dataclass(frozen=True)
class Original:
    """A run of the original program on one H100 80GB: its own train.py, bf16, checkpointing on."""

    size: str
    method: str
    ctx: int
    micro_batch: int
    tokens_per_s: int
    peak_gib: float
    process_gib: float
    asked: int
    """Tokens a second that this program is to reach; 0 where nothing is asked."""


ORIGINALS = [
    Original("0.1B", "lora", 1024, 1, 5_157, 1.41, 3.46, 60_000),
    Original("0.4B", "lora", 1024, 1, 2_441, 2.18, 4.15, 28_000),
    Original("1.5B", "lora", 1024, 1, 2_234, 4.71, 7.07, 20_000),
    Original("2.9B", "lora", 1024, 1, 2_018, 7.97, 10.46, 16_000),
    Original("2.9B", "bone", 1024, 1, 2_421, 7.02, 9.16, 16_000),
    Original("2.9B", "state", 1024, 1, 3_120, 6.82, 8.95, 16_000),
    Original("0.1B", "lora", 4096, 8, 60_385, 17.27, 20.18, 250_000),
    Original("0.4B", "lora", 4096, 8, 27_530, 18.96, 22.23, 110_000),
    Original("1.5B", "lora", 4096, 4, 15_720, 13.34, 16.63, 45_000),
    Original("2.9B", "lora", 4096, 2, 8_345, 12.16, 16.70, 22_000),
]
COLUMNS = [
    "size", "method", "ctx", "rows", "tokens/s", "asked", "original", "times", "TFLOP/s", "peak GiB", "original peak",
    "process GiB", "original process", "attach s", "loss", "failed",
]  # fmt: skip


@dataclass
class Rows:
    """In the place of a sampler: random tokens, the same number at each step."""

    batches: list[Batch]

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        return [self.batches[step % len(self.batches)]]


class Clock:
    """In the place of what a run tells: when each window of steps was done."""

    def __init__(self, device: torch.device, warm_up: int, windows: int, steps: int) -> None:
        self.device, self.warm_up, self.steps = device, warm_up, steps
        self.total_steps = warm_up + windows * steps
        self.marks: list[float] = []
        self.loss = float("nan")

    def add(self, record: StepRecord) -> None:
        self.loss = record.loss
        if record.step >= self.warm_up and (record.step - self.warm_up) % self.steps == 0:
            synchronise(self.device)
            self.marks.append(time.perf_counter())

    def step_seconds(self) -> float:
        """The median window's seconds for a step."""
        return statistics.median(b - a for a, b in pairwise(self.marks)) / self.steps


def random_batches(vocab_size: int, ctx: int, rows: int, packed: bool, count: int = 4) -> list[Batch]:
    """Full rows of random tokens; or packed, one row of as many tokens in documents of log-normal lengths."""
    generator, n, found = torch.Generator().manual_seed(0), rows * ctx, []
    for _ in range(count):
        tokens = torch.randint(1, vocab_size, (1, n) if packed else (rows, ctx), generator=generator)
        bounds = None
        if packed:
            lengths = torch.empty(n).log_normal_(5.5, 1.0, generator=generator).clamp(1, ctx).long()
            ends = lengths.cumsum(0)
            bounds = torch.cat((torch.tensor([0]), ends[ends < n], torch.tensor([n]))).int()
        found.append(Batch(tokens, torch.arange(n), tokens.flatten().roll(-1), n, bounds))
    return found


def run_steps(model: Rwkv, config: TrainConfig, batches: list[Batch], args: Any) -> Clock:
    """Train `model`, which is prepared."""
    clock = Clock(model.like.device, args.warm_up, args.windows, args.steps)
    optimizer = build_optimizer(model, config)
    train_loop(config, model, Rows(batches), optimizer, SingleProcess(), clock, stopped=lambda: False)  # type: ignore[arg-type]
    return clock


def measure(case: Original, args: Any) -> dict[str, Any]:
    """A row of the table."""
    device, dtype = torch.device(args.device), DTYPES[args.precision]
    rows = case.micro_batch
    row: dict[str, Any] = {"size": case.size, "method": case.method, "ctx": case.ctx, "rows": rows, "op": args.op}
    settings: dict[str, Any] = dict(METHODS[case.method], precision=args.precision, op=args.op, ctx_len=case.ctx)
    settings |= {"optim": args.optim, "master_weights": args.master_weights}
    settings["offload_checkpoints"] = args.offload_checkpoints
    if args.grad_checkpoint is not None:
        hint = settings_of(TrainConfig)["grad_checkpoint"].hint
        settings["grad_checkpoint"] = convert(args.grad_checkpoint, hint, "--grad-checkpoint")
    try:
        config = TrainConfig(Path("random"), ["random"], Path("unused"), micro_batch=rows, **settings).resolved()
        version, sizes = SIZES[case.size]
        on_cpu = device.type == "cuda" and case.method != "full"
        kept = (args.quant, args.quant_head, args.embedding or ("cpu" if on_cpu else "gpu"))
        model = random_model(version, sizes, dtype, device, args.op, *kept)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        prepare(model, config)
        if case.peak_gib and args.grad_checkpoint is None:  # no more memory than the original's
            free = 0.97 * case.peak_gib * GIB - torch.cuda.memory_allocated(device)
            model.grad_checkpoint = choose_checkpoint(model, rows * case.ctx, free)
        synchronise(device)
        row["attach s"] = time.perf_counter() - began
        clock = run_steps(model, config, random_batches(sizes.vocab_size, case.ctx, rows, args.packed), args)
    except (RuntimeError, MemoryError) as error:
        return row | {"failed": in_one_line(error)}
    row |= {"tokens/s": round(rows * case.ctx / clock.step_seconds()), "loss": clock.loss}
    row["TFLOP/s"] = flops_of(model, case.method) * row["tokens/s"] / 1e12
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        row |= {"peak GiB": torch.cuda.max_memory_allocated(device) / GIB, "process GiB": (total - free) / GIB}
    if case.tokens_per_s:
        row |= {"original": case.tokens_per_s, "times": row["tokens/s"] / case.tokens_per_s}
        row |= {"asked": case.asked, "original peak": case.peak_gib, "original process": case.process_gib}
    return row


def flops_of(model: Rwkv, method: str) -> float:
    """Operations a token in the matrices, without what is computed again: 4 a weight, and 2 more where it trains."""
    weights = sum(math.prod(s) for n, s in model.shapes().items() if n.endswith(".weight") and len(s) == 2)
    return float((weights - model.emb.weight.numel()) * (6 if method == "full" else 4))


def cases_of(args: Any) -> list[Original]:
    """The original's runs, or every combination that was asked for."""
    if not any((args.sizes, args.methods, args.ctx, args.micro_batch)):
        return ORIGINALS if args.device != "cpu" else [Original("tiny", "lora", 64, 2, 0, 0, 0, 0)]
    sizes, methods = args.sizes or ["1.5B"], args.methods or ["lora"]
    known = {replace(o, tokens_per_s=0, peak_gib=0, process_gib=0, asked=0): o for o in ORIGINALS}
    asked = product(sizes, methods, args.ctx or [1024], args.micro_batch or [1])
    cases = [Original(size, method, ctx, rows, 0, 0, 0, 0) for size, method, ctx, rows in asked]
    return [known.get(case, case) for case in cases]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--ctx", nargs="+", type=int)
    parser.add_argument("--micro-batch", nargs="+", type=int)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument(
        "--grad-checkpoint",
        help="as of train; [for the original's runs what fits into its memory, else auto]",
    )
    parser.add_argument("--offload-checkpoints", action="store_true")
    parser.add_argument("--op", default="auto")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--quant-head", action="store_true")
    parser.add_argument("--embedding", choices=("cpu", "gpu"), help="[the CPU's memory where it does not train]")
    parser.add_argument("--optim", default="adamw")
    parser.add_argument("--master-weights", default="fp32")
    parser.add_argument("--precision", choices=list(DTYPES))
    parser.add_argument("--warm-up", type=int, default=6, help="steps")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a window")
    args = parser.parse_args()
    device, rows = torch.device(args.device), []
    lean_memory(device)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    names = ("precision", "op", "grad_checkpoint", "packed", "quant", "quant_head", "embedding", "optim")
    how = {name: getattr(args, name) for name in (*names, "master_weights", "offload_checkpoints")}
    print(f"Training steps; {how}; {describe(device)}", flush=True)
    for case in cases_of(args):
        rows.append(measure(case, args))
        print({name: value for name, value in rows[-1].items() if "original" not in name}, flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print_table(rows, [c for c in COLUMNS if any(row.get(c) is not None for row in rows)])
    write_json(args.json, device, [how | row for row in rows])


if __name__ == "__main__":
    main()
