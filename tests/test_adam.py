"""AdamW in little memory: its formula against torch's and bitsandbytes', its kernel against its formula."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import difference
from rwkv_peft.errors import ConfigError
from rwkv_peft.ops.adam import (
    Averages,
    Rates,
    adamw,
    averages_of,
    dequantised,
    quantised,
    quantisers,
    rounded,
)
from rwkv_peft.ops.quant.blocks import dynamic_map
from rwkv_peft.training.adamw import LeanAdamW
from rwkv_peft.training.outcome import Guard

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
FP32, BF16 = torch.float32, torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU, kernels are interpreted
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
SIZES = (1, 255, 300, 4096, 4103, 70 * 90)


def random_like(x: Tensor, seed: int, spread: bool = False) -> Tensor:
    """Normal; with `spread` of all sizes from 1e-4 to 1, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (-4 * torch.rand(x.shape, generator=generator)) if spread else torch.ones(())
    return (torch.randn(x.shape, generator=generator) * size).to(x)


def parameters(dtype: torch.dtype, device: torch.device | str = "cpu", sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    """Some of one axis, some of two."""
    shapes = [(n,) if n % 90 else (n // 90, 90) for n in sizes]
    return [nn.Parameter(random_like(torch.empty(s, dtype=dtype, device=device), i)) for i, s in enumerate(shapes)]


def take_steps(optimizer: torch.optim.Optimizer, steps: range, lr: float = 1e-2, spread: bool = False) -> None:
    """At a rate that changes."""
    for step in steps:
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            p.grad = random_like(p, 100 * step + i, spread)
        for group in optimizer.param_groups:
            group["lr"] = lr / (1 + step)
        optimizer.step()


@devices
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_32_bits_are_torchs(decay: float, device: str) -> None:
    mine, others = parameters(FP32, device), parameters(FP32, device)
    settings: dict[str, Any] = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": decay}
    take_steps(LeanAdamW(mine, **settings), range(20), lr=0.1)
    take_steps(torch.optim.AdamW(others, fused=True, **settings), range(20), lr=0.1)
    assert max(difference(got, want) for got, want in zip(mine, others, strict=True)) < 1e-6


# --- 8 bits


@pytest.mark.parametrize("signed", [True, False])
def test_maps_are_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed))


@pytest.mark.parametrize("n", [1, 256, 1000])
def test_8_bits_are_the_nearest_of_their_map(n: int) -> None:
    maps = quantisers(torch.device("cpu"))
    x = random_like(torch.empty(n), 3, spread=True)
    index, largest = quantised(x, maps[1])
    assert index.dtype == torch.uint8
    got = dequantised(index, largest, maps[0])
    for start in range(0, n, 256):
        block = x[start : start + 256]
        assert largest[start // 256] == block.abs().max()
        choices = maps[0] * block.abs().max()
        nearest = (block[:, None] - choices).abs().min(1).values
        torch.testing.assert_close((block - got[start : start + 256]).abs(), nearest, atol=1e-7, rtol=1e-5)


def test_what_is_divided_by_is_never_0() -> None:
    """Unless it is."""
    maps = quantisers(torch.device("cpu"))
    x = torch.tensor([0.0, 1e-12, 1.0, 0.5])
    got = dequantised(*quantised(x, maps[3]), maps[2])
    assert got[0] == 0 < got[1] < 1e-6
    assert got[2] == 1


def test_8_bits_are_bitsandbytes() -> None:
    """After a step the averages, but for those that it takes on a CPU from a coarse table; and where 30 steps lead."""
    optim = pytest.importorskip("bitsandbytes.optim")
    sizes = tuple(n for n in SIZES if n >= 4096)
    mine, others, start = (parameters(FP32, sizes=sizes) for _ in range(3))
    settings: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    ours, its = LeanAdamW(mine, bits=8, **settings), optim.AdamW8bit(others, **settings)
    for optimizer in ours, its:
        take_steps(optimizer, range(1))
    for p, q in zip(mine, others, strict=True):
        got, want = ours.state[p], its.state[q]
        assert difference(p, q) < 1e-6
        for name, number, signed in ("m", 1, True), ("v", 2, False):
            torch.testing.assert_close(got[f"{name}_max"], want[f"absmax{number}"])
            large = dynamic_map(signed)[got[name].int()].abs() > 0.01
            assert large.float().mean() > 0.7
            assert (got[name] == want[f"state{number}"])[large].float().mean() > 0.99
    for optimizer in ours, its:
        take_steps(optimizer, range(1, 30))
    for p, q, was in zip(mine, others, start, strict=True):
        assert (p - q).norm() < 0.01 * (q - was).norm()


def test_small_tensors_keep_32_bits() -> None:
    kinds = {n: averages_of(torch.empty(n), 8, paged=False)["m"].dtype for n in (1, 4095, 4096)}
    assert kinds == {1: FP32, 4095: FP32, 4096: torch.uint8}


# --- bf16


def test_rounding_is_right_on_average() -> None:
    """Each value goes to one of its two neighbours; a value that bf16 has stays."""
    n = 20_000
    for x in (1.001, -0.3, 3e-5, 1.0, 0.0, -math.inf):
        got = rounded(torch.full((n,), x), 0, key=77)
        assert torch.equal(got, got.bfloat16().float())
        assert len(got.unique()) == (1 if x in (1.0, 0.0, -math.inf) else 2)
        if math.isfinite(x):
            gap = float(got.max() - got.min())
            assert float(got.double().mean()) == pytest.approx(x, abs=4 * gap / 2 / n**0.5 + 1e-12)


def test_random_numbers_are_those_of_place_and_key() -> None:
    x = torch.linspace(1, 2, 4096)
    one = rounded(x, 0, key=5)
    assert torch.equal(one[100:], rounded(x[100:], 100, key=5))
    for other in rounded(x, 1, key=5), rounded(x, 0, key=6), rounded(x, 2**31, key=5):
        differ = float((one != other).float().mean())
        assert 0.2 < differ < 0.45  # a third, for values anywhere between two neighbours
    keys = {Rates.of(0.1, 0.0, (0.9, 0.99), 1e-8, step, seed).key for step in range(1, 101) for seed in range(100)}
    assert len(keys) == 10_000
    assert max(keys) < 2**31


@devices
@pytest.mark.parametrize("bits", [32, 8])
def test_steps_too_small_for_bf16_add_up(bits: int, device: str) -> None:
    """Of 1e-4 beside 1, where the next number of bf16 is 0.996."""
    p = nn.Parameter(torch.ones(64, 128, dtype=BF16, device=device))
    optimizer = LeanAdamW([p], bits=bits)
    for _ in range(50):
        p.grad = torch.ones_like(p)
        optimizer.param_groups[0]["lr"] = 1e-4
        optimizer.step()
    assert float(p.detach().float().mean()) == pytest.approx(1 - 50e-4, abs=2e-4)


# --- the kernel


def kernel_and_formula(
    dtype: torch.dtype, bits: int, sizes: tuple[int, ...] = SIZES
) -> tuple[list[Tensor], list[Tensor], list[Averages], list[Averages], Callable[..., None]]:
    """Parameters and averages for either, and what takes a step with both."""
    table = pytest.importorskip("rwkv_peft.ops.triton.adam", reason="the package triton is not installed").Table
    sizes = tuple(n for n in sizes if bits == 32 or n >= 4096)
    mine, others = parameters(dtype, DEVICE, sizes), parameters(dtype, DEVICE, sizes)
    kept, its = ([averages_of(p, bits, paged=False) for p in ps] for ps in (mine, others))
    firsts, maps = [1000 * i for i in range(len(sizes))], quantisers(DEVICE)
    tensors = table(mine, kept, firsts)

    def step(number: int, skip: float = 0.0, skipped: int | None = None) -> None:
        rates = Rates.of(1e-2, 0.1, (0.9, 0.99), 1e-8, number, seed=9)
        for i, p in enumerate(mine):
            p.grad = None if i == skipped else random_like(p, 100 * number + i, spread=True)
        with torch.no_grad():
            tensors.step(rates, maps, torch.tensor(skip, device=DEVICE))
            for p, q, averages, first in zip(mine, others, its, firsts, strict=True):
                if p.grad is not None and not skip:
                    adamw(q, p.grad, averages, rates, maps, first)

    return mine, others, kept, its, step


@pytest.mark.parametrize("sizes", [SIZES, (4096, 8192)], ids=["any", "aligned"])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_kernel_is_its_formula(dtype: torch.dtype, bits: int, sizes: tuple[int, ...]) -> None:
    """With the same random numbers; of gradients that are elsewhere each time, and one of which is missing."""
    mine, others, kept, its, step = kernel_and_formula(dtype, bits, sizes)
    for number in range(1, 4):
        step(number, skipped=1 if number == 2 else None)
        for p, q, got, want in zip(mine, others, kept, its, strict=True):
            assert float((p != q).float().mean()) < (1e-3 if dtype == BF16 else 1)  # one rounded the other way
            assert difference(p, q) < (1e-2 if dtype == BF16 else 1e-6)
            for name in want:
                if bits == 8 and want[name].dtype == torch.uint8:
                    off = (got[name].int() - want[name].int()).abs()
                    assert off.max() <= 1
                    assert off.float().mean() < 1e-3
                else:
                    assert difference(got[name], want[name]) < 1e-6


def test_the_kernel_can_be_told_not_to_step() -> None:
    mine, _, kept, _, step = kernel_and_formula(BF16, 8)
    step(1)
    before = [x.clone() for x in (*mine, *(a for averages in kept for a in averages.values()))]
    step(2, skip=1.0)
    after = [*mine, *(a for averages in kept for a in averages.values())]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


# --- the optimiser


@devices
@pytest.mark.parametrize("bits", [32, 8])
def test_a_number_tells_it_not_to_step(bits: int, device: str) -> None:
    ps = parameters(BF16, device)
    optimizer = LeanAdamW(ps, bits=bits)
    assert Guard(optimizer, torch.device(device)).waits == (device == "cpu")
    take_steps(optimizer, range(1))
    before = [p.detach().clone() for p in ps]
    optimizer.found_inf = torch.ones((), device=device)
    take_steps(optimizer, range(1, 2))
    assert all(torch.equal(p, was) for p, was in zip(ps, before, strict=True))
    optimizer.found_inf = torch.zeros((), device=device)
    take_steps(optimizer, range(1, 2))
    assert not any(torch.equal(p, was) for p, was in zip(ps, before, strict=True) if p.numel() > 1)


@devices
def test_runs_repeat_by_their_seed(device: str) -> None:
    """Torch's, when the optimiser is made."""

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        ps = parameters(BF16, device)
        optimizer = LeanAdamW(ps)
        torch.manual_seed(0)
        take_steps(optimizer, range(3))
        return ps

    one, same, other = run(1), run(1), run(2)
    assert all(torch.equal(p, q) for p, q in zip(one, same, strict=True))
    assert not torch.equal(one[-1], other[-1])


def test_state_of_other_settings_is_refused() -> None:
    eight, plain = LeanAdamW(parameters(FP32), bits=8), LeanAdamW(parameters(FP32))
    before = [x.clone() for x in plain.state[next(plain.parameters())].values()]
    message = "the optimiser's state of parameter 3 has another form; load it with its --optim"
    with pytest.raises(ConfigError, match=message):
        plain.load_state_dict(eight.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, plain.state[next(plain.parameters())].values(), strict=True))
