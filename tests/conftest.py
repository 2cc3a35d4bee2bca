"""Random official-form models for every room's tests."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkv_peft as rp
from rwkv_peft.models import Rwkv

torch.set_num_threads(1)  # the models are so small that threads would only wait for one another


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


@pytest.fixture
def load(model_file: Callable[..., Path]) -> Callable[..., Rwkv]:
    """Load a random model: `load(layers=3, op="reference", …)`; `dtype` is the file's, `as_dtype` the model's."""

    def make(as_dtype: str = "fp32", op: str = "auto", **sizes: object) -> Rwkv:
        return rp.load_model(model_file(**sizes), as_dtype, op=op)

    return make


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value wanted."""
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.detach(), want.detach()
    largest = float(want.double().abs().max())
    error = float((got.double() - want.double()).abs().max())
    assert not math.isnan(error)
    return error / largest if largest else error


def random_tokens(vocab_size: int, *shape: int, seed: int = 1) -> Tensor:
    """Token ids that hold the smallest and the largest where there is room."""
    tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    tokens.view(-1)[-1] = vocab_size - 1
    return tokens


class PypiRwkv:
    """The PyPI package `rwkv` in a process of its own, since its environment is read at import."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def __call__(self, path: Path, tokens: list[int], singly: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T,V), wkv state (L,H,N,N) and shift state (L,2,D) of an RWKV-7 `.pth` file, in float32.

        With `singly`, token by token, which is other code there.
        """
        return tuple(torch.from_numpy(x) for x in self.pool.submit(_run_rwkv, str(path), tokens, singly).result())  # type: ignore[return-value]


@pytest.fixture(scope="session")
def pypi_rwkv() -> Iterator[PypiRwkv]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield PypiRwkv(pool)


def _run_rwkv(path: str, tokens: list[int], singly: bool) -> list[Any]:
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_CUDA_ON": "0", "RWKV_JIT_ON": "0"}
    from rwkv.model import RWKV

    model = RWKV(path.removesuffix(".pth"), "cpu fp32")
    state = model.generate_zero_state()
    if singly:
        rows = []
        for token in tokens:
            logits, state = model.forward([token], state)
            rows.append(logits)
        logits = torch.stack(rows)
    else:
        logits, state = model.forward(tokens, state, full_output=True)
    shift = torch.stack([torch.stack((state[i], state[i + 2])) for i in range(0, len(state), 3)])
    return [x.numpy() for x in (logits.reshape(len(tokens), -1), torch.stack(state[1::3]), shift)]
