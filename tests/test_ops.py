"""The operators: every backend that runs here against the float64 recurrence, and the loss against its formula."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import difference
from rwkv_peft import ops
from rwkv_peft.errors import ConfigError
from rwkv_peft.ops import BACKENDS, chunked6, chunked7, reference

CPU = torch.device("cpu")
WEAKEST = -20.0  # w of hardly any decay
STRONGEST = {5: 3.0, 6: 3.0, 7: -0.5}  # RWKV-7 cannot go beyond 0.545 a token; RWKV-5 and 6 have no bound: 2e-9
INPUTS = {5: ("r", "w", "k", "v", "u"), 6: ("r", "w", "k", "v", "u"), 7: ("r", "w", "k", "v", "kk", "iclr")}
CHUNKED = {5: chunked6, 6: chunked6, 7: chunked7}

versions = pytest.mark.parametrize("version", INPUTS)
backends = pytest.mark.parametrize("name", [n for n, b in BACKENDS.items() if b.supports(CPU, 64) is None])


def operator(name: str, version: int) -> ops.Wkv:
    wkv: ops.Wkv = getattr(BACKENDS[name], f"wkv{version}")
    return wkv


def make_inputs(
    B: int, T: int, H: int, N: int, w: float | None = None, seed: int = 0, version: int = 7
) -> list[Tensor]:
    """The operator's inputs in float64 as a model makes them; `w` fixes the decay of every channel.

    Each is (B,T,H,N), except u of versions 5 and 6 and w of version 5, which are (H,N).
    """
    torch.manual_seed(seed)
    r, raw, k, v, kk, iclr = torch.randn(6, B, T, H, N, dtype=torch.float64)
    if version == 7:
        decay = -F.softplus(-(2 * raw - 2)) - 0.5 if w is None else torch.full_like(raw, w)
        return [r, decay, k, v, F.normalize(kk, dim=-1), torch.sigmoid(iclr)]
    decay = 2 * raw - 3 if w is None else torch.full_like(raw, w)
    return [r, decay if version == 6 else decay[0, 0].clone(), k, v, kk[0, 0].clone()]


def make_state(documents: int, H: int, N: int) -> Tensor:
    return torch.randn(documents, H, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def weights_of(*results: Tensor) -> list[Tensor]:
    """Of one random linear function of the results, whose gradients are compared."""
    random = torch.Generator().manual_seed(3)
    return [torch.randn(x.shape, dtype=torch.float64, generator=random).bfloat16().double() for x in results]


def results(
    wkv: ops.Wkv, inputs: list[Tensor], state: Tensor | None, cu_seqlens: Tensor | None = None
) -> dict[str, Tensor]:
    """Everything the operator gives: y, the final state and the gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    initial = None if state is None else state.detach().clone().requires_grad_()
    y, final = wkv(*leaves, initial, cu_seqlens)
    total = sum(
        (x * weight.to(x.dtype)).sum(dtype=torch.float64)
        for x, weight in zip((y, final), weights_of(y, final), strict=True)
    )
    asked = dict(zip(INPUTS[7] if len(leaves) == 6 else INPUTS[6], leaves, strict=True))
    if initial is not None:
        asked["initial_state"] = initial
    gradients = torch.autograd.grad(total, list(asked.values()))
    found = {f"gradient of {n}": g for n, g in zip(asked, gradients, strict=True)}
    return {"y": y.detach(), "final_state": final.detach(), **found}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    errors = {name: difference(got[name], want[name]) for name in want}
    assert max(errors.values()) <= tolerance, errors


def cast(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) for x in inputs]


# --- the definition


@pytest.mark.parametrize("version", [5, 6])
def test_reference_is_the_sum_over_pairs_of_tokens(version: int) -> None:
    """Token t reads token j < t through every decay between them, itself through u."""
    T, H, N = 6, 2, 4
    inputs, S = make_inputs(1, T, H, N, version=version), make_state(1, H, N)
    r, w, k, v, u = inputs
    decay = torch.exp(-torch.exp(w.expand_as(r)))[0]  # (T,H,N)
    for t in range(T + 1):
        held = torch.einsum("hvk,hk->hvk", S[0], decay[:t].prod(0))
        for j in range(t):
            held = held + torch.einsum("hv,hk->hvk", v[0, j], k[0, j] * decay[j + 1 : t].prod(0))
        if t < T:
            y, _ = operator("reference", version)(*inputs, S)
            read = held + torch.einsum("hv,hk->hvk", v[0, t], k[0, t] * u)
            torch.testing.assert_close(y[0, t], torch.einsum("hvk,hk->hv", read, r[0, t]))
    torch.testing.assert_close(operator("reference", version)(*inputs, S)[1][0], held)


# --- one row a document


@backends
@versions
@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 100])
def test_backend_is_the_recurrence_at_every_length(name: str, version: int, T: int, has_state: bool) -> None:
    inputs, state = make_inputs(2, T, 2, 32, version=version), make_state(2, 2, 32) if has_state else None
    want = results(operator("reference", version), inputs, state)
    assert_same(results(operator(name, version), inputs, state), want, 1e-11)
    state = None if state is None else state.float()
    got = results(operator(name, version), cast(inputs, torch.float32), state)
    assert {x.dtype for x in got.values()} == {torch.float32}
    assert_same(got, want, 1e-5)


@backends
@versions
@pytest.mark.parametrize(
    ("B", "T", "H", "N"), [(1, 40, 1, 64), (3, 33, 2, 64), (1, 20, 1, 128), (2, 37, 5, 32), (1, 50, 2, 8)]
)
def test_backend_is_the_recurrence_at_every_shape(name: str, version: int, B: int, T: int, H: int, N: int) -> None:
    inputs, state = make_inputs(B, T, H, N, version=version), make_state(B, H, N)
    got = results(operator(name, version), cast(inputs, torch.float32), state.float())
    assert_same(got, results(operator("reference", version), inputs, state), 1e-5)


@backends
@versions
@pytest.mark.parametrize("w", ["strongest", WEAKEST, -4.0, -8.0])
def test_extreme_decays_over_300_tokens(name: str, version: int, w: float | str) -> None:
    w = STRONGEST[version] if isinstance(w, str) else w
    inputs, state = make_inputs(1, 300, 1, 64, w, version=version), make_state(1, 1, 64)
    got = results(operator(name, version), cast(inputs, torch.float32), state.float())
    assert_same(got, results(operator("reference", version), inputs, state), 2e-5 if version == 7 else 1e-5)


@backends
@versions
def test_strongest_and_weakest_decay_beside_each_other(name: str, version: int) -> None:
    inputs, state = make_inputs(1, 130, 2, 64, version=version), make_state(1, 2, 64)
    inputs[1][..., ::2], inputs[1][..., 1::2] = STRONGEST[version], WEAKEST
    if version != 5:
        inputs[1][:, 60:70] = STRONGEST[version]
    got = results(operator(name, version), cast(inputs, torch.float32), state.float())
    assert_same(got, results(operator("reference", version), inputs, state), 2e-5 if version == 7 else 1e-5)


@backends
@pytest.mark.parametrize("rest", [-8.0, WEAKEST])
def test_decays_of_every_strength_within_a_chunk(name: str, rest: float) -> None:
    """exp(-exp(6)) and exp(-exp(100)) are 0: the state is forgotten, and what follows is as exact as before."""
    inputs, state = make_inputs(1, 300, 1, 64, rest, version=6), make_state(1, 1, 64)
    w = inputs[1]
    w[:, 40:200:7], w[:, 43::11, :, ::3], w[:, 90, :, 5:40], w[:, 250:] = 6.0, 3.0, 100.0, -4.0
    got = results(operator(name, 6), cast(inputs, torch.float32), state.float())
    want = results(operator("reference", 6), inputs, state)
    assert_same(got, want, 1e-5)
    for strength in (rest, 3.0, -4.0):  # the gradients of strong decays are small beside the others
        at = w == strength
        assert difference(got["gradient of w"][at], want["gradient of w"][at]) <= 1e-5, strength


@backends
@versions
@pytest.mark.parametrize("cu_seqlens", [None, [0, 30, 31, 100]])
def test_bf16_inputs_lose_only_the_rounding_of_the_output(
    name: str, version: int, cu_seqlens: list[int] | None
) -> None:
    bounds = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    inputs = cast(make_inputs(1, 100, 2, 64, version=version), torch.bfloat16)
    state = make_state(1 if cu_seqlens is None else 3, 2, 64).float()
    got = results(operator(name, version), inputs, state, bounds)
    want = results(operator("reference", version), cast(inputs, torch.float64), state.double(), bounds)
    kept = {"final_state", "gradient of initial_state"}  # stay float32
    assert {n for n, x in got.items() if x.dtype == torch.float32} == kept
    assert {x.dtype for n, x in got.items() if n not in kept} == {torch.bfloat16}
    assert_same({n: got[n] for n in kept}, {n: want[n] for n in kept}, 1e-5)
    for n in want.keys() - kept:  # half a step of bf16, and float32's error beside
        torch.testing.assert_close(got[n].double(), want[n], rtol=2**-8, atol=1e-5 * float(want[n].abs().max()), msg=n)


@backends
@versions
@pytest.mark.parametrize("used", ["y", "final_state"])
def test_gradients_of_one_result_alone(name: str, version: int, used: str) -> None:
    """Autograd hands no gradient to the unused result."""
    inputs, state = make_inputs(1, 20, 1, 16, version=version), make_state(1, 1, 16)

    def gradients(wkv: ops.Wkv) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
        y, final = wkv(*leaves)
        (y if used == "y" else final).sum().backward()  # an expanded gradient, which has no memory of its own
        return [x.new_zeros(x.shape) if x.grad is None else x.grad for x in leaves]

    for got, want in zip(gradients(operator(name, version)), gradients(operator("reference", version)), strict=True):
        assert difference(got, want) <= 1e-11


@backends
@versions
def test_inputs_may_be_views_and_stay_as_they_are(name: str, version: int) -> None:
    """(B,H,T,N) in memory, seen as (B,T,H,N), and (N,H) as (H,N)."""

    def swapped(x: Tensor) -> Tensor:
        return x.mT if x.dim() == 2 else x.transpose(1, 2)

    inputs, state = make_inputs(2, 19, 3, 16, version=version), make_state(2, 3, 16)
    views = [swapped(swapped(x).contiguous()) for x in inputs]
    before = [x.clone() for x in (*views, state)]
    assert not any(x.is_contiguous() for x in views)
    y, final = operator(name, version)(*views, state)
    want_y, want_final = operator("reference", version)(*inputs, state)
    assert difference(y, want_y) <= 1e-11
    assert difference(final, want_final) <= 1e-11
    assert all(torch.equal(x, b) for x, b in zip((*views, state), before, strict=True))


@pytest.mark.parametrize(("version", "length"), [(5, 4), (6, 2), (6, 4), (7, 3)])
def test_gradcheck_of_the_chunked_backward(version: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The derivative itself, with chunks of few tokens and documents of several lengths."""
    monkeypatch.setattr(CHUNKED[version], "CHUNK", length)
    inputs = [x.requires_grad_() for x in (*make_inputs(1, 9, 2, 3, version=version), make_state(3, 2, 3))]
    bounds = torch.tensor([0, 1, 8, 9])
    assert torch.autograd.gradcheck(operator("torch", version), (*inputs, bounds), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    ("version", "length"), [*((7, n) for n in (1, 2, 5, 16, 32)), *((6, n) for n in (1, 2, 4, 16, 64))]
)
def test_chunk_length_changes_nothing(version: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, state = make_inputs(2, 35, 2, 16, version=version), make_state(2, 2, 16)
    monkeypatch.setattr(CHUNKED[version], "CHUNK", length)
    want = results(operator("reference", version), inputs, state)
    assert_same(results(operator("torch", version), inputs, state), want, 1e-11)


# --- several documents in one row

DOCUMENTS = {
    "single": [0, 50],
    "length 1": [0, 1, 2, 3],
    "equal": [0, 16, 32, 48],
    "empty": [0, 5, 5, 21],
    "empty at both ends": [0, 0, 33, 33],
    "longest last": [0, 3, 20, 100],
    "longest first": [0, 70, 87, 90, 91],
    "mixed": [0, 17, 17, 18, 66, 82, 83, 100],
}


@backends
@versions
@pytest.mark.parametrize("bounds", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_documents_are_each_alone(name: str, version: int, bounds: list[int]) -> None:
    """In every result and gradient; each document alone is a call of the reference."""
    H, N = 2, 16
    inputs, states = make_inputs(1, bounds[-1], H, N, version=version), make_state(len(bounds) - 1, H, N)
    got = results(operator(name, version), inputs, states, torch.tensor(bounds))
    weights, final_weights = weights_of(inputs[0], states)
    shared = {n: torch.zeros_like(x) for n, x in zip(INPUTS[version], inputs, strict=True) if x.dim() == 2}
    for i, (start, end) in enumerate(pairwise(bounds)):
        if start == end:  # an empty document hands its state on
            assert torch.equal(got["final_state"][i], states[i])
            assert torch.equal(got["gradient of initial_state"][i], final_weights[i])
            continue
        leaves = [(x if x.dim() == 2 else x[:, start:end]).clone().requires_grad_() for x in inputs]
        leaves.append(states[i : i + 1].clone().requires_grad_())
        y, final = operator("reference", version)(*leaves)
        ((y * weights[:, start:end]).sum() + (final * final_weights[i]).sum()).backward()
        assert difference(got["y"][:, start:end], y) <= 1e-11
        assert difference(got["final_state"][i : i + 1], final) <= 1e-11
        for key, leaf in zip(INPUTS[version], leaves, strict=False):
            assert leaf.grad is not None
            if key in shared:
                shared[key] += leaf.grad
                continue
            scale = float(leaf.grad.abs().max()) + 1e-3  # of a first token, some gradients are zero
            error = (got[f"gradient of {key}"][:, start:end] - leaf.grad).abs().max()
            assert float(error) / scale <= 1e-11, key
        assert difference(got["gradient of initial_state"][i : i + 1], leaves[-1].grad) <= 1e-11
    assert all(difference(got[f"gradient of {key}"], total) <= 1e-11 for key, total in shared.items())


@backends
@versions
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("has_state", [True, False])
def test_cu_seqlens_of_both_types_in_float32(name: str, version: int, dtype: torch.dtype, has_state: bool) -> None:
    bounds = torch.tensor(DOCUMENTS["mixed"], dtype=dtype)
    inputs, states = make_inputs(1, 100, 2, 64, version=version), make_state(7, 2, 64) if has_state else None
    want = results(operator("reference", version), inputs, states, bounds.long())
    states = None if states is None else states.float()
    assert_same(results(operator(name, version), cast(inputs, torch.float32), states, bounds), want, 1e-5)


@backends
@versions
def test_a_poisoned_neighbour_stays_outside(name: str, version: int) -> None:
    """Not even NaN gets from one document into another, in either direction."""
    inputs, states = make_inputs(1, 60, 1, 16, version=version), make_state(3, 1, 16)
    bounds = torch.tensor([0, 18, 38, 60])
    of_tokens = {n: x for n, x in zip(INPUTS[version], inputs, strict=True) if x.dim() == 4}  # the rest is shared
    clean = results(operator(name, version), inputs, states, bounds)
    for x in of_tokens.values():
        x[:, 18:38] = float("nan")
    states[1] = float("nan")
    got = results(operator(name, version), inputs, states, bounds)
    others = torch.tensor([*range(18), *range(38, 60)])
    for key in ("y", *(f"gradient of {n}" for n in of_tokens)):
        assert torch.equal(got[key][:, others], clean[key][:, others]), key
    for key in ("final_state", "gradient of initial_state"):
        assert torch.equal(got[key][[0, 2]], clean[key][[0, 2]]), key


# --- choosing a backend


def test_auto_takes_the_first_that_runs() -> None:
    assert ops.choose_backend("auto", CPU, 64) is next(b for b in BACKENDS.values() if b.supports(CPU, 64) is None)


def test_unknown_backend_names_the_allowed() -> None:
    with pytest.raises(ConfigError, match=r"--op cudda: unknown; allowed are auto .*torch.*reference"):
        ops.choose_backend("cudda", CPU, 64)


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ops.Backend(
        "odd", reference.wkv5, reference.wkv6, reference.wkv7, lambda device, head_size: f"wants a GPU, got {device}"
    )
    monkeypatch.setitem(BACKENDS, "odd", row)
    with pytest.raises(ConfigError, match="--op odd: wants a GPU, got cpu; choose --op auto"):
        ops.choose_backend("odd", CPU, 64)
