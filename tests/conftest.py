"""Random official-form models for every room's tests."""

from __future__ import annotations

import contextlib
import io
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
from rwkv_peft.models import Rwkv, find_version

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, one program after the other
torch.set_num_threads(1)  # the models are so small that threads would only wait for one another


def random_model(
    version: str = "x070", flat: bool = False, dtype: torch.dtype = torch.float32, **sizes: Any
) -> dict[str, Tensor]:
    """Tensors of a model under their official names, random, at scales near a trained model's.

    `flat` has the vectors as (D,), not (1,1,D); `sizes` are those that the version's own function takes.
    """
    tensors = RANDOM[version](**sizes)
    return {n: (t.flatten() if flat and t.shape[:2] == (1, 1) else t).to(dtype) for n, t in tensors.items()}


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
    """`ranks` are those of w, a, v, g; `layer0_v` adds layer 0's unused `v0 v1 v2`, as official files have them."""
    D, w = width, _begin(width, vocab_size, seed)
    for i in range(layers):
        b, att = f"blocks.{i}.", f"blocks.{i}.att."
        for name in ("ln1", "ln2", "att.ln_x"):
            _norm(w, b + name, D)
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
        _matrices(w, att, "receptance key value output", D)
        w[b + "ffn.x_k"] = torch.rand(1, 1, D)
        _channel_mix(w, b + "ffn.", D, ffn or 4 * D)
    return {name: tensor.to(dtype) for name, tensor in w.items()}


def random_rwkv7a(rank_s: int = 32, **sizes: Any) -> dict[str, Tensor]:
    """`rank_s` is that of the channel-mix's own embedding; the PyPI package `rwkv` knows only 32."""
    w = random_rwkv7(**sizes)
    V, D = w["emb.weight"].shape
    for key in [name for name in w if name.endswith("ffn.key.weight")]:
        ffn, F, R = key.removesuffix("key.weight"), len(w[key]), rank_s
        w[ffn + "s_emb.weight"], w[ffn + "s_emb_x.weight"] = torch.randn(V, R * R) * 0.2, _matrix(R * R, D) * 0.2
        w[ffn + "s1"], w[ffn + "s2"] = torch.randn(D, R) / D**0.5, torch.randn(R, F) / R**0.5 * 0.5
        w[ffn + "s0"] = 1 + 0.3 * torch.randn(1, 1, F)
    return w


def random_rwkv6(ranks: tuple[int, int] = (4, 8), **sizes: Any) -> dict[str, Tensor]:
    """`ranks` are those of the mixes and of the decay."""

    def mixes(w: dict[str, Tensor], att: str, D: int) -> None:
        for name in "xwkvrg":
            w[f"{att}time_maa_{name}"] = torch.rand(1, 1, D)
        w[att + "time_maa_w1"] = torch.randn(D, 5 * ranks[0]) / D**0.5
        w[att + "time_maa_w2"] = torch.randn(5, ranks[0], D) * 0.2
        w[att + "time_decay"] = torch.randn(1, 1, D) * 1.5 - 2
        w[att + "time_decay_w1"] = torch.randn(D, ranks[1]) / D**0.5
        w[att + "time_decay_w2"] = torch.randn(ranks[1], D) * 0.3

    return _random_gated("maa", mixes, **sizes)


def random_rwkv5(**sizes: Any) -> dict[str, Tensor]:
    """RWKV-5.2; it has no sizes of its own."""

    def mixes(w: dict[str, Tensor], att: str, D: int) -> None:
        for name in "kvrg":
            w[f"{att}time_mix_{name}"] = torch.rand(1, 1, D)
        w[att + "time_decay"] = torch.randn(D) * 1.5 - 2

    return _random_gated("mix", mixes, **sizes)


RANDOM = {"x070a": random_rwkv7a, "x070": random_rwkv7, "x060": random_rwkv6, "x052": random_rwkv5}


def _random_gated(
    kind: str,
    mixes: Callable[[dict[str, Tensor], str, int], None],
    layers: int = 2,
    width: int = 64,
    vocab_size: int = 257,
    head_size: int = 32,
    ffn: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """What RWKV-5 and RWKV-6 share.

    Keys and receptances are so small that the recurrence gives numbers of the size of the root of ln_x's epsilon;
    else ln_x would undo any scale of `receptance`. The order is the official one: the PyPI package needs it.
    """
    D, w = width, _begin(width, vocab_size, seed)
    for i in range(layers):
        b, att, ffn_ = f"blocks.{i}.", f"blocks.{i}.att.", f"blocks.{i}.ffn."
        _norm(w, b + "ln1", D)
        _norm(w, b + "ln2", D)
        mixes(w, att, D)
        if kind == "mix":
            w[att + "time_decay"] = w[att + "time_decay"].view(-1, head_size)
        w[att + "time_faaaa"] = torch.randn(D // head_size, head_size)
        _matrices(w, att, "receptance key value gate output", D)
        w[att + "receptance.weight"] *= 0.05
        w[att + "key.weight"] *= 0.1
        _norm(w, att + "ln_x", D)
        w[f"{ffn_}time_{kind}_k"], w[f"{ffn_}time_{kind}_r"] = torch.rand(2, 1, 1, D)
        _channel_mix(w, ffn_, D, ffn or -(-7 * D // 64) * 32)
        w[ffn_ + "receptance.weight"] = _matrix(D, D)
    return w


def _begin(D: int, vocab_size: int, seed: int) -> dict[str, Tensor]:
    """What is outside the layers."""
    torch.manual_seed(seed)
    w = {"emb.weight": torch.randn(vocab_size, D), "head.weight": torch.randn(vocab_size, D) * 0.1}
    _norm(w, "ln_out", D)
    _norm(w, "blocks.0.ln0", D)
    return w


def _norm(w: dict[str, Tensor], name: str, D: int) -> None:
    w[f"{name}.weight"], w[f"{name}.bias"] = 1 + 0.1 * torch.randn(D), 0.1 * torch.randn(D)


def _matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) / columns**0.5


def _matrices(w: dict[str, Tensor], att: str, names: str, D: int) -> None:
    for name in names.split():
        w[f"{att}{name}.weight"] = _matrix(D, D)


def _channel_mix(w: dict[str, Tensor], ffn: str, D: int, F: int) -> None:
    w[ffn + "key.weight"], w[ffn + "value.weight"] = _matrix(F, D), _matrix(D, F) * 0.5


@pytest.fixture
def model_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a random model: `model_file(version="x060", layers=3, …)` gives the path of its `.pth`."""

    def write(name: str = "base.pth", **sizes: object) -> Path:
        path = tmp_path / name
        torch.save(random_model(**sizes), path)  # type: ignore[arg-type]
        return path

    return write


@pytest.fixture
def load(model_file: Callable[..., Path]) -> Callable[..., Rwkv]:
    """Load a random model: `load(version="x060", op="reference", …)`; `dtype` is the file's, `as_dtype` the model's."""

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
    """The PyPI package `rwkv`, a process for each family of versions, since its environment is read at import."""

    def __init__(self) -> None:
        self.pools: dict[str, ProcessPoolExecutor] = {}

    def __call__(
        self, path: Path, tokens: list[int], singly: bool = False, wkv: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T,V), wkv state (L,H,N,N) and shift state (L,2,D) of a `.pth` file of any version, in float32.

        With `singly`, token by token, which is other code there. `wkv` (L,H,N,N) is where an RWKV-7 begins.
        """
        version = find_version(torch.load(path, mmap=True, weights_only=True)).version
        family = version if version in FAMILIES else "older"
        if family not in self.pools:
            self.pools[family] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        start = None if wkv is None else wkv.numpy()
        found = self.pools[family].submit(_run_rwkv, FAMILIES[family], str(path), tokens, singly, start).result()
        logits, states, shift = (torch.from_numpy(x) for x in found)
        return logits, states.transpose(-1, -2) if family == "older" else states, shift  # there (L,H,key,value)


@pytest.fixture(scope="session")
def pypi_rwkv() -> Iterator[PypiRwkv]:
    program = PypiRwkv()
    yield program
    for pool in program.pools.values():
        pool.shutdown()


FAMILIES = {
    "x070": {"RWKV_V7_ON": "1"},
    "x070a": {"RWKV_V7_ON": "1", "RWKV_DE_VERSION": "1"},
    "older": {"RWKV_V7_ON": "0"},
}


def _run_rwkv(family: dict[str, str], path: str, tokens: list[int], singly: bool, wkv: Any) -> list[Any]:
    os.environ |= {**family, "RWKV_CUDA_ON": "0", "RWKV_JIT_ON": "0"}
    with contextlib.redirect_stdout(io.StringIO()):
        from rwkv.model import RWKV

        model = RWKV(path.removesuffix(".pth"), "cpu fp32")
    state = None
    if wkv is not None:
        state = model.generate_zero_state()
        state[1::3] = list(torch.from_numpy(wkv))
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
