"""Training: what a step computes, however it is cut, and what a run leaves behind."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import rwkv_peft as rp
from conftest import difference, random_rwkv7
from rwkv_peft.adapters import read_adapter
from rwkv_peft.adapters.lora import LoraLinear
from rwkv_peft.checkpoint import read_tensors, write_tensors
from rwkv_peft.config import AdapterConfig, TrainConfig
from rwkv_peft.data.batches import Batch, padded
from rwkv_peft.data.dataset import Dataset, load_dataset, load_for_training
from rwkv_peft.data.masking import Encoded
from rwkv_peft.data.sampling import Sampler
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError, DataError, RwkvPeftError, TrainingError
from rwkv_peft.models import Rwkv
from rwkv_peft.training import step as step_module
from rwkv_peft.training.engine import SingleProcess
from rwkv_peft.training.optim import build_optimizer
from rwkv_peft.training.run import RunResult
from rwkv_peft.training.schedule import learning_rate
from rwkv_peft.training.step import batch_loss
from rwkv_peft.yaml_config import to_yaml

PAIRS = [("hi", "a"), ("how are you?", "well, thank you"), ("1+1", "2"), ("say nothing much", "no"), ("x", "y" * 40),
         ("a rather long question that takes many tokens to ask", "ok"), ("abc", "def"), ("", "z"),
         ("tell", "a story of some length"), ("2+2", "4"), ("up", "down"), ("left of it", "right")]  # fmt: skip
PENALTY = 0.05  # large, so that a mistake in it shows


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in PAIRS))
    return path


@pytest.fixture
def config(tmp_path: Path, data: Path, model_file: Callable[..., Path]) -> TrainConfig:
    """A small run, without warm-up, one example a row."""
    return TrainConfig(
        model_file(),
        [str(data)],
        tmp_path / "run",
        sampling="pad",
        rank=4,
        micro_batch=4,
        max_steps=3,
        lr=1e-3,
        warmup_steps=0,
        device="cpu",
    )


def run(config: TrainConfig, **changes: Any) -> RunResult:
    return rp.train(replace(config, **changes), Console(file=io.StringIO()))


def metrics(result: RunResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]


def adapter_bytes(result: RunResult) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in result.result.iterdir()}


# --- a step


@pytest.fixture
def model(load: Callable[..., Rwkv]) -> Rwkv:
    """With an adapter that does something, and every part training."""
    model = rp.attach_adapter(load(layers=2), AdapterConfig(rank=4), ("time", "ln", "emb", "head"))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model.train()


@pytest.fixture
def dataset(config: TrainConfig) -> Dataset:
    return load_dataset(config, Tokenizer.byte())


def gradients(model: Rwkv) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def step(model: Rwkv, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients as the loop makes them."""
    targets, total = sum(len(b.labels) for b in batches), 0.0
    for batch in batches:
        total_, loss = batch_loss(model, batch, PENALTY)
        SingleProcess().backward(total_ / targets)
        total += loss.item() / targets
    return total, gradients(model)


def by_formula(model: Rwkv, rows: list[Encoded]) -> tuple[float, dict[str, Tensor]]:
    """Each row alone, without padding: the targets' mean cross-entropy, and `PENALTY · max` at each arg-max."""
    targets, total = sum(row.targets for row in rows), 0.0
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        logits = model(ids[None, :-1])[0][0][torch.from_numpy(row.target[1:])]
        loss = F.cross_entropy(logits, ids[1:][torch.from_numpy(row.target[1:])], reduction="sum")
        largest, where = logits.detach().max(-1)
        pull = (logits.gather(-1, where[:, None])[:, 0] * largest * PENALTY).sum()
        ((loss + pull) / targets).backward()
        total += loss.item() / targets
    return total, gradients(model)


def assert_same(got: tuple[float, dict[str, Tensor]], want: tuple[float, dict[str, Tensor]], tolerance: float) -> None:
    assert abs(got[0] - want[0]) <= tolerance * abs(want[0])
    assert got[1].keys() == want[1].keys()
    errors = {n: difference(got[1][n], want[1][n]) for n in want[1]}
    assert max(errors.values()) <= tolerance, {n: e for n, e in errors.items() if e > tolerance}


SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8), (3, 3)]


def rows_of(dataset: Dataset) -> list[Encoded]:
    return [dataset.piece(i) for i in range(len(dataset.pieces))]


@pytest.mark.parametrize("sampling", ["pack", "pad", "left"])
@pytest.mark.parametrize(("micro_batch", "grad_accum"), SPLITS)
def test_a_step_is_its_formula_however_it_is_cut(
    sampling: Any, micro_batch: int, grad_accum: int, model: Rwkv, dataset: Dataset
) -> None:
    """However its rows are laid out: side by side, or padded on either side."""
    dataset = replace(dataset, ctx_len=100)  # so that a packed row holds a few
    if sampling == "left":
        sampler = Sampler(dataset, "pad", micro_batch, grad_accum, pad_side="left")
    else:
        sampler = Sampler(dataset, sampling, micro_batch, grad_accum)
    batches = sampler.step(0)
    assert len({len(b.labels) for b in batches}) > 1 or len(batches) == 1  # answers differ in length
    size = micro_batch * grad_accum
    rows = [dataset.piece(int(i)) for row in range(min(size, len(sampler.rows(0)))) for i in sampler.rows(0)[row]]
    assert sampling == "pack" or len(rows) == size
    assert sum(row.targets for row in rows) == sum(len(batch.labels) for batch in batches)
    assert_same(step(model, batches), by_formula(model, rows), 1e-5)


@pytest.mark.parametrize("chunk", [257, 257 * 5])
def test_a_step_with_the_loss_in_pieces(
    chunk: int, model: Rwkv, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Sampler(dataset, "pad", 4, 2).step(0)
    want = step(model, batches)
    monkeypatch.setattr("rwkv_peft.ops.loss.MOST_LOGITS", chunk)
    assert_same(step(model, batches), want, 1e-5)


def test_padding_changes_nothing(model: Rwkv, dataset: Dataset) -> None:
    """Not even its content: a long row beside short ones is the sum of each alone."""
    rows = sorted(rows_of(dataset), key=lambda row: -row.inputs)
    rows = [rows[0], *rows[-3:]]
    batch = padded(rows)
    padding = torch.arange(batch.tokens.shape[1])[None] >= torch.tensor([[row.inputs] for row in rows])
    assert padding.sum() > 100
    assert not bool(batch.tokens[padding].any())
    got = step(model, [batch])
    other = replace(batch, tokens=batch.tokens.masked_fill(padding, 200))
    assert other.tokens[1, -1] == 200
    again = step(model, [other])
    assert again[0] == got[0]
    assert all(torch.equal(again[1][n], got[1][n]) for n in got[1] if n != "emb.weight")
    assert_same(again, got, 1e-6)
    assert_same(step(model, [padded([row]) for row in rows]), got, 1e-5)


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e9])
def test_clipping(max_norm: float, model: Rwkv, dataset: Dataset) -> None:
    batch = Sampler(dataset, "pad", 4).step(0)[0]
    batch_loss(model, batch, 0.0)[0].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.grad.clone() for p in trained if p.grad is not None]
    want = math.sqrt(sum(float(g.double().square().sum()) for g in before))
    norm = SingleProcess().clip(trained, max_norm)
    assert float(norm) == pytest.approx(want, rel=1e-5)
    scale = min(1.0, max_norm / want) if max_norm else 1.0
    for p, g in zip(trained, before, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, g * scale)


# --- schedule and optimiser

SCHEDULE = {"lr": 1.0, "lr_final": 0.1, "warmup_steps": 4}


@pytest.mark.parametrize(
    ("settings", "total", "rates"),
    [
        (SCHEDULE, 9, [0.25, 0.5, 0.75, 1.0, 1.0, 0.868198, 0.55, 0.231802, 0.1]),
        ({**SCHEDULE, "warmup_steps": 0}, 3, [1.0, 0.55, 0.1]),
        ({**SCHEDULE, "schedule": "constant"}, 6, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ({**SCHEDULE, "warmup_steps": 10}, 3, [0.1, 0.2, 0.3]),
        ({**SCHEDULE, "warmup_steps": 0}, 1, [1.0]),
        ({**SCHEDULE, "warmup_steps": 0, "lr_final": 2.0}, 3, [1.0, 1.5, 2.0]),
        ({**SCHEDULE, "lr_final": 0.0, "warmup_steps": 1}, 4, [1.0, 1.0, 0.5, 0.0]),
    ],
)
def test_schedule(settings: dict[str, Any], total: int, rates: list[float], config: TrainConfig) -> None:
    config = replace(config, **settings)
    assert [learning_rate(config, i, total) for i in range(total)] == pytest.approx(rates, abs=1e-6)


def test_the_schedule_is_what_a_run_uses(config: TrainConfig) -> None:
    config = replace(config, max_steps=5, warmup_steps=2, lr=1e-3, lr_final=1e-4)
    assert [m["lr"] for m in metrics(run(config))] == [learning_rate(config, i, 5) for i in range(5)]


def test_weight_decay_is_on_matrices_only(config: TrainConfig, load: Callable[..., Rwkv]) -> None:
    model = rp.attach_adapter(load(), AdapterConfig(rank=4), ("time", "ln", "emb", "head"))
    optimizer = build_optimizer(model, replace(config, lr=0.1, weight_decay=0.5, betas=(0.8, 0.95), adam_eps=1e-7))
    assert all((g["betas"], g["eps"]) == ((0.8, 0.95), 1e-7) for g in optimizer.param_groups)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # so that decay is all that happens
    optimizer.step()
    decayed = {"emb.weight", "head.weight", *(n for n in before if n.endswith(".lora_A.weight"))}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if name in decayed else 1.0), msg=name)


def test_full_tuning_decays_no_vector(config: TrainConfig, load: Callable[..., Rwkv]) -> None:
    model = load()
    groups = build_optimizer(model, replace(config, weight_decay=0.5)).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    matrices = ("emb", "head", "receptance", "key", "value", "output")
    assert decayed == {n for n in names.values() if n.endswith(tuple(f"{m}.weight" for m in matrices))}
    assert sum(len(g["params"]) for g in groups) == len(names)


# --- a run


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2}, {"grad_accum": 2, "micro_batch": 2}], ids=str)
def test_same_seed_same_run(settings: dict[str, Any], config: TrainConfig, tmp_path: Path) -> None:
    one, two = (run(config, out=tmp_path / name, **settings) for name in ("one", "two"))
    assert one.losses == two.losses == [m["loss"] for m in metrics(one)]
    assert [m["grad_norm"] for m in metrics(one)] == [m["grad_norm"] for m in metrics(two)]
    assert adapter_bytes(one) == adapter_bytes(two)
    other = run(config, out=tmp_path / "three", seed=1, **settings)
    assert other.losses != one.losses
    assert adapter_bytes(other) != adapter_bytes(one)


def test_a_run_does_not_depend_on_how_its_steps_are_cut(config: TrainConfig, tmp_path: Path) -> None:
    """Also after the optimiser: from rows 8×1, 4×2 and 2×4."""
    results = [
        run(
            config,
            out=tmp_path / f"{m}x{a}",
            micro_batch=m,
            grad_accum=a,
            logit_penalty=PENALTY,
            train_parts=("time", "ln"),
        )
        for m, a in SPLITS[:3]
    ]
    first = metrics(results[0])
    for result in results[1:]:
        for got, want in zip(metrics(result), first, strict=True):
            assert got["tokens"] == want["tokens"]
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
    assert len({m["loss"] for m in first}) == 3


HOW = [*({"grad_checkpoint": mode} for mode in ("operator", "selective", "block")), {"op": "reference"}]


@pytest.mark.parametrize("settings", HOW, ids=str)
def test_how_it_is_computed_changes_nothing(settings: dict[str, Any], config: TrainConfig, tmp_path: Path) -> None:
    want, got = run(config, out=tmp_path / "a"), run(config, out=tmp_path / "b", **settings)
    assert got.losses == pytest.approx(want.losses, rel=1e-5)


def test_the_logit_penalty_reaches_the_gradient(config: TrainConfig, tmp_path: Path) -> None:
    off, on = (metrics(run(config, out=tmp_path / f"{p}", logit_penalty=p)) for p in (0.0, 1.0))
    assert on[0]["loss"] == off[0]["loss"]  # it is no part of the loss that is shown
    assert on[0]["grad_norm"] > 1.5 * off[0]["grad_norm"]


def test_loss_falls(config: TrainConfig) -> None:
    losses = run(config, max_steps=30, lr=2e-2, lr_final=2e-3, micro_batch=6).losses
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3]), losses


def test_what_a_run_leaves(config: TrainConfig) -> None:
    config = replace(config, max_steps=None, epochs=2, micro_batch=5)
    result = run(config)
    assert (result.out, result.result, result.steps) == (config.out, config.out / "adapter", 6)
    assert not result.interrupted
    names = {p.relative_to(config.out).as_posix() for p in config.out.rglob("*") if p.is_file()}
    folder = ("adapter_config.json", "adapter_model.safetensors", "parts.safetensors", "rwkv_peft.json")
    assert names == {"config.yaml", "metrics.jsonl", "loss.png", "log.txt", *(f"adapter/{name}" for name in folder)}
    assert (config.out / "config.yaml").read_text() == to_yaml(config.resolved())
    assert (config.out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    records = metrics(result)
    keys = ["step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "vram_gib", "eval_loss", "eval_perplexity"]
    assert all(list(record) == keys for record in records)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    rows = rows_of(load_dataset(config, Tokenizer.byte()))
    assert records[2]["tokens"] == sum(row.inputs for row in rows)  # one epoch, padding not counted
    assert records[5]["tokens"] == 2 * records[2]["tokens"]
    assert all(record["tokens_per_s"] > 0 for record in records)
    log = (config.out / "log.txt").read_text()
    assert "RWKV-7, 2 layers, width 64, vocabulary 257" in log
    assert "12 examples" in log
    assert log.rstrip().endswith(f"done after 6 steps: {config.out / 'adapter'}")


def test_the_adapter_is_what_was_trained(config: TrainConfig) -> None:
    """Loaded again, it gives a lower loss on the run's data than the base."""
    result = run(config, max_steps=10, lr=1e-2)
    batch = padded(rows_of(load_dataset(config, Tokenizer.byte())))
    base = rp.load_model(config.model)
    with torch.no_grad():
        before = float(batch_loss(base, batch, 0.0)[0])
        after = float(batch_loss(rp.load_adapter(base, result.result), batch, 0.0)[0])
    assert after < 0.8 * before
    assert after / len(batch.labels) == pytest.approx(result.losses[-1], rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_tuning_writes_a_model(dtype: torch.dtype, config: TrainConfig) -> None:
    """Of the base's names and number formats, layer 0's unused tensors too."""
    base = random_rwkv7(dtype=dtype, layer0_v=True)
    write_tensors(config.model, base)
    result = run(config, peft="full", max_steps=4)
    assert result.result == config.out / "model.pth"
    found = read_tensors(result.result)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in base.items()}
    same = {n for n in base if torch.equal(found[n], base[n])}
    assert same == {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}
    assert result.losses[-1] < result.losses[0]
    rp.load_model(result.result)


@pytest.mark.parametrize("peft", ["lora", "full"])
def test_bf16_is_near_float32(peft: Any, config: TrainConfig, tmp_path: Path) -> None:
    want = run(config, out=tmp_path / "fp32", peft=peft, max_steps=6)
    got = run(config, out=tmp_path / "bf16", peft=peft, max_steps=6, precision="bf16")
    assert got.losses == pytest.approx(want.losses, rel=0.02)
    assert got.losses != want.losses
    tensors = read_tensors(got.result if peft == "full" else got.result / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


# --- evaluation


def test_evaluation_while_training(config: TrainConfig, data: Path) -> None:
    """The loss on other examples is that of the model after each step; the best adapter is kept."""
    result = run(config, eval_fraction=0.25, eval_every=2, max_steps=5, lr=1e-2)
    records = metrics(result)
    assert [record["step"] for record in records if record["eval_loss"] is not None] == [2, 4, 5]
    assert list(result.eval_losses) == [2, 4, 5]
    assert all(r["eval_perplexity"] == pytest.approx(math.exp(r["eval_loss"])) for r in records if r["eval_loss"])
    assert result.best == config.out / "best" / "adapter"
    _, held = load_for_training(replace(config, eval_fraction=0.25), Tokenizer.byte())
    assert held is not None
    for folder, loss in ((result.result, result.eval_losses[5]), (result.best, min(result.eval_losses.values()))):
        model = rp.load_adapter(rp.load_model(config.model), folder)
        total = sum(by_formula(model, [row])[0] * row.targets for row in rows_of(held))
        assert total / held.target_tokens == pytest.approx(loss, rel=1e-5)
    log = (config.out / "log.txt").read_text()
    assert "eval   3 examples" in log
    assert "9 examples" in log
    assert "best after " in log


def test_evaluation_data_of_its_own(config: TrainConfig, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "hello", "response": "world"}\n')
    result = run(config, eval_data=(str(other),), max_steps=2)
    assert list(result.eval_losses) == [1, 2]
    assert "eval   1 example, " in (config.out / "log.txt").read_text()


def test_training_stops_when_it_gets_no_better(config: TrainConfig) -> None:
    """With a rate so high that the first step is the best."""
    result = run(config, eval_fraction=0.25, eval_every=1, patience=2, max_steps=40, lr=3.0, schedule="constant")
    best = min(result.eval_losses, key=lambda step: result.eval_losses[step])
    assert result.steps == best + 2 < 40
    assert not result.interrupted
    assert f"stopped, since it got no better, after {result.steps} steps" in (config.out / "log.txt").read_text()


def test_evaluating_changes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    """Not even with dropout: the run is the same as without."""
    plain = run(config, dropout=0.3, max_steps=3)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "hello", "response": "world"}\n')
    watched = run(config, dropout=0.3, max_steps=3, eval_data=(str(other),), eval_every=1, out=tmp_path / "watched")
    assert plain.losses == watched.losses
    assert adapter_bytes(plain) == adapter_bytes(watched)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_fraction": 1.0}, "--eval-fraction 1.0: must be from 0 to below 1"),
        ({"eval_fraction": 0.1, "eval_data": ("a",)}, "--eval-fraction: not with --eval-data"),
        ({"eval_every": 3}, "--eval-every: only with --eval-fraction or --eval-data"),
        ({"patience": 3}, "--patience: only with --eval-fraction or --eval-data"),
        ({"eval_fraction": 0.1, "patience": 0}, "--patience 0: must be at least 1"),
        ({"sampling": "only", "micro_batch": 2}, "--micro-batch 2: must be 1 with --sampling only"),
        ({"eval_fraction": 0.99}, "--eval-fraction 0.99: nothing of 12 examples would be left"),
    ],
)
def test_evaluation_that_cannot_be(settings: dict[str, Any], message: str, config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        run(config, **{"micro_batch": None, **settings})
    assert not config.out.exists()


# --- runs that end early


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_the_run(where: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the third step; the parameters are then those of the second, and are saved."""
    calls = []

    def poisoned(model: Rwkv, batch: Batch, penalty: float) -> tuple[Tensor, Tensor]:
        trained, loss = batch_loss(model, batch, penalty)
        calls.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        models.append(model)
        if len(calls) == 3:
            return (trained, loss * float("nan")) if where == "loss" else (trained * float("inf"), loss)
        return trained, loss

    models: list[Rwkv] = []
    monkeypatch.setattr(step_module, "batch_loss", poisoned)
    with pytest.raises(RwkvPeftError, match=rf"step 3: the {where} is (nan|inf); try a lower --lr") as caught:
        run(config, max_steps=5, logit_penalty=1.0)
    assert type(caught.value) is TrainingError
    assert str(config.out / "adapter") in str(caught.value)
    assert all(torch.equal(p, calls[2][n]) for n, p in models[0].named_parameters() if n in calls[2])
    saved = read_adapter(config.out / "adapter")
    assert all(torch.equal(t, calls[2][n]) for n, t in {**saved.tensors, **saved.parts}.items())
    assert len((config.out / "metrics.jsonl").read_text().splitlines()) == 2


def test_nan_in_the_first_step_leaves_nothing(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr(step_module, "batch_loss", lambda *args: (batch_loss(*args)[0] * nan, nan.detach()))
    with pytest.raises(RwkvPeftError, match="step 1: the loss is nan"):
        run(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data": ["nowhere.jsonl"]}, DataError),
        ({"model": Path("nowhere.pth")}, RwkvPeftError),
        ({"targets": ("qkv",)}, ConfigError),
        ({"train_parts": ("lnn",)}, ConfigError),
        ({"rank": 0}, ConfigError),
        ({"fields": ("question", "answer")}, DataError),
        ({"ctx_len": 1, "overlong": "drop"}, DataError),
        ({"tokenizer": "world"}, ConfigError),
    ],
    ids=str,
)
def test_a_failure_before_the_first_step_leaves_nothing(
    changes: dict[str, Any], error: type[Exception], config: TrainConfig
) -> None:
    with pytest.raises(error):
        run(config, **changes)
    assert not config.out.exists()


def test_a_folder_that_holds_a_run_is_left_alone(config: TrainConfig) -> None:
    run(config)
    before = {p: p.stat().st_mtime_ns for p in config.out.rglob("*")}
    with pytest.raises(ConfigError, match=r"--out \S+run: holds another run; name a new folder"):
        run(config)
    assert {p: p.stat().st_mtime_ns for p in config.out.rglob("*")} == before


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, at: int, times: int) -> None:
    """Send this process SIGINT in the middle of a step."""
    calls = []

    def interrupted(model: Rwkv, batch: Batch, penalty: float) -> tuple[Tensor, Tensor]:
        calls.append(1)
        for _ in range(times if len(calls) == at else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return batch_loss(model, batch, penalty)

    monkeypatch.setattr(step_module, "batch_loss", interrupted)


def test_ctrl_c_saves_the_adapter(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After the step in which it was pressed; what is saved is what a run of so many steps would have."""
    handler = signal.getsignal(signal.SIGINT)
    want = run(config, out=tmp_path / "want", max_steps=2, schedule="constant")
    press_ctrl_c(monkeypatch, at=2, times=1)
    result = run(config, max_steps=50, schedule="constant")
    assert (result.interrupted, result.steps) == (True, 2)
    assert adapter_bytes(result) == adapter_bytes(want)
    assert (config.out / "loss.png").exists()
    assert "stopped by hand after 2 steps" in (config.out / "log.txt").read_text()
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_twice_stops_at_once(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGINT)
    press_ctrl_c(monkeypatch, at=2, times=2)
    with pytest.raises(KeyboardInterrupt):
        run(config, max_steps=50)
    assert len((config.out / "metrics.jsonl").read_text().splitlines()) == 1
    assert not (config.out / "adapter").exists()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_in_a_thread(config: TrainConfig) -> None:
    """Where signals cannot be caught."""
    results: list[RunResult] = []
    thread = threading.Thread(target=lambda: results.append(run(config)))
    thread.start()
    thread.join()
    assert results[0].steps == 3


@pytest.mark.parametrize("broken", ["picture", "third step"])
def test_what_was_trained_is_kept_whatever_breaks(
    broken: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no more")

    whole = Sampler.step

    def batches(sampler: Sampler, step: int, *settings: Any) -> list[Batch]:
        return fail() if step == 2 else whole(sampler, step, *settings)  # type: ignore[func-returns-value]

    if broken == "picture":
        monkeypatch.setattr("rwkv_peft.training.metrics.draw_losses", fail)
    else:
        monkeypatch.setattr(Sampler, "step", batches)
    with pytest.raises(RuntimeError, match="no more"):
        run(config, max_steps=4)
    model = rp.load_adapter(rp.load_model(config.model), config.out / "adapter")
    assert any(bool(layer.lora_B.weight.any()) for layer in model.modules() if isinstance(layer, LoraLinear))
    if broken != "picture":
        assert "broken off after 2 steps" in (config.out / "log.txt").read_text()
