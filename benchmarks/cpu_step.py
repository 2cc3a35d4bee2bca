"""One training step on the CPU, with each operator in the same run: `python benchmarks/cpu_step.py`.

A step is forward, backward and AdamW on every weight, over 2,048 tokens, with 6 layers of width 256 and a vocabulary
of 512. Machines differ: only the ratio within one run counts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from rwkv_peft.data.batches import Batch
from rwkv_peft.models import Rwkv7, Rwkv7Sizes
from rwkv_peft.ops import BACKENDS, Backend
from rwkv_peft.training.step import batch_loss

SIZES = Rwkv7Sizes(
    layers=6, width=256, head_size=64, vocab_size=512, ffn=1024, rank_w=32, rank_a=32, rank_v=16, rank_g=64
)


def build(backend: Backend) -> Rwkv7:
    """A model with small random weights."""
    torch.manual_seed(0)
    model = Rwkv7(SIZES)
    for name, parameter in model.named_parameters():
        if "ln" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.op = backend
    return model.train()


def time_steps(model: Rwkv7, batch: Batch, repeats: int) -> float:
    """Median seconds of a step, after one to warm up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        loss, penalty = batch_loss(model, batch, 1e-4)
        (loss + penalty).div(len(batch.labels)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one training step with each operator.")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048, help="of all rows together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = torch.randint(1, SIZES.vocab_size, (args.rows, args.tokens // args.rows))
    batch = Batch(tokens, torch.arange(tokens.numel()), tokens.flatten().roll(-1), tokens.numel())
    print(f"L{SIZES.layers} D{SIZES.width}, {args.rows} × {tokens.shape[1]} tokens, {args.threads} threads")
    seconds = {name: time_steps(build(backend), batch, args.repeats) for name, backend in BACKENDS.items()}
    for name, took in seconds.items():
        print(f"{name:10} {took:6.2f} s a step  {seconds['reference'] / took:5.1f}× the speed of reference")


if __name__ == "__main__":
    main()
