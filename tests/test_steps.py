"""What makes steps fast: shapes and numbers of CUDA graphs, outcomes read late, checkpointing by layer."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rwkv_peft as rp
from conftest import difference, random_model, random_tokens
from rwkv_peft.config import AdapterConfig, TrainConfig
from rwkv_peft.data.batches import Batch, beside, padded
from rwkv_peft.data.masking import Encoded
from rwkv_peft.errors import TrainingError
from rwkv_peft.models import Rwkv
from rwkv_peft.models.layers import Documents
from rwkv_peft.ops import BACKENDS
from rwkv_peft.plan.activations import MODES as WAYS
from rwkv_peft.plan.activations import Activations
from rwkv_peft.training.checkpointing import choose_checkpoint
from rwkv_peft.training.early import early_steps
from rwkv_peft.training.engine import SingleProcess
from rwkv_peft.training.graphs import NO_TARGET, Shape, flattened, why_not
from rwkv_peft.training.metrics import StepRecord
from rwkv_peft.training.optim import build_optimizer, set_rates
from rwkv_peft.training.outcome import Guard, Log, Outcome
from rwkv_peft.training.step import MicroBatches, batch_loss, loss_at

VERSIONS = ["x070", "x070a", "x060", "x052"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU, kernels are interpreted
PENALTY = 0.05

versions = pytest.mark.parametrize("version", VERSIONS)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


def rows(*inputs: int) -> list[Encoded]:
    """Examples that the model reads so many tokens of; of each, about two thirds are targets."""
    random = np.random.default_rng(5)
    examples = []
    for n in inputs:
        target = random.random(n + 1) < 0.7
        target[0] = False
        examples.append(Encoded(random.integers(1, 257, n + 1).astype(np.uint16), target))
    return examples


BATCHES = {
    "one row": beside(rows(50)),
    "a full row": beside(rows(64)),
    "documents": beside(rows(3, 1, 20, 7)),
    "documents, full": beside(rows(30, 1, 33)),
    "rows": padded(rows(9, 30, 17)),
    "padded on the left": padded(rows(9, 30, 17), "left"),
}
batches = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


def trained_model(load: Callable[..., Rwkv], version: str, **sizes: Any) -> Rwkv:
    """With an adapter and a learned state that do something, and with every kind of parameter training."""
    model = load(version=version, **{"layers": 2, "head_size": 64} | sizes)
    rp.attach_adapter(model, AdapterConfig(rank=4), ("time", "ln", "state", "shift"))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    model.draws = False
    return model.train()


def gradients(model: Rwkv, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    errors = {n: difference(got[n], want[n]) for n in want}
    assert max(errors.values()) <= tolerance, {n: e for n, e in errors.items() if e > tolerance}


# --- shapes of CUDA graphs


def of_size(tokens: int, documents: int, targets: int) -> Batch:
    labels = torch.zeros(targets, dtype=torch.int64)
    bounds = torch.linspace(0, tokens, documents + 1).int()
    return Batch(torch.zeros(1, tokens, dtype=torch.int64), labels, labels, tokens, bounds if documents > 1 else None)


def test_sizes_are_rounded_to_few() -> None:
    """Up, to a multiple of 64, and by less than a quarter where that is coarser."""
    for n in [*range(1, 700), 1000, 1024, 1025, 4095, 4096, 4097, 30_000]:
        shape = Shape.of(of_size(n, 1, n))
        assert shape.tokens == shape.targets
        assert shape.tokens % 64 == 0
        assert n <= shape.tokens < max(n + 64, 1.25 * n)
    assert len({Shape.of(of_size(n, 1, 1)).tokens for n in range(1025, 4097)}) == 8


@pytest.mark.parametrize(
    ("tokens", "documents", "want"),
    [(64, 1, 1), (60, 1, 2), (64, 2, 2), (63, 2, 4), (64, 3, 4), (60, 3, 4), (64, 4, 4), (60, 4, 8), (60, 5, 8)],
)
def test_padding_is_a_document_of_its_own(tokens: int, documents: int, want: int) -> None:
    assert Shape.of(of_size(tokens, documents, 10)) == Shape(64, want, 64)


def test_rows_are_documents() -> None:
    assert Shape.of(padded(rows(9, 30, 17))) == Shape(128, 4, 64)
    full = Batch(torch.zeros(4, 32, dtype=torch.int64), torch.zeros(1).long(), torch.zeros(1).long(), 128)
    assert Shape.of(full) == Shape(128, 4, 64)


@batches
def test_a_batch_can_be_read_back_from_its_numbers(batch: Batch) -> None:
    shape = Shape.of(batch)
    numbers = flattened(batch, shape)
    assert numbers.dtype == torch.int32
    tokens, starts, ends, positions, labels, offsets = numbers.split(shape.sizes)
    T, n = batch.tokens.numel(), len(batch.labels)
    assert torch.equal(tokens[:T].long(), batch.tokens.flatten())
    assert torch.equal(positions[:n].long(), batch.positions)
    assert torch.equal(labels[:n].long(), batch.labels)
    assert set(labels[n:].tolist()) <= {NO_TARGET}
    assert 0 <= int(positions.min()) <= int(positions.max()) < shape.tokens
    width = batch.tokens.shape[1]
    bounds = list(range(0, T + 1, width)) if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    rest = shape.documents + 1 - len(bounds)
    assert offsets.tolist() == bounds + [shape.tokens] * rest  # the first of the rest ends the padding
    want = Documents(tokens[None].long(), offsets)
    assert torch.equal(starts, want.starts)
    assert torch.equal(ends, want.ends)
    if shape.tokens > T:
        assert int(starts[T]) == int(ends[-1]) == len(bounds) - 1


@pytest.mark.parametrize(
    ("version", "name"), [*(("x070", name) for name in BATCHES), *((version, "documents") for version in VERSIONS[1:])]
)
def test_padding_to_a_shape_changes_nothing(version: str, name: str, load: Callable[..., Rwkv]) -> None:
    """As a CUDA graph reads a batch, though run plainly: the loss and every gradient."""
    model, batch = trained_model(load, version, layers=1), BATCHES[name]
    total, loss = batch_loss(model, batch, PENALTY)
    want = {"total": total, "loss": loss, **gradients(model, total)}
    shape = Shape.of(batch)
    tokens, starts, ends, positions, labels, offsets = flattened(batch, shape).to(DEVICE).split(shape.sizes)
    model.to(DEVICE).op = BACKENDS["triton"]
    documents = Documents.placed(tokens[None].long(), offsets.clone(), torch.stack((starts, ends)))
    total, loss = loss_at(model, documents, positions.long(), labels.long(), PENALTY)
    got = {"total": total, "loss": loss, **gradients(model, total)}
    assert_same({n: x.cpu() for n, x in got.items()}, want, 1e-5)


def test_padding_changes_nothing_of_the_chunked_operator(load: Callable[..., Rwkv]) -> None:
    """With offsets on the CPU, as evaluation has them."""
    model, batch = trained_model(load, "x070"), BATCHES["documents"]
    total, _ = batch_loss(model, batch, PENALTY)
    want = {"total": total, **gradients(model, total)}
    shape = Shape.of(batch)
    tokens, _, _, positions, labels, offsets = flattened(batch, shape).split(shape.sizes)
    total, _ = loss_at(model, Documents(tokens[None].long(), offsets), positions.long(), labels.long(), PENALTY)
    assert_same({"total": total, **gradients(model, total)}, want, 1e-5)


def test_which_models_cannot_be_graphs(load: Callable[..., Rwkv]) -> None:
    model = load(op="torch")
    assert why_not(model) == "with --op torch"
    assert MicroBatches(model, 0.0, Tensor.backward, graphs=True).graphs is None
    for name in ("triton", "cuda"):
        model.op = BACKENDS[name]
        assert why_not(model) is None
    assert why_not(rp.attach_adapter(model, AdapterConfig(rank=4))) is None
    dropping = rp.attach_adapter(load(), AdapterConfig(rank=4, dropout=0.1))
    dropping.op = BACKENDS["triton"]
    assert why_not(dropping) == "with --dropout"


def test_an_adapter_of_another_library_cannot_be_a_graph(load: Callable[..., Rwkv]) -> None:
    pytest.importorskip("peft")
    model = rp.attach_adapter(load(), AdapterConfig("peft:OFT", peft_config={"oft_block_size": 4}))
    model.op = BACKENDS["triton"]
    assert why_not(model) == "with an adapter of Hugging Face PEFT"


# --- outcomes


class Kept:
    """In the place of Metrics."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def add(self, record: StepRecord) -> None:
        self.records.append(record)


def outcome(step: int, loss: float = 1.0, norm: float = 2.0) -> Outcome:
    return Outcome(step, torch.tensor(loss), torch.tensor(norm))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_raises(value: float) -> None:
    assert outcome(1, 0.5, 3.0).read() == (0.5, 3.0)
    with pytest.raises(TrainingError, match=f"step 4: the loss is {value}; try a lower --lr"):
        outcome(4, loss=value).read()
    with pytest.raises(TrainingError, match=f"step 5: the gradient is {value}"):
        outcome(5, norm=value).read()


def test_a_norm_may_have_another_dtype() -> None:
    assert Outcome(1, torch.tensor(0.5), torch.tensor(2.0, dtype=torch.bfloat16)).read() == (0.5, 2.0)


def test_the_log_is_one_step_behind() -> None:
    kept = Kept()
    log = Log(kept)  # type: ignore[arg-type]
    log.write()
    assert not kept.records  # nothing waits
    log.add(outcome(1, 3.0, 0.5), 0.1, 100)
    assert not kept.records
    log.add(outcome(2, 2.0, 0.25), 0.2, 50)
    assert [r.step for r in kept.records] == [1]
    log.write(eval_loss=1.5)
    log.write()
    got = [(r.step, r.tokens, r.loss, r.lr, r.grad_norm, r.eval_loss) for r in kept.records]
    assert got == [(1, 100, 3.0, 0.1, 0.5, None), (2, 150, 2.0, 0.2, 0.25, 1.5)]
    assert all(0 < r.tokens_per_s < math.inf for r in kept.records)


def test_the_log_writes_no_step_that_failed() -> None:
    kept = Kept()
    log = Log(kept)  # type: ignore[arg-type]
    log.add(outcome(1), 0.1, 100)
    log.add(outcome(2, math.nan), 0.1, 100)
    with pytest.raises(TrainingError, match="step 2"):
        log.add(outcome(3), 0.1, 100)
    log.write()  # as a run does that saves what it has
    assert [r.step for r in kept.records] == [1]


def test_on_a_cpu_the_guard_waits_for_the_outcome() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    guard = Guard(torch.optim.AdamW([p]), torch.device("cpu"))
    assert guard.waits
    guard.check(outcome(1))
    with pytest.raises(TrainingError, match="step 2: the loss"):
        guard.check(outcome(2, math.nan))


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.inf)], ids=["loss", "norm"])
def test_a_step_that_failed_and_those_after_it_change_nothing(values: tuple[float, float]) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    guard = Guard(torch.optim.AdamW([p], lr=0.1, fused=True), torch.device("cpu"))
    guard.waits = False  # as on a GPU

    def step(number: int, loss: float, norm: float, gradient: float) -> Tensor:
        p.grad = torch.full_like(p, gradient)
        guard.check(outcome(number, loss, norm))
        guard.optimizer.step()
        return p.detach().clone()

    first = step(1, 1.0, 1.0, 1.0)
    assert bool((first < 1).all())
    assert torch.equal(step(2, *values, math.nan), first)
    assert torch.equal(step(3, 1.0, 1.0, 1.0), first)


# --- checkpointing


def needed(model: Rwkv, tokens: int, modes: tuple[str, ...]) -> float:
    """Bytes, as `choose_checkpoint` reckons."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = Activations.of(model, tokens, model.like.element_size())
    return found.kept(modes) + found.at_once(modes) + 12 * trained  # a gradient, and AdamW's averages


def test_the_least_is_computed_anew_that_memory_asks_for(load: Callable[..., Rwkv]) -> None:
    model, tokens, names = load(layers=5), 10_000, list(WAYS)
    least, most = (needed(model, tokens, (mode,) * 5) for mode in ("block", "none"))
    before = [0] * 5
    seen = set()
    for free in np.linspace(0.9 * least, 1.1 * most, 300):
        modes = choose_checkpoint(model, tokens, float(free))
        assert len(modes) == 5
        assert {"block", "none"} - set(modes)  # every layer is selective before one keeps all
        assert needed(model, tokens, modes) <= max(free, least)
        ranks = [names.index(mode) for mode in modes]
        assert all(now >= then for now, then in zip(ranks, before, strict=True))  # more memory, no more work
        before = ranks
        seen.add(modes)
    assert len(seen) >= 12
    assert choose_checkpoint(model, tokens, 0) == ("block",) * 5
    assert choose_checkpoint(model, tokens, 1e15) == ("none",) * 5


def test_the_operators_of_older_versions_keep_too_little_to_run_again(load: Callable[..., Rwkv]) -> None:
    model = load(version="x060", layers=5)
    least, most = (needed(model, 10_000, (mode,) * 5) for mode in ("block", "none"))
    seen = {choose_checkpoint(model, 10_000, float(free)) for free in np.linspace(0.9 * least, 1.1 * most, 300)}
    assert {mode for modes in seen for mode in modes} == {"block", "selective", "none"}


MODES = ["none", "operator", "selective", "block", ("block", "operator", "selective")]
OFFSETS = {"rows": None, "documents": [0, 0, 5, 6, 40, 40]}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("bounds", OFFSETS.values(), ids=OFFSETS)
@versions
def test_hidden_of_is_hidden(version: str, bounds: list[int] | None, mode: Any, load: Callable[..., Rwkv]) -> None:
    """With every way of checkpointing, and learned states; to the bit."""
    model = trained_model(load, version, layers=3)
    tokens = random_tokens(257, 1 if bounds else 2, 40)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    weight = torch.randn(*tokens.shape, model.sizes.width)
    want = model.hidden(tokens, cu_seqlens=cu_seqlens)[0]
    wanted = gradients(model, (want * weight).sum())
    assert {n.rpartition(".")[2] for n in wanted} >= {"time_state", "shift_state"}
    model.grad_checkpoint = mode
    got = model.hidden_of(Documents(tokens, cu_seqlens))
    assert torch.equal(got, want)
    assert_same(gradients(model, (got * weight).sum()), wanted, 1e-6)


class Products(TorchDispatchMode):
    """Counts products with each of the model's matrices: x Wᵀ, not what goes back through it."""

    def __init__(self, model: Rwkv) -> None:
        super().__init__()
        self.names = {p.data_ptr(): n for n, p in model.named_parameters() if n.endswith(".weight") and p.ndim == 2}
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            name = self.names.get(args[1].data_ptr())
            if name is not None and args[1].stride(0) == 1:  # the transposed matrix
                self.count[name.removesuffix(".weight")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("peft", ["lora", "pissa", "bone"])
@pytest.mark.parametrize(
    ("mode", "twice"),
    [
        ("none", set()),
        ("operator", set()),
        ("selective", {"att.receptance", "att.key", "att.value"}),
        ("block", {"att.receptance", "att.key", "att.value", "ffn.key"}),
    ],
)
def test_a_checkpoint_repeats_no_last_product(mode: str, twice: set[str], peft: str, load: Callable[..., Rwkv]) -> None:
    """Those that end a half, `att.output` and `ffn.value`, are needed by nothing that goes back."""
    model = rp.attach_adapter(load(layers=2), AdapterConfig(peft, rank=4))
    model.grad_checkpoint = mode
    products = Products(model)
    with products:
        model.hidden_of(Documents(random_tokens(257, 1, 20), None)).sum().backward()
    names = ["att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"]
    want = {f"blocks.{i}.{n}": 2 if n in twice else 1 for i in range(2) for n in names}
    assert {n: c for n, c in products.count.items() if not n.startswith("blocks.") or n in want} == want


# --- steps within the backward pass


def run_of(
    load: Callable[..., Rwkv], device: str, early: bool, spoil: str = "", steps: int = 3
) -> tuple[Rwkv, list[float], set[str]]:
    """A model after steps of lean AdamW, the norms of its gradients, and the names of those that were left."""
    model = trained_model(load, "x070").to(device)
    config = TrainConfig(Path("m"), ["d"], Path("o"), optim="adamw8bit", clip=0 if early else 1e9, lr=1e-2).resolved()
    optimizer = build_optimizer(model, config)
    taker = early_steps(config, model, optimizer, alone=True)
    assert bool(taker) == early
    if spoil:
        model.get_parameter(spoil).register_hook(lambda gradient: gradient * math.nan)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, norms, left = SingleProcess(), [], set()
    for step in range(steps):
        set_rates(optimizer, config, step, 3)
        if taker:
            taker.begin()
        MicroBatches(model, PENALTY, engine.backward).run(BATCHES["documents"], 30)
        left = {n for n, p in model.named_parameters() if p.grad is not None}
        norms.append(float(taker.norm() if taker else engine.clip(trained, config.clip)))
        if not taker:
            engine.step(optimizer)
    return model, norms, left


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_early_steps_are_the_same(device: str, load: Callable[..., Rwkv]) -> None:
    """And leave no gradient."""
    got, norms, left = run_of(load, device, early=True)
    want, its, all_of_them = run_of(load, device, early=False)
    assert norms == pytest.approx(its, rel=1e-5)
    assert not left
    parameters = {n: p for n, p in want.named_parameters() if p.requires_grad}
    assert all_of_them == parameters.keys()
    assert_same({n: p for n, p in got.named_parameters() if p.requires_grad}, parameters, 1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_early_steps_take_no_nan(device: str, load: Callable[..., Rwkv]) -> None:
    """Nothing becomes NaN, and nothing moves after that; what came before in the pass, a later layer, has moved."""
    start, spoilt = trained_model(load, "x070").to(device), "blocks.0.ln2.weight"
    model, norms, _ = run_of(load, device, early=True, spoil=spoilt, steps=2)
    assert all(map(math.isnan, norms))
    once = run_of(load, device, early=True, spoil=spoilt, steps=1)[0]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), once.parameters(), strict=True))
    moved = {n for (n, p), q in zip(once.named_parameters(), start.parameters(), strict=True) if not torch.equal(p, q)}
    assert "ln_out.weight" in moved
    assert not moved & {spoilt, "blocks.0.ln1.weight", "blocks.0.att.key.lora_A.weight"}


def test_early_steps_are_for_runs_that_can(load: Callable[..., Rwkv]) -> None:
    model = trained_model(load, "x070")
    plain = TrainConfig(Path("m"), ["d"], Path("o"), optim="adamw8bit", clip=0).resolved()
    for changes, alone in ({"clip": 1.0}, True), ({"optim": "adamw"}, True), ({}, False):
        config = replace(plain, **changes)
        assert early_steps(config, model, build_optimizer(model, config), alone) is None
    assert early_steps(plain, model, build_optimizer(model, plain), alone=True) is not None


@pytest.mark.parametrize("peft", ["lora", "bone"])
def test_a_checkpoint_keeps_no_copies_of_the_adapter(peft: str, tmp_path: Path) -> None:
    """In bf16 the products take the adapter's float32 tensors in bf16: no function of autograd may hold on to those."""
    torch.save(random_model(), tmp_path / "m.pth")
    model = rp.attach_adapter(rp.load_model(tmp_path / "m.pth", "bf16"), rp.AdapterConfig(peft=peft, rank=7))
    model.grad_checkpoint = "block"
    loss = model.train().hidden_of(Documents(random_tokens(257, 1, 30), None)).sum()
    gc.collect()
    found = (x for x in gc.get_objects() if type(x) is torch.Tensor and x.dtype == torch.bfloat16)
    assert not [x.shape for x in found if 7 in x.shape and x.numel() < 7 * 300]
    loss.backward()  # type: ignore[no-untyped-call]
