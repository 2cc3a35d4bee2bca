"""Initial weights of the tiny base model: `python tools/tiny_base.py OUT.pth`.

Training them is the work of `rwkv-peft train --peft full`; the model card beside the model has the commands. The
initial values follow RWKV-LM's training code for RWKV-7.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from rwkv_peft.checkpoint import write_tensors

LAYERS, WIDTH, HEAD_SIZE, VOCAB_SIZE = 6, 192, 64, 257
RANKS = {"w": 32, "a": 32, "v": 16, "g": 64}


def initial_weights(seed: int) -> dict[str, Tensor]:
    """Official name → initial tensor, float32."""
    torch.manual_seed(seed)
    tensors = {"emb.weight": torch.empty(VOCAB_SIZE, WIDTH).uniform_(-1e-4, 1e-4)}
    tensors["head.weight"] = _orthogonal(VOCAB_SIZE, WIDTH, 0.5 * max(1, VOCAB_SIZE / WIDTH) ** 0.5)
    tensors |= _norm("ln_out") | _norm("blocks.0.ln0")
    for layer in range(LAYERS):
        name = f"blocks.{layer}."
        tensors |= _norm(f"{name}ln1") | _norm(f"{name}ln2") | _norm(f"{name}att.ln_x")
        tensors[f"{name}att.ln_x.weight"] *= ((1 + layer) / LAYERS) ** 0.7
        tensors |= {f"{name}att.{key}": value for key, value in _time_mix(layer).items()}
        tensors |= {f"{name}ffn.{key}": value for key, value in _channel_mix(layer).items()}
    return tensors


def _time_mix(layer: int) -> dict[str, Tensor]:
    depth, rest = layer / max(1, LAYERS - 1), 1 - layer / LAYERS  # 0 → 1 and 1 → almost 0 over the layers
    channel = torch.arange(WIDTH)
    linear = channel / (WIDTH - 1) - 0.5
    zigzag = (channel % HEAD_SIZE - (HEAD_SIZE - 1) / 2) / ((HEAD_SIZE - 1) / 2)
    zigzag = zigzag * zigzag.abs()
    decay = -6 + 6 * (channel / (WIDTH - 1)) ** (1 + depth**0.3)
    powers = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
    vectors = {name: 1 - (channel / WIDTH) ** (power * rest) for name, power in powers.items()}
    vectors |= {"w0": decay + 0.5 + zigzag * 2.5, "a0": -0.19 + zigzag * 0.3 + linear * 0.4}
    vectors |= {"k_k": 0.71 - linear * 0.1, "k_a": torch.full((WIDTH,), 1.02)}
    if layer > 0:
        vectors["v0"] = 0.73 - linear * 0.4
    tensors = {name: vector.view(1, 1, WIDTH) for name, vector in vectors.items()}
    for letter, rank in RANKS.items():
        if letter != "v" or layer > 0:
            tensors |= {f"{letter}1": torch.zeros(WIDTH, rank), f"{letter}2": _orthogonal(rank, WIDTH, 0.1)}
    tensors["r_k"] = torch.full((WIDTH // HEAD_SIZE, HEAD_SIZE), -0.04)
    for name, size in {"receptance": 0.5, "key": 0.05, "value": 0.5}.items():
        tensors[f"{name}.weight"] = _uniform(WIDTH, WIDTH, size)
    return tensors | {"output.weight": torch.zeros(WIDTH, WIDTH)}


def _channel_mix(layer: int) -> dict[str, Tensor]:
    x_k = 1 - (torch.arange(WIDTH) / WIDTH) ** ((1 - layer / LAYERS) ** 4)
    key, value = _uniform(4 * WIDTH, WIDTH, 0.5), torch.zeros(WIDTH, 4 * WIDTH)
    return {"x_k": x_k.view(1, 1, WIDTH), "key.weight": key, "value.weight": value}


def _norm(name: str) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(WIDTH), f"{name}.bias": torch.zeros(WIDTH)}


def _uniform(rows: int, columns: int, size: float) -> Tensor:
    return torch.empty(rows, columns).uniform_(-size, size) / WIDTH**0.5


def _orthogonal(rows: int, columns: int, gain: float) -> Tensor:
    return torch.nn.init.orthogonal_(torch.empty(rows, columns), gain=gain)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tiny base model's initial weights.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_tensors(args.out, {name: tensor.bfloat16() for name, tensor in initial_weights(args.seed).items()})


if __name__ == "__main__":
    main()
