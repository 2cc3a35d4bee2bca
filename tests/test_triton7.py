"""RWKV-7's operator as Triton kernels, against the float64 recurrence."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv_peft.ops import chunks, reference

triton7 = pytest.importorskip("rwkv_peft.ops.triton.wkv7", reason="the package triton is not installed")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from rwkv_peft.ops.triton.common import dot, dot_unrounded, product_kind  # noqa: E402

INTERPRETED = not torch.cuda.is_available()  # conftest.py sees to it
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
NAMES = ("r", "w", "k", "v", "kk", "iclr", "initial_state")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LIMITS = {FP32: 2e-6 if INTERPRETED else 1e-4, BF16: 6e-3, FP16: 6e-3}  # a GPU's float32 products are of tf32 parts


@pytest.fixture(autouse=True)
def to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter round to bf16 as a GPU does; it cuts off, which gives all errors the same sign."""
    if not INTERPRETED:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    cut_off = interpreter._convert_float

    def convert(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if (str(source), str(target)) == ("fp32", "bf16"):
            return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()
        return cut_off(x, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


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


def make(B: int, T: int, H: int, N: int = 64, documents: int | None = None) -> list[Tensor]:
    """r, w, k, v, kk, iclr and the initial state in float64, as a model makes them, with decays of all kinds."""
    torch.manual_seed(T)
    r, w, k, v, kk, iclr = torch.randn(6, B, T, H, N, dtype=torch.float64)
    w, kk = -F.softplus(-(2 * w - 2)) - 0.5, F.normalize(kk, dim=-1)
    state = torch.randn(documents or B, H, N, N, dtype=torch.float64)
    return [r, w, k, v, kk, torch.sigmoid(iclr), state]


def to(dtype: torch.dtype, inputs: list[Tensor]) -> list[Tensor]:
    """The state stays float32."""
    return [x.to(DEVICE, FP32 if i == 6 else dtype) for i, x in enumerate(inputs)]


def weights(*results: Tensor) -> list[Tensor]:
    """Of one random linear function of the results."""
    random = torch.Generator().manual_seed(3)
    return [torch.randn(x.shape, generator=random).bfloat16().to(x) for x in results]


def results(wkv: Callable[..., Any], inputs: list[Tensor], cu_seqlens: Tensor | None = None) -> dict[str, Tensor]:
    """y, the final state, and the gradients of one random linear function of both."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y, final = wkv(*leaves, *([None] if len(leaves) == 6 else []), cu_seqlens)
    gradients = torch.autograd.grad((y, final), leaves, weights(y, final))
    assert all(g.dtype == x.dtype for g, x in zip(gradients, leaves, strict=True))
    return {"y": y.detach(), "final_state": final.detach(), **dict(zip(NAMES, gradients, strict=False))}


def relative(got: Tensor, want: Tensor) -> float:
    error, size = float((got.double().cpu() - want.cpu()).norm()), float(want.norm())
    assert not math.isnan(error)
    return error / size if size else error


def errors_of(dtype: torch.dtype, inputs: list[Tensor], cu_seqlens: Tensor | None = None) -> dict[str, float]:
    """Relative L2 errors of y, the final state and every gradient."""
    cast = to(dtype, inputs)
    got = results(triton7.wkv7, cast, cu_seqlens)
    assert (got["y"].dtype, got["final_state"].dtype) == (dtype, FP32)
    want = results(reference.wkv7, [x.double().cpu() for x in cast], cu_seqlens)
    return {name: relative(got[name], want[name]) for name in want}


def compare(dtype: torch.dtype, inputs: list[Tensor], cu_seqlens: Tensor | None = None) -> None:
    errors = errors_of(dtype, inputs, cu_seqlens)
    assert max(errors.values()) <= LIMITS[dtype], list(errors.values())


@pytest.mark.parametrize("T", [1, 15, 16, 17, 33, 65])
def test_any_length(T: int) -> None:
    compare(FP32, make(1, T, 2))


def test_rows_side_by_side() -> None:
    compare(FP32, make(3, 18, 2))


@pytest.mark.parametrize("T", [15, 64, 130])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_half_precision(dtype: torch.dtype, T: int) -> None:
    compare(dtype, make(1, T, 1))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_documents_of_which_some_are_empty(dtype: torch.dtype) -> None:
    compare(dtype, make(1, 80, 2, documents=6), torch.tensor([0, 0, 3, 68, 68, 80, 80]))


@pytest.mark.parametrize("T", [1, 70])
def test_one_document_is_a_row(T: int) -> None:
    """Also of one token, which without offsets is left to the recurrence."""
    compare(FP32, make(1, T, 1, documents=1), torch.tensor([0, T]))


def test_chunks_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As offsets that lie on a GPU give them."""
    monkeypatch.setattr(triton7, "table", lambda bounds, B, T, C, device: chunks._on_device(bounds.to(device), T, C))
    compare(FP32, make(1, 70, 1, documents=3), torch.tensor([0, 5, 5, 70]))


@pytest.mark.parametrize("C", [16, 64])
@pytest.mark.parametrize(
    "bounds", [[0, 1], [0, 64], [0, 200], [0, 0, 3, 68, 68, 80, 80], list(range(0, 131, 5)), [0, 16, 32, 64]], ids=str
)  # fmt: skip
def test_the_table_made_on_a_device_is_the_known_one(bounds: list[int], C: int) -> None:
    """Apart from entries to spare, which come last and hold no token."""
    offsets = torch.tensor(bounds, dtype=torch.int32)
    known = chunks.table(offsets, 1, bounds[-1], C, torch.device("cpu"))
    made = chunks._on_device(offsets, bounds[-1], C)
    G = known.chunks
    assert made.chunks == bounds[-1] // C + len(bounds) - 1 >= G  # known from the shapes alone
    assert made.start[:G].tolist() == known.start.tolist()
    assert made.length.tolist() == known.length.tolist() + [0] * (made.chunks - G)
    used = known.counts > 0
    assert made.counts.tolist() == known.counts.tolist()
    assert made.first[used].tolist() == known.first[used].tolist()
    assert {x.dtype for x in (*made, *known)} == {torch.int32}
    assert sum(known.length.tolist()) == bounds[-1] == sum(end - start for start, end in pairwise(bounds))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("w", [-0.5, -20.0], ids=["strongest", "hardly any"])
def test_one_extreme_of_decay(w: float, dtype: torch.dtype) -> None:
    inputs = make(1, 70, 1)
    inputs[1].fill_(w)
    compare(dtype, inputs)


def test_both_extremes_of_decay_in_turn() -> None:
    inputs = make(1, 70, 1)
    inputs[1] = torch.where(torch.rand_like(inputs[1]) < 0.5, -0.5, -20.0)
    compare(FP32, inputs)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("w", [-0.5, -8.0])
def test_the_same_token_again_and_again(w: float, dtype: torch.dtype) -> None:
    """Equal keys with iclr near 1: the system that is solved in a chunk is as far from the identity as it can be.

    What one token writes, the next one removes, so that errors of all tokens, which are alike, add up beside a small
    result. No result may be further off than twice what the same rounding of the inputs does to the worst of them.
    """
    inputs = make(1, 70, 1)
    inputs[4] = F.normalize(inputs[2], dim=-1)  # the removal key comes from the key
    for i in (0, 2, 3, 4):
        inputs[i] = inputs[i][:, :1].expand_as(inputs[i]).contiguous()
    inputs[1].fill_(w)
    inputs[5].fill_(0.99)
    inputs = [x.double().cpu() for x in to(dtype, inputs)]
    want = results(reference.wkv7, inputs)
    rounding = 2**-9 if dtype == BF16 else 2**-24
    moved = results(reference.wkv7, [x * (1 + rounding * torch.randn_like(x[:, :1])) for x in inputs])
    errors = errors_of(dtype, inputs)
    limit = max(LIMITS[dtype], 2 * max(relative(moved[name], want[name]) for name in want))
    assert max(errors.values()) <= limit, (errors, limit)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_heads_of_128(dtype: torch.dtype) -> None:
    compare(dtype, make(1, 37, 1, N=128))


def test_without_an_initial_state() -> None:
    compare(FP32, make(2, 20, 1)[:6])


@pytest.mark.parametrize("asked", [0, 1], ids=["y", "final_state"])
def test_the_gradient_of_one_result_alone(asked: int) -> None:
    inputs = make(1, 33, 1)

    def gradients(wkv: Callable[..., Any], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        found = wkv(*leaves)[asked]
        return torch.autograd.grad(found, leaves, weights(found), materialize_grads=True)

    got, want = gradients(triton7.wkv7, to(FP32, inputs)), gradients(reference.wkv7, inputs)
    errors = {name: relative(g, w) for name, g, w in zip(NAMES, got, want, strict=True)}
    assert max(errors.values()) <= LIMITS[FP32], errors
    assert float(got[0].abs().max()) == 0 if asked else float(got[0].abs().max()) > 0  # r reads, and writes nothing


def test_a_second_backward_pass_gives_the_same() -> None:
    leaves = [x.requires_grad_() for x in to(BF16, make(1, 70, 1))]
    y, final = triton7.wkv7(*leaves)
    dy = weights(y, final)
    first = torch.autograd.grad((y, final), leaves, dy, retain_graph=True)
    second = torch.autograd.grad((y, final), leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_refused() -> None:
    leaves = [x.requires_grad_() for x in to(FP32, make(1, 5, 1))]
    with pytest.raises(RuntimeError, match="second derivatives; choose --op torch"):
        torch.autograd.grad(triton7.wkv7(*leaves)[0].sum(), leaves, create_graph=True)


def test_under_a_checkpoint() -> None:
    inputs = to(BF16, make(1, 70, 1))
    plain = results(triton7.wkv7, inputs)
    again = results(lambda *args: checkpoint(triton7.wkv7, *args, use_reentrant=False), inputs)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_without_gradients_nothing_is_kept() -> None:
    inputs = to(FP32, make(1, 40, 1))
    y, final = triton7.wkv7(*inputs)
    assert not y.requires_grad
    assert triton7.wkv7_forward(*inputs, None, keep=False)[2] is None
    want = triton7.wkv7_forward(*inputs, None, keep=True)
    assert torch.equal(y, want[0])
    assert torch.equal(final, want[1])


def test_gradients_that_are_added_to_others() -> None:
    """As `core7` has them of r, k and v."""
    inputs = to(FP32, make(1, 40, 1))
    y, final, saved = triton7.wkv7_forward(*inputs, None, keep=True)
    dy, dfinal = weights(y, final)
    alone = triton7.wkv7_backward(saved, *inputs[:6], dy, dfinal)
    others = [torch.randn_like(y) for _ in range(3)]
    added = triton7.wkv7_backward(saved, *inputs[:6], dy, dfinal, *(x.clone() for x in others))
    for i, other in zip((0, 2, 3), others, strict=True):
        assert relative(added[i], (alone[i] + other).double()) <= 1e-6
    assert all(torch.equal(alone[i], added[i]) for i in (1, 4, 5, 6))


@pytest.mark.parametrize("cut", [16, 21])
def test_a_state_goes_on_where_another_call_stopped(cut: int) -> None:
    *tokens, state = to(FP32, make(1, 50, 1))
    whole, final = triton7.wkv7(*tokens, state)
    first, between = triton7.wkv7(*(x[:, :cut] for x in tokens), state)
    second, last = triton7.wkv7(*(x[:, cut:] for x in tokens), between)
    assert relative(torch.cat((first, second), 1), whole.double()) <= LIMITS[FP32]
    assert relative(last, final.double()) <= LIMITS[FP32]


def test_a_table_made_on_the_device_follows_its_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once for all layers, anew where the offsets have been changed in place."""

    class OnDevice(torch.Tensor):
        device = torch.device("meta")  # any but the CPU

    calls: list[list[int]] = []

    def make(bounds: Tensor, T: int, C: int) -> object:
        calls.append(bounds.as_subclass(torch.Tensor).tolist())
        return object()

    monkeypatch.setattr(chunks, "_on_device", make)
    offsets = torch.tensor([0, 70, 100]).as_subclass(OnDevice)
    first = chunks.table(offsets, 1, 100, 64, torch.device("cpu"))
    assert chunks.table(offsets, 1, 100, 64, torch.device("cpu")) is first
    offsets[1] = 30
    assert chunks.table(offsets, 1, 100, 64, torch.device("cpu")) is not first
    assert calls == [[0, 70, 100], [0, 30, 100]]


@triton.jit
def products(a, b, rounded, unrounded, KIND: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(rounded + at, dot(x, y, KIND))
    tl.store(unrounded + at, dot_unrounded(x, y, KIND))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_factor_that_keeps_what_bf16_leaves_out(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16, device=DEVICE)
    b = b.bfloat16().float()
    rounded, unrounded = torch.empty_like(a), torch.empty_like(a)
    products[(1,)](a, b, rounded, unrounded, product_kind(dtype))
    want = a.double() @ b.double()
    assert relative(unrounded, want.cpu()) <= 2e-5
    assert (relative(rounded, want.cpu()) <= 2e-5) == (dtype == FP32)
