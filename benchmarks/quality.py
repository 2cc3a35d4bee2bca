"""Tuning from a quantised base: how many held-out answers are right afterwards: `python benchmarks/quality.py`.

The demo's run (LoRA on the tiny base, 100 steps) for each format of the base, each seed a column. `attached` is scored
with the adapter on the quantised base, `dense` after merging into the dense base, `trained` after merging into the base
as it was quantised. On a GPU the runs are bf16.
"""

from __future__ import annotations

import io
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console

from measure import arguments, describe, print_table, write_json
from rwkv_peft.adapters import load_adapter
from rwkv_peft.demo import BASE, demo_settings, score
from rwkv_peft.export.merge import merge
from rwkv_peft.loading import load_model
from rwkv_peft.ops.quant import QUANTS
from rwkv_peft.training.run import train

COLUMNS = ["quant", "head", "before", "attached", "dense", "trained", "seeds", "loss"]


def measure(quant: str, head: bool, seed: int, device: str) -> dict[str, float]:
    """Scores of one run, in percent."""
    dtype = "bf16" if device == "cuda" else "fp32"
    how: dict[str, Any] = {"dtype": dtype, "device": device, "quant": quant, "quant_head": head}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        config = replace(demo_settings(out), device=device, quant=quant, quant_head=head, seed=seed)
        run = train(config, Console(file=io.StringIO()))
        found = {"before": score(load_model(BASE, **how))[0], "loss": mean(run.losses[-10:])}
        found["attached"] = score(load_adapter(load_model(BASE, **how), run.result))[0]
        for onto in ("dense", "trained") if quant != "none" else ("dense",):
            file = merge(BASE, run.result, Path(folder, f"{onto}.pth"), onto=onto)
            found[onto] = score(load_model(file, dtype, device))[0]
    return {name: value if name == "loss" else 100 * value for name, value in found.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quants", nargs="+", default=["none", *QUANTS])
    args = parser.parse_args()
    device, rows = torch.device(args.device), []
    for quant in args.quants:
        for head in (False, True) if quant != "none" else (False,):
            runs = [measure(quant, head, seed, args.device) for seed in range(args.seeds)]
            row: dict[str, Any] = {"quant": quant, "head": head, "seeds": args.seeds}
            row |= {name: mean(run[name] for run in runs) for name in runs[0]}
            rows.append(row)
            print(row, flush=True)
    print(f"Held-out answers that are right, percent; {describe(device)}")
    print_table(rows, COLUMNS)
    write_json(args.json, device, rows)


if __name__ == "__main__":
    main()
