"""Training steps of every method on a GPU, at the sizes of official models: `python benchmarks/methods.py`.

Random weights, bf16 with float32 masters, gradient checkpointing, AdamW, one row of 1,024 tokens, all of them trained
on. Prints seconds to attach the adapter, tokens a second (median of the steps after two to warm up), and peak memory
allocated.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import rwkv_peft as rp
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.batches import Batch
from rwkv_peft.models import MODELS, Rwkv, Rwkv5Sizes, Rwkv6Sizes, Rwkv7Sizes, Sizes
from rwkv_peft.training.optim import build_optimizer
from rwkv_peft.training.run import prepare
from rwkv_peft.training.step import batch_loss

COMMON: dict[str, int] = {"head_size": 64, "vocab_size": 65536}
MODELS_OF: dict[str, tuple[str, Sizes]] = {
    "RWKV-7 1.5B": (
        "x070",
        Rwkv7Sizes(layers=24, width=2048, ffn=8192, rank_w=96, rank_a=96, rank_v=64, rank_g=256, **COMMON),
    ),
    "RWKV-6 1.6B": ("x060", Rwkv6Sizes(layers=24, width=2048, ffn=7168, rank_mix=32, rank_decay=64, **COMMON)),
    "RWKV-5 1.5B": ("x052", Rwkv5Sizes(layers=24, width=2048, ffn=7168, **COMMON)),
}
METHODS: dict[str, dict[str, Any]] = {
    "lora 64": {"rank": 64},
    "dora 64": {"rank": 64, "dora": True},
    "pissa 64": {"peft": "pissa", "rank": 64},
    "pissa 64, exact SVD": {"peft": "pissa", "rank": 64, "svd_iterations": 0},
    "bone 32": {"peft": "bone", "rank": 32},
    "bat 32": {"peft": "bat", "rank": 32},
    "state": {"peft": "state"},
    "lora 64 and state": {"rank": 64, "train_parts": ("time", "ln", "state")},
}


def write_model(path: Path, version: str, sizes: Sizes) -> None:
    """A bf16 file of small random weights."""
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in MODELS[version](sizes).named_parameters()}
    tensors = {}
    for name, shape in shapes.items():
        random = torch.randn(shape, generator=generator, device="cuda")
        is_norm = ".ln" in f".{name}" and name.endswith("weight")
        tensors[name] = (1 + 0.01 * random if is_norm else 0.02 * random).bfloat16().cpu()
    torch.save(tensors, path)


def time_steps(model: Rwkv, config: TrainConfig, tokens: int, steps: int) -> float:
    """Tokens a second."""
    optimizer = build_optimizer(model, config)
    row = torch.randint(1, model.sizes.vocab_size, (1, tokens))
    batch = Batch(row, torch.arange(tokens), row.flatten().roll(-1), tokens)
    seconds = []
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss, penalty = batch_loss(model, batch, config.logit_penalty)
        ((loss + penalty) / tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    assert torch.isfinite(loss)
    return tokens / statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time training steps of every method on a GPU.")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, one row of {args.tokens} tokens", flush=True)
    for title, (version, sizes) in MODELS_OF.items():
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.pth"
            write_model(path, version, sizes)
            for method, settings in METHODS.items():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                config = TrainConfig(path, ["unread"], Path(folder), grad_checkpoint=True, **settings).resolved()
                model = rp.load_model(path, "bf16", "cuda")
                torch.cuda.synchronize()
                began = time.perf_counter()
                prepare(model, config)
                torch.cuda.synchronize()
                attached = time.perf_counter() - began
                speed = time_steps(model, config, args.tokens, args.steps)
                peak = torch.cuda.max_memory_allocated() / 2**30
                print(
                    f"{title}  {method:20} attach {attached:5.1f} s  {speed:6,.0f} tokens/s  {peak:5.2f} GiB",
                    flush=True,
                )
                del model


if __name__ == "__main__":
    main()
