"""RWKV-7's time-mix around its operator, as Triton kernels, against its formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from rwkv_peft.models.layers import Documents
from rwkv_peft.ops import chunked7, pieces, reference
from rwkv_peft.ops.raw import Raw, Saved

core7 = pytest.importorskip("rwkv_peft.ops.triton.core7", reason="the package triton is not installed")

INTERPRETED = not torch.cuda.is_available()  # conftest.py sees to it
DEVICE = "cpu" if INTERPRETED else "cuda"
NAMES = ["r", "k", "v", "w_low", "a_low", "v_low", "gate", "v_first"]
Case = dict[str, Tensor]


def raw_forward(*args: Any) -> tuple[Tensor, Tensor, Saved | None]:
    """An operator's raw forward, from the one for any device; its backward writes over what is saved."""
    *inputs, state, cu_seqlens, keep = args
    assert all(x.is_contiguous() for x in inputs)
    y, final = chunked7.wkv7(*inputs, state, cu_seqlens)
    return y, final, Saved((torch.ones(()),), (state, cu_seqlens)) if keep else None


def raw_backward(saved: Saved, *args: Any) -> tuple[Tensor | None, ...]:
    *inputs, dy, dfinal, dr, dk, dv = args
    (buffer,), (state, cu_seqlens) = saved
    inputs = [x.detach().requires_grad_() for x in inputs]
    start = None if state is None else state.detach().requires_grad_()
    with torch.enable_grad():
        y, final = chunked7.wkv7(*inputs, start, cu_seqlens)
        total = (y * (dy * buffer)).sum() + (0.0 if dfinal is None else (final * dfinal).sum())
    found = torch.autograd.grad(total, [*inputs, *([] if start is None else [start])])
    buffer.data.fill_(float("nan"))  # unseen by autograd, as a kernel does it
    r, w, k, v, kk, iclr = (g.to(dy.dtype) for g in found[:6])
    return dr.add_(r), w, dk.add_(k), dv.add_(v), kk, iclr, found[6] if start is not None else None


RAW = Raw(raw_forward, raw_backward)


def formula(x: Case, first: bool, cu_seqlens: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What core7 computes, written on its own."""
    H, N = x["r_k"].shape
    heads = partial(torch.Tensor.unflatten, dim=-1, sizes=(H, N))
    w = -F.softplus(-(x["w0"] + x["w_low"])) - 0.5
    iclr = torch.sigmoid(x["a0"] + x["a_low"])
    v, v_first = x["v"], x["v"] if first else x["v_first"]
    if not first:
        v = v + (v_first - v) * torch.sigmoid(x["v0"] + x["v_low"])
    kk = F.normalize(heads(x["k"] * x["k_k"]), dim=-1)
    k = x["k"] * (1 + (iclr - 1) * x["k_a"])
    r, w, k, v, iclr = (heads(t) for t in (x["r"], w, k, v, iclr))
    y, state = reference.wkv7(r, w, k, v, kk, iclr, x.get("state"), cu_seqlens)
    normal = F.group_norm(y.flatten(0, 1).flatten(1), H, x["weight"], x["bias"], eps).view_as(x["r"])
    bonus = (r * k * x["r_k"]).sum(-1, keepdim=True) * v
    return (normal + bonus.flatten(2)) * x["gate"], state, v_first


def make(B: int, T: int, H: int, N: int, S: int, seed: int = 0) -> Case:
    """Random inputs at scales near a trained model's, float32."""
    g = torch.Generator().manual_seed(seed)
    D = H * N
    rand = partial(torch.randn, generator=g)
    x = {name: rand(B, T, D) for name in NAMES}
    x |= {name: rand(1, 1, D) for name in ("a0", "v0")} | {"w0": rand(1, 1, D) * 2 - 2, "k_k": 0.85 + 0.1 * rand(D)}
    x |= {"k_a": 1 + 0.1 * rand(1, 1, D), "r_k": rand(H, N) * 0.1, "weight": 1 + 0.1 * rand(D), "bias": 0.1 * rand(D)}
    x["state"] = rand(S, H, N, N)
    x["k"][0, 0] = 0.0  # nothing to normalise there
    return {name: t.to(DEVICE) for name, t in x.items()}


def gradients(
    run: Callable[[Case], tuple[Tensor, ...]], x: Case, train: set[str], weights: list[Tensor | None]
) -> tuple[list[Tensor], Case]:
    """The results and the gradients of those inputs that train, for a weighted sum of the results."""
    x = {name: t.detach().clone().requires_grad_(name in train) for name, t in x.items()}
    results = run(x)
    pairs = zip(results, weights, strict=True)
    total = sum((y.double() * w.double()).sum() for y, w in pairs if w is not None)
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, [x[name] for name in sorted(train)], allow_unused=True)
    return [y.detach() for y in results], {n: g for n, g in zip(sorted(train), found, strict=True) if g is not None}


def fused(x: Case, first: bool, cu_seqlens: Tensor | None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    H, N = x["r_k"].shape
    ln_x = pieces.GroupNorm(H, H * N, eps=64e-5)
    # the tensors themselves, so that gradients reach them
    del ln_x.weight, ln_x.bias
    ln_x.weight, ln_x.bias = x["weight"], x["bias"]  # type: ignore[assignment]
    vectors = pieces.Vectors7(*(x[name] for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k")))
    tensors = [None if first and name == "v_low" else x[name] for name in NAMES]
    documents = Documents(torch.zeros(x["r"].shape[:2], dtype=torch.long, device=DEVICE), cu_seqlens)
    operator = {"raw": RAW} | options
    return core7.core7(  # type: ignore[no-any-return]
        chunked7.wkv7, *tensors, vectors, ln_x, x.get("state"), documents, **operator
    )


def compare(
    x: Case,
    train: set[str],
    first: bool = False,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    limit: float = 1e-5,
    weighted: str = "out state v_first",
    **options: Any,
) -> None:
    """The fused function in `dtype` against the formula in float64: every result and every gradient, relative L2."""
    x = {name: t.to(dtype) if name in NAMES else t for name, t in x.items()}
    exact = {name: t.double() for name, t in x.items()}
    with torch.no_grad():
        shapes = [t.shape for t in formula(exact, first, cu_seqlens, 64e-5)]
    g = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(shape, generator=g).to(DEVICE) if name in weighted.split() else None
        for name, shape in zip(("out", "state", "v_first"), shapes, strict=True)
    ]
    results, got = gradients(lambda x: fused(x, first, cu_seqlens, **options), x, train, weights)
    wanted_results, want = gradients(lambda x: formula(x, first, cu_seqlens, 64e-5), exact, train, weights)
    assert got.keys() == want.keys()
    pairs = dict(zip(("out", "final", "first"), zip(results, wanted_results, strict=True), strict=True))
    pairs |= {f"d{name}": (got[name], want[name]) for name in got}
    for name, (a, b) in pairs.items():
        assert a.shape == b.shape, name
        assert not name.startswith("d") or a.dtype == x[name[1:]].dtype, name
        error = float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
        assert error < limit, (name, error)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is allocated holds NaN, so that anything not written shows."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def allocate(*args: Any, _real: Any = real, **kwargs: Any) -> Tensor:
            made: Tensor = _real(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(core7.torch, name, allocate)
    yield


EVERYTHING = {*NAMES, "w0", "a0", "v0", "k_k", "k_a", "r_k", "weight", "bias", "state"}


@pytest.mark.parametrize(("B", "T", "H", "N"), [(2, 17, 2, 64), (1, 1, 3, 64), (1, 5, 4, 128)])
def test_every_result_and_gradient(B: int, T: int, H: int, N: int) -> None:
    compare(make(B, T, H, N, B), EVERYTHING)


def test_first_layer_takes_its_own_values() -> None:
    compare(make(2, 6, 2, 64, 2), EVERYTHING - {"v_low", "v0", "v_first"}, first=True)


STATE_HEARS = {"k", "v", "w_low", "a_low", "v_low", "v_first"}  # what the state depends on


@pytest.mark.parametrize(
    ("weighted", "train"),
    [("out", set(NAMES)), ("state", STATE_HEARS), ("out state", set(NAMES))],
    ids=["out", "state", "both"],
)
def test_results_that_nobody_uses(weighted: str, train: set[str]) -> None:
    x = make(1, 6, 2, 64, 1)
    compare(x, train, weighted=weighted)
    compare(x, train - {"v_low", "v_first"}, first=True, weighted=weighted)


@pytest.mark.parametrize(
    "train", [set(NAMES), {"state"}, {"r", "k_a"}, {"gate", "weight", "bias"}, {"v", "w0", "r_k", "v0"}], ids=sorted
)
def test_only_what_trains_has_a_gradient(train: set[str]) -> None:
    compare(make(1, 6, 2, 64, 1), train)


def test_programs_that_walk_over_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core7, "PROGRAMS", 1)
    compare(make(1, 45, 4, 64, 1), EVERYTHING)  # 12 tiles of 4 tokens, the last of one token
    monkeypatch.setattr(core7, "MOST_TILES", 3)
    compare(make(1, 45, 4, 64, 1), EVERYTHING)


def test_documents() -> None:
    compare(make(1, 17, 2, 64, 4), EVERYTHING, cu_seqlens=torch.tensor([0, 5, 5, 6, 17]))


def test_what_was_prepared_may_be_kept() -> None:
    compare(make(2, 6, 2, 64, 2), EVERYTHING, keep_prepared=True)
    compare(make(2, 6, 2, 64, 2), {"k", "v", "state"}, first=True, keep_prepared=True)


def test_without_a_state() -> None:
    x = make(1, 6, 2, 64, 1)
    del x["state"]
    compare(x, EVERYTHING - {"state"})


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter: 1 / (1 + inf) is meant
def test_extremes_of_decay_and_saturated_sigmoids() -> None:
    x = make(1, 9, 2, 64, 1)
    for name in ("w_low", "a_low", "v_low"):
        x[name] = x[name] * 30
    compare(x, EVERYTHING, limit=2e-5)


def test_bfloat16() -> None:
    """Vectors stay float32; float64 has the same rounded inputs. The interpreter cuts bits off where a GPU rounds."""
    compare(make(2, 17, 2, 64, 2), EVERYTHING, dtype=torch.bfloat16, limit=1.5e-2 if INTERPRETED else 7e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_the_operator_of_triton(dtype: torch.dtype) -> None:
    limit = 1e-4 if dtype == torch.float32 else 3e-2 if INTERPRETED else 1.5e-2
    compare(make(2, 65, 1, 64, 2), EVERYTHING, dtype=dtype, limit=limit, raw=None)


def test_backward_twice() -> None:
    x = {n: t.requires_grad_() for n, t in make(1, 5, 2, 64, 1).items()}
    for raw in (RAW, None):
        out, *_ = fused(x, False, None, raw=raw)
        first, second = (torch.autograd.grad(out.sum(), list(x.values()), retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_checkpointing_computes_it_again() -> None:
    x = {n: t.requires_grad_() for n, t in make(1, 5, 2, 64, 1).items()}
    kept = []

    def run() -> Tensor:
        out, _, v_first = fused(x, False, None)
        return out.sum() + (v_first * v_first).sum()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        again = torch.utils.checkpoint.checkpoint(run, use_reentrant=False)
    assert not kept
    want = torch.autograd.grad(run(), list(x.values()))
    got = torch.autograd.grad(again, list(x.values()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_without_gradients_nothing_is_kept() -> None:
    seen = []

    def forward(*args: Any) -> Any:
        seen.append(args[-1])
        return raw_forward(*args)

    raw = Raw(forward, raw_backward)
    x = make(1, 5, 2, 64, 1)
    fused(x, False, None, raw=raw)
    with torch.no_grad():
        fused({n: t.requires_grad_() for n, t in x.items()}, False, None, raw=raw)
    fused(x, False, None, raw=raw)
    assert seen == [False, False, True]


@pytest.mark.parametrize("first", [True, False])
def test_first_values_that_do_not_train_stay_so(first: bool) -> None:
    x = make(1, 4, 2, 64, 1)
    x["state"].requires_grad_()
    out, _, v_first = fused(x, first, None)
    assert out.requires_grad and not v_first.requires_grad
    compare(x, {"state"}, first=first)


def test_layers_in_a_row_share_the_first_values() -> None:
    """The gradient of v_first gathers over three layers as it does in the plain formula."""
    layers = [make(1, 6, 2, 64, 1, seed) for seed in range(3)]

    def stack(run: Callable[..., Any], v: Tensor, to: Callable[[Tensor], Tensor]) -> Tensor:
        out, v_first = v, v
        for i, layer in enumerate(layers):
            x = {n: to(t) for n, t in layer.items()} | {"v": out, "v_first": v_first}
            out, _, v_first = run(x, i == 0)
        return torch.autograd.grad(out.sum(), v)[0]

    v = layers[0]["v"]
    got = stack(lambda x, first: fused(x, first, None), v.clone().requires_grad_(), Tensor.float)
    want = stack(lambda x, first: formula(x, first, None, 64e-5), v.double().requires_grad_(), Tensor.double)
    assert float((got - want).norm() / want.norm()) < 2e-5


class _Wrapped(nn.Module):
    """A normalisation as another library may wrap it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)  # type: ignore[no-any-return]


def test_what_the_kernels_do_not_know_takes_the_plain_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(core7._Plan, "launch", never)
    x = {n: t.double() for n, t in make(1, 4, 2, 64, 1).items()}
    compare_exactly(x, pieces.GroupNorm(2, 128, eps=64e-5).double())
    x = make(1, 4, 4, 32, 1)
    compare_exactly(x, pieces.GroupNorm(4, 128, eps=64e-5))
    x = make(1, 4, 2, 64, 1)
    compare_exactly(x, _Wrapped(pieces.GroupNorm(2, 128, eps=64e-5)))


def compare_exactly(x: Case, ln_x: nn.Module) -> None:
    vectors = pieces.Vectors7(*(x[name] for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k")))
    documents = Documents(torch.zeros(x["r"].shape[:2], dtype=torch.long, device=DEVICE), None)
    args = (chunked7.wkv7, *(x[name] for name in NAMES), vectors, ln_x.to(DEVICE), x["state"], documents)
    for a, b in zip(core7.core7(*args, raw=RAW), pieces.core7(*args), strict=True):  # type: ignore[arg-type]
        assert torch.equal(a, b)
