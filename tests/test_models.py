"""The model: against the programs that others wrote, and against itself in pieces, packed and checkpointed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rwkv_peft as rp
from conftest import PypiRwkv, difference, random_model, random_rwkv7, random_tokens
from rwkv_peft.models import SHIFT, WKV, ModelState, Rwkv
from rwkv_peft.ops.loss import next_token_loss

# one of each version, for what others cannot judge
SMALL: dict[str, dict[str, Any]] = {
    "x052": {"version": "x052", "width": 96, "ffn": 72},
    "x060": {"version": "x060", "width": 96, "ffn": 72, "ranks": (3, 5)},
    "x070": {"head_size": 32, "ranks": (5, 7, 3, 11)},
    "x070a": {"version": "x070a", "ranks": (5, 7, 3, 11), "rank_s": 6, "ffn": 72},
}
# layers, width, vocabulary, ranks (of w a v g in RWKV-7, of mixes and decay in RWKV-6), head size, and what else is odd
FILES: dict[str, dict[str, Any]] = {
    "1 layer": {"layers": 1, "width": 64, "vocab_size": 257, "ranks": (8, 8, 4, 16)},
    "1 layer with v, rank 2": {"layers": 1, "width": 128, "vocab_size": 300, "ranks": (2, 2, 2, 3), "layer0_v": True},
    "2 layers": {"layers": 2, "width": 64, "vocab_size": 257, "ranks": (8, 8, 4, 16)},
    "odd ranks": {"layers": 3, "width": 128, "vocab_size": 511, "ranks": (5, 7, 3, 11)},
    "with v": {"layers": 4, "width": 192, "vocab_size": 1000, "ranks": (16, 24, 9, 40), "layer0_v": True},
    "bf16": {"layers": 2, "width": 256, "vocab_size": 4099, "ranks": (32, 17, 8, 33), "dtype": torch.bfloat16},
    "bf16 with v, odd ffn": {
        "layers": 3,
        "width": 64,
        "vocab_size": 258,
        "ranks": (6, 10, 2, 14),
        "dtype": torch.bfloat16,
        "layer0_v": True,
        "ffn": 100,
    },
    "narrow ffn": {"layers": 2, "width": 128, "vocab_size": 400, "ranks": (8, 8, 8, 8), "ffn": 96},
    "wide": {"layers": 2, "width": 512, "vocab_size": 600, "ranks": (33, 31, 15, 65)},
    "6 layers": {"layers": 6, "width": 320, "vocab_size": 777, "ranks": (20, 12, 10, 50), "layer0_v": True},
    "head size 32": {"layers": 2, "width": 96, "vocab_size": 257, "ranks": (8, 8, 4, 16), "head_size": 32},
    "World vocabulary": {"layers": 1, "width": 64, "vocab_size": 65536, "ranks": (8, 8, 4, 16)},
    "vectors": {"layers": 2, "width": 64, "vocab_size": 257, "ranks": (8, 8, 4, 16), "flat": True},
    "x070a": {"version": "x070a"},
    "x070a, 1 layer, vectors": {"version": "x070a", "layers": 1, "width": 128, "ffn": 96, "flat": True},
    "x070a, bf16, odd ranks": {"version": "x070a", "layers": 3, "ranks": (5, 7, 3, 11), "dtype": torch.bfloat16},
    "x060": {"version": "x060"},
    "x060, 1 layer, 1 head": {"version": "x060", "layers": 1, "head_size": 64},
    "x060, vectors, odd ranks": {
        "version": "x060",
        "layers": 3,
        "width": 96,
        "ffn": 100,
        "ranks": (5, 7),
        "flat": True,
    },
    "x060, bf16": {"version": "x060", "width": 256, "head_size": 64, "ranks": (32, 64), "dtype": torch.bfloat16},
    "x060, 6 layers": {"version": "x060", "layers": 6, "width": 128, "vocab_size": 511},
    "x052": {"version": "x052"},
    "x052, 1 head": {"version": "x052", "head_size": 64},
    "x052, vectors, odd ffn": {"version": "x052", "layers": 3, "width": 96, "ffn": 100, "flat": True},
    "x052, bf16": {"version": "x052", "width": 256, "head_size": 64, "dtype": torch.bfloat16},
    "x052, 6 layers": {"version": "x052", "layers": 6, "width": 128, "vocab_size": 511},
}
TOLERANCE = 2e-5  # relative, of float32 against another program's float32
T = 37

versions = pytest.mark.parametrize("small", SMALL.values(), ids=SMALL)


@dataclass
class Expected:
    """What the PyPI package `rwkv` gives for a file and a row of tokens."""

    model: Rwkv
    path: Path
    tokens: Tensor  # (1,T)
    logits: Tensor  # (T,V)
    wkv: Tensor  # (L,H,N,N)
    shift: Tensor  # (L,2,D)


@pytest.fixture(scope="module", params=FILES.values(), ids=FILES)
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pypi_rwkv: PypiRwkv) -> Expected:
    path = tmp_path_factory.mktemp("base") / "base.pth"
    tensors = random_model(**request.param)
    torch.save(tensors, path)
    model = rp.load_model(path)
    torch.save({name: t.float() for name, t in tensors.items()}, path)  # it would round its own sums to a file's bf16
    tokens = random_tokens(model.sizes.vocab_size, 1, T)
    return Expected(model, path, tokens, *pypi_rwkv(path, tokens[0].tolist()))


def assert_state(state: ModelState, want: Expected | tuple[Tensor, Tensor]) -> None:
    wkv, shift = (want.wkv, want.shift) if isinstance(want, Expected) else want
    assert difference(state.wkv[:, 0], wkv) <= TOLERANCE
    assert difference(state.shift[:, :, 0], shift) <= TOLERANCE


@torch.no_grad()
def in_pieces(model: Rwkv, tokens: Tensor, cuts: list[int]) -> tuple[Tensor, ModelState]:
    """Logits (T,V) and the last state of `tokens` (1,T) given in pieces, the state handed on."""
    logits, state = [], None
    for start, end in pairwise([0, *cuts, tokens.shape[1]]):
        piece, state = model(tokens[:, start:end], state)
        logits.append(piece[0])
    assert state is not None
    return torch.cat(logits), state


# --- PyPI rwkv


def test_logits_and_states_are_pypi_rwkvs(expected: Expected) -> None:
    logits, state = in_pieces(expected.model, expected.tokens, [])
    assert difference(logits, expected.logits) <= TOLERANCE
    assert_state(state, expected)


def test_token_by_token(expected: Expected) -> None:
    logits, state = in_pieces(expected.model, expected.tokens, list(range(1, T)))
    assert difference(logits, expected.logits) <= TOLERANCE
    assert_state(state, expected)


def test_cut_anywhere(expected: Expected) -> None:
    @settings(max_examples=6, deadline=None, database=None)
    @given(st.lists(st.integers(1, T - 1), min_size=1, max_size=4, unique=True).map(sorted))
    def check(cuts: list[int]) -> None:
        logits, state = in_pieces(expected.model, expected.tokens, cuts)
        assert difference(logits, expected.logits) <= TOLERANCE
        assert_state(state, expected)

    check()


@pytest.mark.parametrize("file", ["2 layers", "with v", "x070a", "x060", "x052"])
def test_pypi_rwkv_token_by_token(file: str, model_file: Callable[..., Path], pypi_rwkv: PypiRwkv) -> None:
    """Its single-token code is other code than its code for a row."""
    path, tokens = model_file(**FILES[file]), random_tokens(257, 1, T)
    want, *state = pypi_rwkv(path, tokens[0].tolist(), singly=True)
    logits, got = in_pieces(rp.load_model(path), tokens, list(range(1, T)))
    assert difference(logits, want) <= TOLERANCE
    assert_state(got, (state[0], state[1]))


@pytest.mark.parametrize("version", SMALL)
def test_two_percent_of_any_tensor_show(version: str, tmp_path: Path, pypi_rwkv: PypiRwkv) -> None:
    """The comparison would notice any tensor's values, or every other of them, to be 2% off, ten times over."""
    tensors = random_model(version)
    tensors["emb.weight"] *= 0.01  # so that ln0's epsilon matters: without it, no scale of its input would
    torch.save(tensors, tmp_path / "base.pth")
    model, tokens = rp.load_model(tmp_path / "base.pth"), random_tokens(257, 1, T)
    want = pypi_rwkv(tmp_path / "base.pth", tokens[0].tolist())

    def error() -> float:
        logits, state = in_pieces(model, tokens, [])
        got = logits, state.wkv[:, 0], state.shift[:, :, 0]
        return max(difference(a, b) for a, b in zip(got, want, strict=True))

    assert error() <= TOLERANCE
    errors = {}
    for name, p in model.named_parameters():
        kept = p.detach().clone()
        for step in (1, 2):
            p.data.view(-1)[::step] *= 1.02
            errors[name, step] = error()
            p.data.copy_(kept)
    unscaled = {(f"blocks.{i}.att.k_k", 1) for i in range(2)}  # keys under k_k are normalised
    blind = {case: e for case, e in errors.items() if e <= 10 * TOLERANCE and case not in unscaled}
    assert not blind


# --- a learned state in the file


def learned(model: Rwkv, shift: bool) -> tuple[ModelState, dict[str, Tensor]]:
    """A random state of one document, and the tensors that a file would have of it."""
    state = random_state(model, 1)
    tensors = {WKV.format(i): x[0].detach() for i, x in enumerate(state.wkv)}
    if not shift:
        return ModelState(state.wkv, torch.zeros_like(state.shift)), tensors
    for i, pair in enumerate(state.shift):
        tensors |= {name.format(i): x[0].detach() for name, x in zip(SHIFT, pair, strict=True)}
    return state, tensors


@pytest.mark.parametrize("file", ["with v", "x070a", "x060", "x052"])
def test_a_state_in_the_file_is_pypi_rwkvs(file: str, model_file: Callable[..., Path], pypi_rwkv: PypiRwkv) -> None:
    """Its older models read the state from the file; RWKV-7 is given it as a runtime state."""
    path = model_file(**FILES[file])
    state, tensors = learned(rp.load_model(path), shift=False)
    torch.save(torch.load(path) | tensors, path)
    model, tokens = rp.load_model(path), random_tokens(257, 1, T)
    wkv = state.wkv[:, 0].detach() if model.version.startswith("x070") else None
    want, *last = pypi_rwkv(path, tokens[0].tolist(), wkv=wkv)
    logits, got = in_pieces(model, tokens, [5, 6])
    assert difference(logits, want) <= TOLERANCE
    assert_state(got, (last[0], last[1]))
    assert difference(in_pieces(rp.load_model(model_file(**FILES[file])), tokens, [])[0], want) > 0.01


@versions
@pytest.mark.parametrize("shift", [True, False])
def test_every_document_begins_in_the_state_of_the_file(
    shift: bool, small: dict[str, Any], model_file: Callable[..., Path]
) -> None:
    """As if that state had been given; its gradient is the sum over the documents."""
    path, op = model_file(**small), "reference"
    plain = rp.load_model(path, op=op)
    state, tensors = learned(plain, shift)
    torch.save(torch.load(path) | tensors, path)
    model = rp.load_model(path, op=op)
    assert dict(model.named_parameters()).keys() - dict(plain.named_parameters()).keys() == tensors.keys()

    tokens, bounds = random_tokens(257, 1, 30), torch.tensor([0, 11, 12, 30])
    given = ModelState(state.wkv.expand(-1, 3, -1, -1, -1), state.shift.expand(-1, -1, 3, -1))
    want, _ = plain(tokens, given, bounds)
    logits, _ = model(tokens, cu_seqlens=bounds)
    assert torch.equal(logits, want)
    got = gradients(model, logits.square().mean())
    want.square().mean().backward()
    for i in range(len(state.wkv)):
        assert difference(got[WKV.format(i)], state.wkv.grad[i, 0]) <= 1e-6
        for k, name in enumerate(SHIFT if shift else ()):
            assert difference(got[name.format(i)], state.shift.grad[i, k, 0]) <= 1e-6


@versions
def test_a_learned_state_is_float32(small: dict[str, Any], model_file: Callable[..., Path]) -> None:
    path = model_file(**small)
    _, tensors = learned(rp.load_model(path), shift=True)
    torch.save({name: t.half() for name, t in (torch.load(path) | tensors).items()}, path)
    model = rp.load_model(path, "bf16")
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name in tensors else torch.bfloat16)
        assert name not in tensors or torch.equal(p, tensors[name].half().float())
    logits, _ = in_pieces(model, random_tokens(257, 1, 9), [3])
    assert logits.dtype == torch.bfloat16


# --- rwkv7-hf


def hf_model(tensors: dict[str, Tensor]) -> tuple[Any, dict[str, tuple[str, bool]]]:
    """The model of the PyPI package `rwkv7-hf`, and official name → its name, and whether it is transposed."""
    from rwkv7_hf import RWKV7ForCausalLM, converter

    config = converter.infer_config(tensors, "float32", "reference", fuse_norm=False)
    model = RWKV7ForCausalLM(config).train()
    names = {name: converter.translate_name(name, config.num_hidden_layers) for name in tensors}
    names = {name: there for name, there in names.items() if there[0]}
    own = model.state_dict()
    for name, (there, transposed) in names.items():
        own[there].copy_((tensors[name].t() if transposed else tensors[name]).reshape(own[there].shape))
    return model, names


HF_FILES = [
    n for n, f in FILES.items() if "version" not in f and n not in ("head size 32", "World vocabulary", "vectors")
]


@pytest.mark.parametrize("file", HF_FILES)
def test_loss_and_every_gradient_are_rwkv7_hfs(file: str, load: Callable[..., Rwkv]) -> None:
    """Its head size is 64 here: for others its `ln_x` has another epsilon than the official one.

    The tokens are such that no document's first token has a key and a receptance at right angles: there, `ln_x` divides
    by almost nothing, and both programs are 2e-4 away from float64.
    """
    sizes = FILES[file]
    tokens = random_tokens(sizes["vocab_size"], 2, T, seed=4).clamp(min=1)  # it keeps token 0 from training
    other, names = hf_model(random_rwkv7(**sizes))
    want = other(input_ids=tokens, labels=tokens, use_cache=False)
    want.loss.backward()
    there = dict(other.named_parameters())
    assert {there_name for there_name, _ in names.values()} >= {n for n, p in there.items() if p.grad is not None}

    model = load(**sizes)
    hidden, _ = model.hidden(tokens)
    labels = tokens[:, 1:].flatten()
    loss = next_token_loss(hidden[:, :-1].flatten(0, 1), model.head, labels, 0.0)[0] / len(labels)
    loss.backward()
    assert difference(loss, want.loss) <= 1e-4
    assert difference(model.head(hidden), want.logits) <= 1e-4
    errors = {}
    for name, p in model.named_parameters():
        gradient = there[names[name][0]].grad
        assert p.grad is not None and gradient is not None, name
        assert float(p.grad.abs().max()) > 0, name
        errors[name] = difference(p.grad, (gradient.t() if names[name][1] else gradient).reshape(p.shape))
    assert max(errors.values()) <= 1e-4, {n: e for n, e in errors.items() if e > 1e-4}


# --- packed documents

DOCUMENTS = {
    "two": [0, 20, 37],
    "length 1 first": [0, 1, 2, 40],
    "longest last": [0, 3, 19, 70],
    "equal": [0, 16, 32, 48],
    "an empty one": [0, 18, 18, 50],
}


def gradients(model: Rwkv, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def random_state(model: Rwkv, documents: int) -> ModelState:
    generator = torch.Generator().manual_seed(11)
    state = ModelState.zeros(model, documents)
    wkv, shift = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (state.wkv, state.shift))
    return ModelState(wkv.requires_grad_(), shift.requires_grad_())


@pytest.mark.parametrize("op", ["torch", "reference"])
@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("bounds", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"]
)
@versions
def test_packed_documents_are_each_alone(
    small: dict[str, Any],
    dtype: torch.dtype,
    tolerance: float,
    bounds: list[int],
    has_state: bool,
    op: str,
    load: Callable[..., Rwkv],
) -> None:
    """Logits, final states, and the gradients of every parameter and of the initial states."""
    model = load(op=op, **small).to(dtype)
    V, count = model.sizes.vocab_size, len(bounds) - 1
    tokens, labels = random_tokens(V, 1, bounds[-1]), random_tokens(V, bounds[-1], seed=2)
    state, same_state = (random_state(model, count) if has_state else None for _ in range(2))

    logits, final = model(tokens, state, torch.tensor(bounds, dtype=torch.int32))
    weight = torch.randn(final.wkv.shape, generator=torch.Generator().manual_seed(10)).to(dtype) / 100
    total = F.cross_entropy(logits[0], labels) + (final.wkv * weight).sum() + final.shift.square().sum() / 100
    got = gradients(model, total)

    pieces, finals = [], []
    for i, (start, end) in enumerate(pairwise(bounds)):
        before = ModelState.zeros(model, count) if same_state is None else same_state
        if start == end:
            finals.append(before[i : i + 1])  # handed on as it was
        else:
            piece, last = model(tokens[:, start:end], None if same_state is None else before[i : i + 1])
            pieces.append(piece[0])
            finals.append(last)
    alone, wkv = torch.cat(pieces), torch.cat([f.wkv for f in finals], 1)
    shift = torch.cat([f.shift for f in finals], 2)
    want = gradients(model, F.cross_entropy(alone, labels) + (wkv * weight).sum() + shift.square().sum() / 100)

    assert got.keys() == want.keys() == dict(model.named_parameters()).keys()
    errors = {name: difference(got[name], want[name]) for name in want}
    errors |= {"logits": difference(logits[0], alone)}
    errors |= {"final wkv": difference(final.wkv, wkv), "final shift": difference(final.shift, shift)}
    if state is not None and same_state is not None:
        errors["initial wkv"] = difference(state.wkv.grad, same_state.wkv.grad)
        errors["initial shift"] = difference(state.shift.grad, same_state.shift.grad)
    assert max(errors.values()) <= tolerance, {n: e for n, e in errors.items() if e > tolerance}


@pytest.mark.parametrize(
    ("bounds", "rows"), [([0, 5, 9], 1), ([1, 5, 10], 1), ([0, 6, 5, 10], 1), ([0, 5, 10], 2)], ids=str
)
def test_cu_seqlens_that_do_not_fit(bounds: list[int], rows: int, load: Callable[..., Rwkv]) -> None:
    with pytest.raises(ValueError, match="must rise from 0 to T, and B be 1"):
        load()(random_tokens(257, rows, 10), cu_seqlens=torch.tensor(bounds))


def test_a_state_for_another_number_of_documents(load: Callable[..., Rwkv]) -> None:
    model = load()
    with pytest.raises(ValueError, match="state has 3 entries; the tokens hold 2 documents"):
        model(random_tokens(257, 2, 4), ModelState.zeros(model, 3))


# --- the same model in other ways


def loss_and_gradients(model: Rwkv) -> dict[str, Tensor]:
    tokens = random_tokens(model.sizes.vocab_size, 2, 40)
    logits, state = model(tokens)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(logits.dtype)
    total = (logits * weight).sum() + state.wkv.square().sum().to(logits.dtype)
    return {"logits": logits.detach(), "total": total.detach(), **gradients(model, total)}


@versions
def test_gradient_checkpointing_changes_no_gradient(small: dict[str, Any], load: Callable[..., Rwkv]) -> None:
    model = load(**small)
    want = loss_and_gradients(model)
    model.grad_checkpoint = "block"
    got = loss_and_gradients(model)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@versions
def test_gradient_checkpointing_keeps_less(small: dict[str, Any], load: Callable[..., Rwkv]) -> None:
    model = load(**small, layers=4)

    def kept() -> int:
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.update({t.data_ptr(): t.nbytes}), t)[1], lambda t: t
        ):
            model(random_tokens(257, 1, 64))
        return sum(sizes.values())

    before = kept()
    model.grad_checkpoint = "block"
    assert kept() < before / 2


@versions
@pytest.mark.parametrize("op", ["torch", "reference"])
def test_gradients_are_those_of_the_float64_recurrence(
    op: str, small: dict[str, Any], load: Callable[..., Rwkv]
) -> None:
    want = loss_and_gradients(load(op="reference", **small).double())
    got = loss_and_gradients(load(op=op, **small))
    errors = {name: difference(got[name], want[name]) for name in want}
    assert max(errors.values()) <= 1e-4, {n: e for n, e in errors.items() if e > 1e-4}


@versions
@pytest.mark.parametrize("state", [True, False])
def test_float64_is_float64_throughout(state: bool, small: dict[str, Any], model_file: Callable[..., Path]) -> None:
    """After `.double()` the gradient is the derivative, to far below what one step in float32 would leave."""
    path = model_file(**small)
    if state:
        torch.save(torch.load(path) | learned(rp.load_model(path), shift=True)[1], path)
    model = rp.load_model(path).double()
    tokens, labels = random_tokens(257, 1, T), random_tokens(257, T, seed=2)

    def loss() -> Tensor:
        logits, _ = model(tokens)
        assert logits.dtype == torch.float64
        return F.cross_entropy(logits[0], labels)

    got = gradients(model, loss())
    generator = torch.Generator().manual_seed(3)
    parameters = dict(model.named_parameters())
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) * 1e-7 for n, p in parameters.items()}
    slope = sum(float((got[n] * d).sum()) for n, d in direction.items())
    with torch.no_grad():
        ends = []
        for sign in (1, -2):
            for n, p in parameters.items():
                p.add_(sign * direction[n])
            ends.append(float(loss()))
    assert abs((ends[0] - ends[1]) / 2 / slope - 1) < 1e-6


@versions
@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.05), ("fp16", 0.005)])
def test_half_precision_is_near(dtype: str, tolerance: float, small: dict[str, Any], load: Callable[..., Rwkv]) -> None:
    tokens = random_tokens(257, 2, T)
    with torch.no_grad():
        want, want_state = load(**small)(tokens)
        got, state = load(as_dtype=dtype, **small)(tokens)
    assert got.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert state.wkv.dtype == torch.float32
    assert difference(got, want) <= tolerance
    assert difference(state.wkv, want_state.wkv) <= tolerance


@versions
def test_rows_of_a_batch_do_not_see_each_other(small: dict[str, Any], load: Callable[..., Rwkv]) -> None:
    model = load(**small)
    tokens = random_tokens(257, 3, 20)
    with torch.no_grad():
        together, state = model(tokens)
        for i in range(3):
            alone, last = model(tokens[i : i + 1])
            assert difference(together[i : i + 1], alone) <= 1e-5
            assert difference(state[i : i + 1].wkv, last.wkv) <= 1e-5


@versions
def test_the_given_state_is_not_changed(small: dict[str, Any], load: Callable[..., Rwkv]) -> None:
    model = load(**small)
    with torch.no_grad():
        _, state = model(random_tokens(257, 1, 5))
        wkv, shift = state.wkv.clone(), state.shift.clone()
        model(random_tokens(257, 1, 20), state)
    assert torch.equal(state.wkv, wkv)
    assert torch.equal(state.shift, shift)
