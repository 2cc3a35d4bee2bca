"""Checkpoints whose inputs lie in the CPU's memory: the same gradients, what is kept where, and when it comes back.

On a CPU copies are made as on a GPU, from memory to memory.
"""

from __future__ import annotations

import io
import json
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import rwkv_peft as rp
from conftest import random_tokens
from rwkv_peft.config import AdapterConfig, TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.models import Rwkv
from rwkv_peft.models.layers import Documents
from rwkv_peft.plan.activations import IN_FLIGHT, Activations, pinned_block
from rwkv_peft.plan.activations import MODES as WAYS
from rwkv_peft.plan.weights import learning_bytes
from rwkv_peft.training.checkpointing import choose_checkpoint
from rwkv_peft.training.engine import SingleProcess
from rwkv_peft.training.model import prepare
from rwkv_peft.training.offload import AHEAD, Buffers, Offload, Parked
from rwkv_peft.training.run import train
from rwkv_peft.training.step import MicroBatches
from test_steps import BATCHES, PENALTY, Products, gradients, trained_model, versions

CPU = torch.device("cpu")
MODES = ["block", "selective", ("block", "none", "selective"), ("operator", "block", "block")]
METHODS: dict[str, AdapterConfig | None] = {
    "lora": AdapterConfig(rank=4),
    "dora": AdapterConfig(rank=4, dora=True),
    "dropout": AdapterConfig(rank=4, dropout=0.3),
    "one matrix": AdapterConfig(rank=4, targets=("blocks.2.att.key",)),
    "pissa": AdapterConfig("pissa", rank=4),
    "bone": AdapterConfig("bone", rank=8),
    "bat": AdapterConfig("bat", rank=8),
    "full": None,
}


def gradients_of_two(model: Rwkv, names: tuple[str, ...] = ("documents", "rows")) -> dict[str, Tensor]:
    """Of two micro-batches of different shapes, added up, and both losses; random numbers are drawn from one seed."""
    torch.manual_seed(4)
    micro_batches = MicroBatches(model, PENALTY, SingleProcess().backward)
    model.zero_grad()
    found = {name: micro_batches.run(BATCHES[name], 100).clone() for name in names}
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert not {n for n in want if not torch.equal(got[n], want[n])}


# --- gradients


@pytest.mark.parametrize("mode", MODES, ids=str)
@versions
def test_gradients_are_the_same_to_the_bit(version: str, mode: Any, load: Callable[..., Rwkv]) -> None:
    """Of adapters, time parameters, norms and learned states; once more where all memory is there already."""
    model = trained_model(load, version, layers=3)
    model.grad_checkpoint = mode
    want = gradients_of_two(model)
    assert {n.rpartition(".")[2] for n in want} >= {"time_state", "shift_state", "weight"}
    model.keep = keep = Offload(CPU)
    assert_equal(gradients_of_two(model), want)
    blocks = list(keep.buffers.blocks)
    assert_equal(gradients_of_two(model), want)
    assert [one.data_ptr() for one in keep.buffers.blocks] == [one.data_ptr() for one in blocks]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("version", ["x070", "x060"])
def test_of_every_method(version: str, method: str, load: Callable[..., Rwkv]) -> None:
    """Also of dropout's random numbers, and where nothing trains in the first layers."""
    model, adapter = load(version=version, layers=3, head_size=64), METHODS[method]
    if adapter is None:
        model.requires_grad_(True)
    else:
        rp.attach_adapter(model, adapter)
    model.train().grad_checkpoint = "block"
    want = gradients_of_two(model)
    model.keep = Offload(CPU)
    assert_equal(gradients_of_two(model), want)


def test_two_passes_before_one_goes_back(load: Callable[..., Rwkv]) -> None:
    """Each has memory of its own, and one may be asked twice."""
    model = trained_model(load, "x070", layers=3)
    model.grad_checkpoint = "block"
    tokens = [random_tokens(257, 2, n, seed=n) for n in (20, 33)]
    want = [gradients(model, model.hidden_of(Documents(t, None)).square().sum()) for t in tokens]
    model.keep = Offload(CPU)
    totals = [model.hidden_of(Documents(t, None)).square().sum() for t in tokens]
    for i in (0, 1):
        model.zero_grad()
        totals[i].backward(retain_graph=True)
        assert_equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, want[i])
    assert_equal(gradients(model, totals[0]), want[0])


def test_a_checkpoint_still_repeats_no_last_product(load: Callable[..., Rwkv]) -> None:
    model = rp.attach_adapter(load(layers=2), AdapterConfig(rank=4))
    model.grad_checkpoint = "block"
    counts = []
    for keep in (model.keep, Offload(CPU)):
        model.keep = keep
        with Products(model) as products:
            model.hidden_of(Documents(random_tokens(257, 1, 20), None)).sum().backward()
        counts.append(products.count)
    assert counts[0] == counts[1]


# --- memory


def inputs_alive(model: Rwkv) -> tuple[int, Tensor]:
    """How many inputs of layers and outputs of time-mixes are in memory after a forward pass, and its result."""
    seen: list[StorageWeakRef] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(StorageWeakRef((args[0] if isinstance(output[1], tuple) else output[0]).untyped_storage()))

    handles = [module.register_forward_hook(note) for block in model.layers() for module in (block, block.att)]
    total = model.hidden_of(Documents(random_tokens(257, 2, 30), None)).sum()
    for handle in handles:
        handle.remove()
    assert len(seen) == 2 * model.sizes.layers
    return sum(not one.expired() for one in seen), total


@versions
def test_inputs_leave_memory(version: str, load: Callable[..., Rwkv]) -> None:
    model = trained_model(load, version, layers=6)
    model.grad_checkpoint = "block"
    assert inputs_alive(model)[0] == 12
    model.keep = keep = Offload(CPU)
    alive, total = inputs_alive(model)
    assert alive <= AHEAD + 1  # and the normalised embedding, which all layers share
    total.backward()
    keep.settle()
    assert not keep.leaving
    assert not keep.arriving
    assert len(keep.buffers.free) == sum(len(block) // keep.buffers.size for block in keep.buffers.blocks)


def test_inputs_come_back_ahead_of_need(load: Callable[..., Rwkv], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a layer before the one above it is computed; at most so many at once; the last layer's never left."""
    model = trained_model(load, "x070", layers=5)
    model.grad_checkpoint = "block"
    model.keep = keep = Offload(CPU)
    events, most = [], 0
    packed: list[Parked] = []
    fetch, unpack, take = keep.fetch, keep.unpack, keep.buffers.take

    def number(parked: Parked) -> int:
        if parked not in packed:
            packed.append(parked)
        return packed.index(parked)

    def spy_fetch(parked: Parked) -> None:
        nonlocal most
        if parked.near is None:
            events.append(("fetch", number(parked)))
        fetch(parked)
        most = max(most, len({*keep.arriving, *(one for one in keep.leaving if one.near is not None)}))

    def spy_unpack(held: Any) -> Tensor:
        if isinstance(held, Parked):
            events.append(("use", number(held)))
        return unpack(held)

    monkeypatch.setattr(keep, "fetch", spy_fetch)
    monkeypatch.setattr(keep, "unpack", spy_unpack)
    taken = []
    monkeypatch.setattr(keep.buffers, "take", lambda size: taken.append(size) or take(size))  # type: ignore[func-returns-value]
    total = model.hidden_of(Documents(random_tokens(257, 2, 30), None)).sum()
    total.backward()
    assert len(taken) == 2 * 5 + 1
    used = [i for what, i in events if what == "use"]
    assert len(used) == 3 * 5
    assert most <= IN_FLIGHT
    fetched = [i for what, i in events if what == "fetch"]
    assert len(fetched) == len(set(fetched)) == 2 * 5 + 1 - AHEAD
    for i in fetched:
        at = events.index(("fetch", i))
        between = {one for what, one in events[at : events.index(("use", i))] if what == "use"}
        assert between - {i}  # something is computed while it comes


class Late(Offload):
    """As on a GPU whose copies run as late as they may: when they are waited for. Until then the target is NaN."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.queue: deque[tuple[Any, ...]] = deque()
        self.done = self.begun = 0

    def copy(self, target: Tensor, source: Tensor) -> Any:
        weak = [(StorageWeakRef(x.untyped_storage()), x.storage_offset(), x.dtype, x.shape) for x in (target, source)]
        target.fill_(torch.nan)
        self.queue.append(tuple(weak))
        self.begun += 1
        self.last = self.begun  # type: ignore[assignment]
        return self.begun

    def wait(self, copied: Any) -> None:
        while copied is not None and self.done < copied:  # one after the other, as on a stream
            target, source = (as_it_was(*x) for x in self.queue.popleft())
            target.copy_(source)
            self.done += 1


def as_it_was(storage: StorageWeakRef, offset: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    assert not storage.expired(), "given up before it was copied"
    strong = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
    return torch.empty(0, dtype=dtype).set_(strong, offset, shape)


@pytest.mark.parametrize("mode", MODES, ids=str)
@versions
def test_late_copies_are_waited_for(version: str, mode: Any, load: Callable[..., Rwkv]) -> None:
    """Before what they bring is read, and before what they take is given up; none is left at the end."""
    model = trained_model(load, version, layers=3)
    model.grad_checkpoint = mode
    want = gradients_of_two(model)
    model.keep = keep = Late()
    assert_equal(gradients_of_two(model), want)
    assert keep.done == keep.begun > 6
    assert not keep.queue


def test_nothing_is_under_way_after_a_backward_pass_that_asks_for_nothing(load: Callable[..., Rwkv]) -> None:
    """Only the head trains: what the layers kept is dropped while it is being copied."""
    model = load(layers=3).requires_grad_(False)
    model.head.requires_grad_(True)
    model.train().grad_checkpoint = "block"
    model.keep = keep = Late()
    MicroBatches(model, PENALTY, SingleProcess().backward).run(BATCHES["documents"], 30)
    assert keep.done == keep.begun > 0
    assert not keep.leaving


def test_buffers_grow_and_are_used_again() -> None:
    buffers = Buffers(100, pinned=False)
    first = [buffers.take(60) for _ in range(3)]
    assert {len(one) for one in first} == {100}
    assert len(buffers.blocks) == 1
    assert len({one.data_ptr() for one in first}) == 3
    larger = buffers.take(200)
    assert len(larger) == 200
    buffers.give(first[0])  # too small by now, but a CUDA graph may know it
    assert all(len(one) == 200 for one in buffers.free)
    buffers.give(larger)
    assert buffers.take(10).data_ptr() == larger.data_ptr()
    assert len(buffers.blocks) == 2


@pytest.mark.parametrize("size", [1, 100, 4096, 12_582_912, 41_943_040])
def test_little_pinned_memory_is_left_unused(size: int) -> None:
    block = pinned_block(size)
    assert block & (block - 1) == 0
    assert block // size >= 8
    assert block % size <= block / 9


# --- settings and plan


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(Path("m"), ["d"], Path("o"), offload_checkpoints=True, **changes)


@pytest.mark.parametrize("mode", ["none", "operator"])
def test_where_nothing_is_computed_anew_by_layers(mode: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^--offload-checkpoints: not with --grad-checkpoint {mode}, .*; try "):
        settings(grad_checkpoint=mode).check()
    settings(grad_checkpoint="auto").check()


def test_a_cpu_has_no_other_memory(model_file: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "hello"}\n')
    config = TrainConfig(model_file(), [str(tmp_path / "d.jsonl")], tmp_path / "o", device="cpu")
    with pytest.raises(
        ConfigError, match=r"^--offload-checkpoints: needs a GPU, and the model is on cpu; leave it out$"
    ):
        train(replace(config, offload_checkpoints=True))
    assert not (tmp_path / "o").exists()


def test_a_run_gets_it(load: Callable[..., Rwkv]) -> None:
    for offload in (True, False):
        model = load()
        prepare(model, replace(settings(grad_checkpoint="block", ctx_len=64), offload_checkpoints=offload).resolved())
        assert isinstance(model.keep, Offload) == offload
        if isinstance(model.keep, Offload):
            assert model.keep.buffers.size == 4 * 64 * model.sizes.width * 4


def test_the_plan_counts_it_elsewhere(load: Callable[..., Rwkv]) -> None:
    model = load(layers=6)
    plain, away = (Activations.of(model, 1000, 2, offloads=offloads) for offloads in (False, True))
    unit = plain.layers[0].unit
    for mode, count in {"block": 12, "selective": 6, "operator": 0, "none": 0}.items():
        modes = (mode,) * 6
        assert plain.kept(modes) - away.kept(modes) == count * unit
        assert away.at_once(modes) - plain.at_once(modes) == (IN_FLIGHT * unit if count else 0)
        assert plain.in_ram(modes) == 0
        assert (away.in_ram(modes) >= (count + (mode == "block")) * unit) == (away.in_ram(modes) > 0 or count == 0)


def test_auto_knows_of_it(load: Callable[..., Rwkv]) -> None:
    """Where the inputs leave, more layers can keep more."""
    model = load(layers=24)
    config = settings(grad_checkpoint="auto")
    away = Activations.of(model, 10_000, 4, offloads=True)
    block, none = ("block",) * 24, ("none",) * 24
    least, most = away.kept(block) + away.at_once(block), away.kept(none)
    learning = learning_bytes(model, config)
    ranks = []
    for share in (0.1, 0.2, 0.3, 0.4):
        free = least + share * (most - least)
        modes = [
            choose_checkpoint(model, 10_000, free + learning, replace(config, offload_checkpoints=offload))
            for offload in (True, False)
        ]
        ranks.append([sum(WAYS.index(mode) for mode in one) for one in modes])
        assert away.kept(modes[0]) + away.at_once(modes[0]) <= free
    assert all(with_it > without for with_it, without in ranks), ranks


# --- a GPU


def losses(path: Path, data: Path, out: Path, **changes: Any) -> list[float]:
    config = TrainConfig(
        path, [str(data)], out, rank=8, lr=1e-3, warmup_steps=0, micro_batch=2, ctx_len=256, max_steps=12, **changes
    )
    return rp.train(config, Console(file=io.StringIO())).losses


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Examples of 6 to 250 tokens."""
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": f"{i}+1", "response": "ab c" * (i % 60 + 1)} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize(
    "changes",
    [{}, {"graphs": False}, {"grad_checkpoint": "selective"}, {"grad_accum": 3}, {"dropout": 0.2}, {"sampling": "pad"}],
    ids=str,
)
@pytest.mark.parametrize("version", ["x070", "x060", "x052"])
def test_a_run_on_a_gpu(
    version: str, changes: dict[str, Any], model_file: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """The same losses as without it, over plain, captured and replayed micro-batches of several shapes."""
    path = model_file(version=version, layers=4, width=256, head_size=64)
    how = {"grad_checkpoint": "block", **changes}
    want, got = (losses(path, data, tmp_path / str(o), offload_checkpoints=o, **how) for o in (False, True))
    assert got[-1] < got[0]
    assert got == pytest.approx(want, rel=1e-4)


def model_on_gpu(model_file: Callable[..., Path], version: str, offload: bool) -> Rwkv:
    model = rp.load_model(model_file(version=version, layers=14, width=256, head_size=64), "bf16", "cuda")
    rp.attach_adapter(model, AdapterConfig(rank=8), ("time", "ln"))
    model.draws, model.grad_checkpoint = False, "block"
    if offload:
        model.keep = Offload(model.like.device)
    return model.train()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("graphs", [True, False], ids=["graph", "plain"])
@pytest.mark.parametrize("version", ["x070", "x060", "x052"])
def test_memory_falls_and_nothing_waits(version: str, graphs: bool, model_file: Callable[..., Path]) -> None:
    """By nearly what the inputs take; gradients are the same but for the order of sums."""
    from test_gpu import documents, without_waiting

    peaks, found = [], []
    batches = [documents(seed, 3000, 4000, 1000) for seed in (1, 2, 3, 4)]
    for offload in (False, True):
        torch.cuda.empty_cache()
        model = model_on_gpu(model_file, version, offload)
        micro_batches = MicroBatches(model, 1e-4, SingleProcess().backward, graphs)
        assert (micro_batches.graphs is not None) == graphs
        for batch in batches[:3]:  # plainly, captured, replayed
            micro_batches.run(batch, len(batch.labels))
        torch.cuda.synchronize()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        torch.cuda.reset_peak_memory_stats()
        with without_waiting():
            loss = micro_batches.run(batches[3], len(batches[3].labels))
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_reserved() if graphs else torch.cuda.max_memory_allocated())
        found.append(
            {"loss": loss.cpu()} | {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        )
        gone = weakref.ref(micro_batches.graphs or model)
        del model, micro_batches, loss
        assert gone() is None, "graphs and their memory would stay until Python looks for cycles"
    errors = {n: float((x - found[1][n]).norm() / x.norm().clamp(min=1e-20)) for n, x in found[0].items()}
    assert max(errors.values()) <= 1e-3, errors
    unit = 8000 * 256 * 2
    assert peaks[0] - peaks[1] >= (2 * 14 - 6) * unit * (0.8 if graphs else 0.95)
