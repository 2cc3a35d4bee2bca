"""Loss curves of the operators beside each other: `python benchmarks/curves.py`, on a GPU in bf16.

The tiny model that comes with the program and a model of RWKV-7 0.1B's shape with random weights, on the data of the
demo: 300 steps each, the same examples in the same order. Operators round in different places, so that runs part
slowly; how far is shown as the mean and the largest difference of losses from the operator that comes first, the
sequential recurrence. That one is slow: rows are short.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from measure import arguments, describe, print_table, write_json
from random_model import SIZES, random_model
from rwkv_peft.checkpoint import write_tensors
from rwkv_peft.config import TrainConfig
from rwkv_peft.demo import BASE, TRAIN_DATA
from rwkv_peft.training.run import train

COLUMNS = ["model", "op", "first loss", "last 20", "mean difference", "largest of 20 steps"]
WINDOW = 20  # steps


def losses(model: Path, data: Path, op: str, folder: Path, args: Any) -> list[float]:
    """Of each step of a run."""
    config = TrainConfig(
        model, [str(data)], folder / op, rank=16, max_steps=args.steps, ctx_len=args.ctx, micro_batch=2, lr=1e-3,
        warmup_steps=10, precision=args.precision, device=args.device, op=op, seed=1,
    )  # fmt: skip
    return train(config, Console(file=io.StringIO())).losses


def models(folder: Path, args: Any) -> Iterator[tuple[str, Path, Path]]:
    """Name, file and data of each."""
    if "tiny" in args.models:
        yield "tiny", BASE, TRAIN_DATA
    if "0.1B" in args.models:
        version, sizes = SIZES["0.1B"]
        model = random_model(version, sizes, torch.bfloat16, torch.device("cpu"), "torch")
        path = folder / "model.pth"
        write_tensors(path, {name: p.detach() for name, p in model.named_parameters()})
        yield "0.1B", path, TRAIN_DATA


def compare(name: str, model: Path, data: Path, folder: Path, args: Any) -> Iterator[dict[str, Any]]:
    """A row for each operator."""
    first: torch.Tensor | None = None
    for op in args.ops:
        found = torch.tensor(losses(model, data, op, folder / name, args), dtype=torch.float64)
        first = found if first is None else first
        difference = found - first
        windows = difference[: len(found) // WINDOW * WINDOW].view(-1, WINDOW).mean(1)
        yield {
            "model": name, "op": op, "first loss": float(found[0]), "last 20": float(found[-WINDOW:].mean()),
            "mean difference": float(difference.abs().mean()), "largest of 20 steps": float(windows.abs().max()),
            "losses": found.tolist(),
        }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=["tiny", "0.1B"], default=["tiny", "0.1B"])
    parser.add_argument("--ops", nargs="+", default=["reference", "triton", "cuda"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ctx", type=int, default=64)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model, data in models(Path(folder), args):
            for row in compare(name, model, data, Path(folder), args):
                rows.append(row)
                print({key: value for key, value in row.items() if key != "losses"}, flush=True)
    settings = {"steps": args.steps, "ctx": args.ctx, "precision": args.precision}
    machine = describe(torch.device(args.device))
    print(f"Loss curves; {settings}; {machine}")
    print_table(rows, COLUMNS)
    write_json(args.json, torch.device(args.device), rows)


if __name__ == "__main__":
    main()
