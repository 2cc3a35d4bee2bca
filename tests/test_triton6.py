"""RWKV-6's and RWKV-5's operators as Triton kernels, against the float64 recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_peft.ops import chunks, reference

triton6 = pytest.importorskip("rwkv_peft.ops.triton.wkv6", reason="the package triton is not installed")

INTERPRETED = not torch.cuda.is_available()  # conftest.py sees to it
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
NAMES = ("r", "w", "k", "v", "u", "initial_state")
# the interpreter cuts bf16 off where a GPU rounds to nearest, which doubles each error and gives all the same sign
LIMITS = {torch.float32: 1e-5 if INTERPRETED else 1e-4, torch.bfloat16: 1.5e-2 if INTERPRETED else 5e-3}
LIMITS[torch.float16] = LIMITS[torch.bfloat16]

versions = pytest.mark.parametrize("version", [5, 6])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that is not written to holds NaN."""

    def nan(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return filled

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", nan(torch.empty))
        patch.setattr(torch, "empty_like", nan(torch.empty_like))
        patch.setattr(Tensor, "new_empty", nan(Tensor.new_empty))
        yield


def make(version: int, B: int, T: int, H: int, N: int = 64, documents: int | None = None) -> list[Tensor]:
    """r, w, k, v, u and the initial state in float64, at scales near a trained model's; decays of all kinds."""
    torch.manual_seed(T)
    r, w, k, v = torch.randn(4, B, T, H, N, dtype=torch.float64)
    w = 2.5 * w - 2  # from no decay worth the name to exp(-exp(5))
    state = torch.randn(documents or B, H, N, N, dtype=torch.float64)
    return [r, w if version == 6 else w[0, 0].clone(), k, v, torch.randn(H, N, dtype=torch.float64), state]


def results(wkv: Callable[..., Any], inputs: list[Tensor], cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    """y, the final state, and the gradients of one random linear function of both."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y, final = wkv(*leaves, cu_seqlens)
    random = torch.Generator().manual_seed(3)
    dy, dfinal = (torch.randn(x.shape, generator=random).bfloat16().to(x) for x in (y, final))
    gradients = torch.autograd.grad((y, final), leaves, (dy, dfinal))
    assert all(g.dtype == x.dtype for g, x in zip(gradients, leaves, strict=True))
    return {"y": y.detach(), "final_state": final.detach(), **dict(zip(NAMES, gradients, strict=False))}


def compare(
    version: int, inputs: list[Tensor], dtypes: list[torch.dtype], cu_seqlens: Tensor | None = None, limit: float = 0.0
) -> None:
    """Relative L2 errors of y, the final state and every gradient; the last dtypes are those of u and the state."""
    cast = [x.to(DEVICE, dtype) for x, dtype in zip(inputs, dtypes, strict=True)]
    got = results(getattr(triton6, f"wkv{version}"), cast, cu_seqlens)
    want = results(getattr(reference, f"wkv{version}"), [x.double().cpu() for x in cast], cu_seqlens)
    assert got["y"].dtype == dtypes[0]
    assert got["final_state"].dtype == torch.float32
    errors = {name: relative(got[name].cpu(), want[name]) for name in want}
    assert max(errors.values()) <= (limit or LIMITS[dtypes[0]]), errors


def relative(got: Tensor, want: Tensor) -> float:
    error, size = float((got.double() - want).norm()), float(want.norm())
    assert not math.isnan(error)
    return error / size if size else error


def of(dtype: torch.dtype, inputs: list[Tensor]) -> list[torch.dtype]:
    return [dtype] * (len(inputs) - 1) + [torch.float32]


@versions
@pytest.mark.parametrize("T", [1, 15, 16, 17, 65])
def test_any_length(version: int, T: int) -> None:
    inputs = make(version, 1, T, 2)
    compare(version, inputs, of(torch.float32, inputs))


@versions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(version: int, dtype: torch.dtype) -> None:
    inputs = make(version, 2, 80, 1)
    compare(version, inputs, of(dtype, inputs))


@versions
def test_w_and_u_may_be_float32_beside_bfloat16(version: int) -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    compare(version, make(version, 1, 20, 1), [bf16, fp32, bf16, bf16, fp32, bf16])


@versions
def test_documents_of_which_some_are_empty(version: int) -> None:
    cu_seqlens = torch.tensor([0, 0, 3, 68, 68, 80, 80])
    inputs = make(version, 1, 80, 2, documents=6)
    compare(version, inputs, of(torch.float32, inputs), cu_seqlens)


@versions
def test_chunks_to_spare(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As offsets that lie on a GPU give them."""
    cu_seqlens = torch.tensor([0, 5, 5, 70])
    monkeypatch.setattr(triton6, "table", lambda bounds, B, T, C, device: chunks._on_device(bounds.to(device), T, C))
    inputs = make(version, 1, 70, 1, documents=3)
    compare(version, inputs, of(torch.float32, inputs), cu_seqlens)


@versions
@pytest.mark.parametrize("w", [-20.0, 3.0, 4.0, 30.0], ids="w={}".format)
def test_one_extreme_of_decay(version: int, w: float) -> None:
    """From w = 20 on a decay is 0, and so is the gradient of w; at 4, 2e-24, it is compared by its own size."""
    inputs = make(version, 1, 70, 1)
    inputs[1].fill_(w)
    compare(version, inputs, of(torch.float32, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_extremes_of_decay_in_turn(dtype: torch.dtype) -> None:
    """A decay of 0 beside decays of 1 takes nothing from sums over other tokens."""
    inputs = make(6, 1, 70, 1)
    inputs[1] = torch.where(torch.rand_like(inputs[1]) < 0.1, 25.0, -8.0)
    compare(6, inputs, of(dtype, inputs))


@versions
def test_heads_of_128(version: int) -> None:
    inputs = make(version, 1, 66, 1, N=128)
    compare(version, inputs, of(torch.float32, inputs))


@versions
def test_without_a_state_and_without_a_gradient_of_the_final_one(version: int) -> None:
    inputs = make(version, 1, 20, 1)[:5]
    compare(version, inputs, [torch.float32] * 5)
    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in inputs]
    getattr(triton6, f"wkv{version}")(*leaves)[0].sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in leaves if x.grad is not None)


def test_a_state_goes_on_where_another_call_stopped() -> None:
    inputs = [x.to(DEVICE, torch.float32) for x in make(6, 1, 50, 1)]
    *tokens, u, state = inputs
    whole, final = triton6.wkv6(*tokens, u, state)
    first, between = triton6.wkv6(*(x[:, :21] for x in tokens), u, state)
    second, last = triton6.wkv6(*(x[:, 21:] for x in tokens), u, between)
    assert relative(torch.cat((first, second), 1), whole.double()) < LIMITS[torch.float32]
    assert relative(last, final.double()) < LIMITS[torch.float32]
