"""Random official-form models for every room's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

torch.set_num_threads(2)


def random_rwkv7(
    layers: int = 2,
    width: int = 64,
    vocab_size: int = 257,
    ranks: tuple[int, int, int, int] = (8, 8, 4, 16),
    head_size: int = 64,
    ffn: int | None = None,
    layer0_v: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Tensors of an RWKV-7 model under their official names, random, at scales near a trained model's.

    `ranks` are those of w, a, v, g; `layer0_v` adds layer 0's unused `v0 v1 v2`, as official files have them.
    """
    torch.manual_seed(seed)
    D, F = width, ffn or 4 * width
    w: dict[str, Tensor] = {"emb.weight": torch.randn(vocab_size, D), "head.weight": torch.randn(vocab_size, D) * 0.1}

    def norm(name: str) -> None:
        w[f"{name}.weight"], w[f"{name}.bias"] = 1 + 0.1 * torch.randn(D), 0.1 * torch.randn(D)

    norm("ln_out")
    norm("blocks.0.ln0")
    for i in range(layers):
        b, att = f"blocks.{i}.", f"blocks.{i}.att."
        for name in ("ln1", "ln2", "att.ln_x"):
            norm(b + name)
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
            w[att + name] = torch.rand(1, 1, D)
        w[att + "w0"] = torch.randn(1, 1, D) * 2 - 2
        w[att + "a0"] = torch.randn(1, 1, D)
        w[att + "k_k"], w[att + "k_a"] = 0.85 + 0.1 * torch.randn(1, 1, D), 1 + 0.1 * torch.randn(1, 1, D)
        w[att + "r_k"] = torch.randn(D // head_size, head_size) * 0.1
        for letter, rank in zip("wavg", ranks, strict=True):
            if letter != "v" or i > 0 or layer0_v:
                w[f"{att}{letter}1"], w[f"{att}{letter}2"] = torch.randn(D, rank) / D**0.5, torch.randn(rank, D) * 0.3
        if i > 0 or layer0_v:
            w[att + "v0"] = torch.randn(1, 1, D)
        for name in ("receptance", "key", "value", "output"):
            w[f"{att}{name}.weight"] = torch.randn(D, D) / D**0.5
        w[b + "ffn.x_k"] = torch.rand(1, 1, D)
        w[b + "ffn.key.weight"], w[b + "ffn.value.weight"] = (
            torch.randn(F, D) / D**0.5,
            torch.randn(D, F) / F**0.5 * 0.5,
        )
    return {name: tensor.to(dtype) for name, tensor in w.items()}


@pytest.fixture
def model_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a random model: `model_file(layers=3, …)` gives the path of its `.pth`."""

    def write(name: str = "base.pth", **sizes: object) -> Path:
        path = tmp_path / name
        torch.save(random_rwkv7(**sizes), path)  # type: ignore[arg-type]
        return path

    return write
