"""What a GPU computes, against the same on the CPU."""

from __future__ import annotations

import io
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import rwkv_peft as rp
from conftest import difference, random_rwkv7, random_tokens
from rwkv_peft.checkpoint import read_tensors
from rwkv_peft.data.batches import Batch, beside
from rwkv_peft.data.masking import Encoded
from rwkv_peft.doctor import selftest
from rwkv_peft.errors import TrainingError
from rwkv_peft.models import Rwkv
from rwkv_peft.ops import BACKENDS, choose_backend, cuda, reference
from rwkv_peft.training.engine import SingleProcess
from rwkv_peft.training.graphs import Graphs, Shape
from rwkv_peft.training.optim import build_optimizer, keep_in_bf16
from rwkv_peft.training.outcome import Guard, Outcome
from rwkv_peft.training.step import MicroBatches, batch_loss
from test_ops import DOCUMENTS, assert_same, cast, make_inputs, make_state, results

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]

SIZES: dict[str, Any] = {"layers": 3, "width": 256, "vocab_size": 257, "ranks": (32, 17, 8, 33)}
REFERENCE = {5: reference.wkv5, 6: reference.wkv6, 7: reference.wkv7}
versions = pytest.mark.parametrize("version", REFERENCE)
backends = pytest.mark.parametrize(  # fla compiles for minutes, and its float32 is tf32: a test of its own
    "name", [n for n, b in BACKENDS.items() if n != "fla" and b.supports(torch.device("cuda"), 64) is None]
)


def on_gpu(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to("cuda", dtype) for x in tensors]


def on_cpu(found: dict[str, Tensor]) -> dict[str, Tensor]:
    assert {x.device.type for x in found.values()} == {"cuda"}
    return {name: x.cpu() for name, x in found.items()}


@backends
@pytest.mark.parametrize(
    ("B", "T", "H", "N"), [(1, 1, 1, 64), (2, 17, 2, 64), (2, 100, 3, 64), (1, 63, 2, 32), (1, 40, 1, 128)]
)
@versions
def test_operator_in_float32(version: int, name: str, B: int, T: int, H: int, N: int) -> None:
    if BACKENDS[name].supports(torch.device("cuda"), N):
        pytest.skip(f"{name}: {BACKENDS[name].supports(torch.device('cuda'), N)}")
    inputs, state = make_inputs(B, T, H, N, version=version), make_state(B, H, N)
    got = results_on_gpu(name, inputs, state, torch.float32)
    assert_same(got, results(REFERENCE[version], inputs, state), 1e-4)


@backends
@pytest.mark.parametrize("bounds", DOCUMENTS.values(), ids=DOCUMENTS)
@versions
def test_operator_with_documents(version: int, name: str, bounds: list[int]) -> None:
    inputs, states = make_inputs(1, bounds[-1], 2, 64, version=version), make_state(len(bounds) - 1, 2, 64)
    for place in ("cpu", "cuda"):  # offsets may lie on either
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=place)
        got = results_on_gpu(name, inputs, states, torch.float32, cu_seqlens)
        assert_same(got, results(REFERENCE[version], inputs, states, torch.tensor(bounds)), 1e-4)


@backends
@pytest.mark.parametrize("T", [16, 300])
@versions
def test_operator_in_bf16(version: int, name: str, T: int) -> None:
    assert_near_in_bf16(version, name, T)


@pytest.mark.parametrize("name", ["triton", "cuda"])
@versions
def test_bf16_in_a_long_row(version: int, name: str) -> None:
    if reason := BACKENDS[name].supports(torch.device("cuda"), 64):
        pytest.skip(f"{name}: {reason}")
    inputs = [x.bfloat16() for x in selftest.random_inputs(version, 1, 4095, 1, 64, torch.device("cuda"))]
    dy = [torch.randn(1, 4095, 1, 64, device="cuda").bfloat16()]
    got = selftest.results(selftest.wkv_of(name, version), inputs, None, dy)
    want = selftest.results(REFERENCE[version], [x.double() for x in inputs], None, [dy[0].double()])
    assert max(selftest.relative_error(a, b) for a, b in zip(got, want, strict=True)) <= 5e-3


@pytest.mark.skipif(BACKENDS["fla"].supports(torch.device("cuda"), 64) is not None, reason="fla is not installed")
@versions
def test_fla_in_bf16(version: int) -> None:
    assert_near_in_bf16(version, "fla", 300)


def assert_near_in_bf16(version: int, name: str, T: int) -> None:
    """Within a few roundings of bf16, the final state in float32."""
    inputs, state = cast(make_inputs(2, T, 2, 64, version=version), torch.bfloat16), make_state(2, 2, 64).float()
    got = results_on_gpu(name, inputs, state, torch.bfloat16)
    want = results(REFERENCE[version], cast(inputs, torch.float64), state.double())
    errors = {n: float((got[n].double() - want[n]).norm() / want[n].norm()) for n in want}
    assert max(errors.values()) <= 6e-3, errors
    assert got["final_state"].dtype == torch.float32


def results_on_gpu(
    name: str, inputs: list[Tensor], state: Tensor, dtype: torch.dtype, cu_seqlens: Tensor | None = None
) -> dict[str, Tensor]:
    """As `results`, which draws its random function on the CPU."""
    wkv = getattr(BACKENDS[name], f"wkv{7 if len(inputs) == 6 else 6 if inputs[1].ndim == 4 else 5}")

    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        *rest, initial, bounds = args
        y, final = wkv(*on_gpu(rest, dtype), initial.to("cuda", torch.float32), bounds)
        assert y.device.type == final.device.type == "cuda"
        assert (y.dtype, final.dtype) == (dtype, torch.float32)
        return y.cpu(), final.cpu()

    return results(call, inputs, state, cu_seqlens)


@pytest.mark.parametrize(("dtype", "tolerance", "of_gradients"), [("fp32", 1e-4, 1e-4), ("bf16", 0.03, 0.15)])
@pytest.mark.parametrize("version", ["x070", "x070a", "x060", "x052"])
def test_model_and_its_gradients(
    version: str, dtype: str, tolerance: float, of_gradients: float, model_file: Callable[..., Path]
) -> None:
    """In bf16 as near as on a CPU, where a gradient in bf16 is up to 0.14 off."""
    path, tokens = model_file(version=version, layers=3, width=256), random_tokens(257, 2, 70)

    def everything(device: str, dtype: str) -> dict[str, Tensor]:
        model = rp.load_model(path, dtype, device)
        logits, state = model(tokens.to(device))
        logits.float().log_softmax(-1)[..., 7].sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found |= {"logits": logits.detach(), "wkv": state.wkv.detach(), "shift": state.shift.detach()}
        return {name: x.float().cpu() for name, x in found.items()}

    got, want = everything("cuda", dtype), everything("cpu", "fp32")
    assert got.keys() == want.keys()
    errors = {n: float((got[n] - want[n]).norm() / want[n].norm()) for n in want}
    outputs = {n: errors.pop(n) for n in ("logits", "wkv", "shift")}
    assert max(outputs.values()) <= tolerance, outputs
    assert max(errors.values()) <= of_gradients, errors


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"grad_checkpoint": "block"}, {"grad_checkpoint": "selective"}, {"grad_checkpoint": "operator"},
        {"graphs": False}, {"dora": True}, {"peft": "pissa"}, {"peft": "bone"}, {"peft": "bat"},
        {"peft": "state", "train_parts": "shift"}, {"train_parts": ("time", "ln", "state")}, {"peft": "full"},
        {"sampling": "pad"}, {"sampling": "pad", "pad_side": "left"}, {"sampling": "get"}, {"eval_fraction": 0.2},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("version", ["x070", "x060", "x052"])
def test_a_bf16_run(version: str, settings: dict[str, Any], model_file: Callable[..., Path], tmp_path: Path) -> None:
    """`auto` is bf16 there; its losses are near the CPU's in float32."""
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{i}+1", "response": str(i + 1) * (i % 5 + 1)}) + "\n" for i in range(20))
    )
    path = model_file(version=version, layers=3, width=256)
    config = rp.TrainConfig(
        path, [str(data)], tmp_path / "gpu", rank=8, max_steps=5, lr=1e-3, warmup_steps=0, ctx_len=64, micro_batch=4,
        **settings,
    )  # fmt: skip
    result = rp.train(config, Console(file=io.StringIO()))
    config.device, config.out = "cpu", tmp_path / "cpu"
    want = rp.train(config, Console(file=io.StringIO()))
    assert result.losses[0] == pytest.approx(want.losses[0], rel=0.01)
    assert result.losses == pytest.approx(want.losses, rel=0.06)
    assert list(result.eval_losses.values()) == pytest.approx(list(want.eval_losses.values()), rel=0.06)
    records = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    assert all(record["vram_gib"] > 0 for record in records)
    assert "bfloat16 on cuda" in (result.out / "log.txt").read_text()
    if result.result.is_dir():
        files = [p for p in result.result.iterdir() if p.suffix in (".pth", ".safetensors")]
        assert {t.dtype for p in files for t in read_tensors(p).values()} == {torch.float32}


def test_generating(model_file: Callable[..., Path]) -> None:
    """Greedy text in float32 is the CPU's."""
    path, byte = model_file(**SIZES), rp.Tokenizer.byte()
    texts = [
        "".join(rp.generate(rp.load_model(path, device=d), byte, "User: Hi", 20, temperature=0))
        for d in ("cpu", "cuda")
    ]
    assert texts[0] == texts[1]


def test_an_adapter_trained_in_bf16_merges_as_on_the_cpu(model_file: Callable[..., Path], tmp_path: Path) -> None:
    model = rp.load_model(model_file(**SIZES), "bf16", "cuda")
    rp.attach_adapter(model, rp.AdapterConfig(rank=4), ("ln",))
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn_like(p))
    rp.save_adapter(model, tmp_path / "a")
    merged = rp.load_model(rp.merge(model_file(**SIZES), tmp_path / "a", tmp_path / "m.pth"))
    tokens = random_tokens(257, 1, 30)
    with torch.no_grad():
        assert difference(model(tokens.cuda())[0].float().cpu(), merged(tokens)[0]) <= 0.05
    assert merged.sizes.layers == len([n for n in random_rwkv7(**SIZES) if n.endswith("r_k")])


# --- steps


def test_which_operator_is_taken() -> None:
    gpu = torch.device("cuda")
    assert choose_backend("auto", gpu, 64).name == ("cuda" if cuda.is_fastest(gpu, 64) else "triton")
    assert choose_backend("auto", gpu, 128).name == "triton"
    assert choose_backend("auto", gpu, 32).name == "torch"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Examples of 10 to 300 tokens."""
    draw, path = random.Random(3), tmp_path / "texts.jsonl"

    def words(count: int) -> str:
        return "".join(draw.choice(["ab ", "cde ", "f, "]) for _ in range(count))

    examples = [
        {"prompt": words(draw.randint(1, 12)), "response": words(3 * 2 ** draw.randint(0, 5))} for _ in "x" * 90
    ]
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


def losses(path: Path, texts: Path, out: Path, **settings: Any) -> list[float]:
    """Of a run in bf16 whose packed rows hold varying numbers of documents and targets."""
    config = rp.TrainConfig(
        path, [str(texts)], out, rank=8, lr=1e-3, lr_final=1e-3, warmup_steps=0, micro_batch=1, **settings
    )
    found = rp.train(config, Console(file=io.StringIO())).losses
    assert found[-1] < 0.7 * found[0]  # it learns, so that wrong gradients would show
    return found


@pytest.mark.parametrize(("most", "grad_accum"), [(16, 1), (2, 1), (16, 2)])
@pytest.mark.parametrize("version", ["x070", "x060", "x052"])
def test_graphs_change_nothing(
    version: str,
    most: int,
    grad_accum: int,
    model_file: Callable[..., Path],
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where more shapes occur than there may be graphs."""
    path = model_file(version=version, layers=3, width=256, head_size=64)
    how = {"max_steps": 30, "ctx_len": 512, "grad_accum": grad_accum}
    want = losses(path, texts, tmp_path / "plain", graphs=False, **how)
    shapes: list[Shape] = []
    run = Graphs.run

    def spy(graphs: Graphs, batch: Batch, factor: float) -> Tensor:
        shapes.append(Shape.of(batch))
        return run(graphs, batch, factor)

    monkeypatch.setattr(Graphs, "run", spy)
    monkeypatch.setattr("rwkv_peft.training.graphs.MOST_SHAPES", most)
    got = losses(path, texts, tmp_path / "graphs", **how)
    assert got[:10] == pytest.approx(want[:10], rel=2e-3)
    assert got == pytest.approx(want, rel=2e-2)  # chunks lie otherwise, and roundings grow from step to step
    counts = Counter(shapes)
    assert len(counts) == 2 if most == 2 else len(counts) > 3
    assert (len(shapes) < 30 * grad_accum) == (most == 2)
    assert max(counts.values()) > 3  # run, captured, and replayed more than once


def bf16_model(path: Path, rank: int) -> Rwkv:
    """With a LoRA in bf16, on the GPU."""
    model = rp.load_model(path, "bf16", "cuda")
    rp.attach_adapter(model, rp.AdapterConfig(rank=rank), ("time", "ln"))
    keep_in_bf16(model)
    model.draws = False
    return model.train()


@pytest.mark.parametrize("alone", [True, False])
def test_all_shapes_share_one_memory(
    alone: bool, model_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is run plainly, since it is new or there are too many shapes, and with evaluations in between."""
    monkeypatch.setattr("rwkv_peft.training.graphs.MOST_SHAPES", 3)
    model = bf16_model(model_file(layers=6, width=512, head_size=64), 32)
    torch.cuda.empty_cache()
    resting = torch.cuda.memory_reserved()
    micro_batches = MicroBatches(model, 1e-4, SingleProcess().backward, graphs=True, alone=alone)
    assert micro_batches.graphs is not None
    largest, *others = [documents(n, n - 9, 8) for n in (4096, 3500, 3000, 2500, 2000, 1500, 4000)]

    def run(batch: Batch) -> None:
        micro_batches.run(batch, len(batch.labels))
        if alone:
            model.zero_grad()
        with torch.no_grad(), micro_batches.memory():
            batch_loss(model, largest, 0.0)

    for batch in [largest] * 3:
        run(batch)
    taken = torch.cuda.memory_reserved() - resting
    torch.cuda.reset_peak_memory_stats()
    for batch in others * 3:
        run(batch)
    assert len(micro_batches.graphs.graphs) == 3
    assert torch.cuda.max_memory_reserved() - resting <= 1.2 * taken


def test_saving_takes_no_memory_of_the_gpu(model_file: Callable[..., Path], tmp_path: Path) -> None:
    """Though folders hold float32: only a few matrices' tensors are made so at once."""
    model = bf16_model(model_file(layers=6, width=512, head_size=64), 128)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rp.save_adapter(model, tmp_path / "adapter")
    assert torch.cuda.max_memory_allocated() - before <= 4 * 4 * max(trained) < sum(trained)


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("version", ["x070", "x060", "x052"])
def test_loss_curves_are_those_of_the_recurrence(
    version: str, name: str, model_file: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    """In bf16, where the operators round in different places: within noise of each other over 60 steps."""
    if (reason := BACKENDS[name].supports(torch.device("cuda"), 64)) is not None:
        pytest.skip(f"{name}: {reason}")
    path, how = model_file(version=version, layers=2, width=128, head_size=64), {"max_steps": 60, "ctx_len": 128}
    got, want = (losses(path, texts, tmp_path / op, op=op, **how) for op in (name, "reference"))
    differences = [a - b for a, b in zip(got, want, strict=True)]
    assert sum(map(abs, differences)) / 60 <= 0.02
    assert abs(sum(differences)) / 60 <= 0.01  # neither learns better


@contextmanager
def without_waiting() -> Iterator[None]:
    """Raises where the CPU waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def documents(seed: int, *lengths: int) -> Batch:
    """Examples side by side, all of whose tokens are targets."""
    draw = np.random.default_rng(seed)
    rows = [(draw.integers(1, 257, n + 1).astype(np.uint16), np.arange(n + 1) > 0) for n in lengths]
    return beside([Encoded(ids, target) for ids, target in rows])


@pytest.mark.parametrize("graphs", [True, False], ids=["graph", "plain"])
@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize(
    ("version", "optim"),
    [*((version, "adamw") for version in ("x070", "x060", "x052")), ("x070", "adamw8bit"), ("x070", "paged-adamw")],
)
def test_a_step_never_waits_for_the_gpu(
    version: str, optim: str, name: str, graphs: bool, model_file: Callable[..., Path]
) -> None:
    """From the batch to the new weights, with documents that it has not seen before."""
    if (reason := BACKENDS[name].supports(torch.device("cuda"), 64)) is not None:
        pytest.skip(f"{name}: {reason}")
    model = rp.load_model(model_file(version=version, layers=3, width=256, head_size=64), "bf16", "cuda", op=name)
    rp.attach_adapter(model, rp.AdapterConfig(rank=32), ("time", "ln", "state"))
    model.draws = False
    model.grad_checkpoint = ("operator", "selective", "block")
    trained = [p for p in model.train().parameters() if p.requires_grad]
    config = rp.TrainConfig(Path("m"), ["d"], Path("o"), optim=optim).resolved()
    if optim != "adamw":
        keep_in_bf16(model)
    optimizer, engine = build_optimizer(model, config), SingleProcess()
    micro_batches, guard = MicroBatches(model, 1e-4, engine.backward, graphs), Guard(optimizer, model.like.device)
    assert not guard.waits

    def step(number: int, batch: Batch) -> Outcome:
        loss = torch.zeros((), device="cuda")
        loss += micro_batches.run(batch, len(batch.labels))
        outcome = Outcome(number, loss, engine.clip(trained, 1.0))
        guard.check(outcome)
        engine.step(optimizer, keep_gradients=graphs)
        return outcome

    batches = [documents(1, 20, 100, 45), documents(2, 90, 30, 60), documents(3, 5, 70, 103), documents(4, 61, 64, 40)]
    assert len({Shape.of(batch) for batch in batches}) == 1
    outcomes = [step(i + 1, batch) for i, batch in enumerate(batches[:3])]
    torch.cuda.synchronize()
    before = [p.detach().clone() for p in trained]
    with without_waiting():
        outcomes.append(step(4, batches[3]))
    assert all(math.isfinite(x) for outcome in outcomes for x in outcome.read())
    assert any(not torch.equal(p, was) for p, was in zip(trained, before, strict=True))


def test_waiting_is_noticed() -> None:
    x = torch.ones(3, device="cuda")
    with without_waiting(), pytest.raises(RuntimeError):
        x.sum().item()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_gpu_is_told_by_a_number_not_to_step(kind: type[torch.optim.Optimizer]) -> None:
    """AdamW; another optimiser waits."""
    p = torch.nn.Parameter(torch.ones(3, device="cuda"))
    guard = Guard(kind([p], lr=0.1, fused=True), p.device)  # type: ignore[call-arg]
    assert guard.waits == (kind is not torch.optim.AdamW)
    bad = Outcome(1, torch.tensor(math.nan, device="cuda"), torch.tensor(1.0, device="cuda"))
    if guard.waits:
        with pytest.raises(TrainingError):
            guard.check(bad)
        return
    for outcome in (bad, Outcome(2, *torch.ones(2, device="cuda"))):  # and none that comes after
        p.grad = torch.ones_like(p)
        guard.check(outcome)
        guard.optimizer.step()
        assert torch.equal(p, torch.ones_like(p))
