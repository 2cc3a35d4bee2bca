"""Optimisers and schedules: which parameter learns at which rate, by which rule, and what survives a restart."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import rwkv_peft as rp
from conftest import difference, random_tokens
from rwkv_peft.config import AdapterConfig, TrainConfig
from rwkv_peft.errors import ConfigError
from rwkv_peft.models import Rwkv
from rwkv_peft.training.engine import SingleProcess
from rwkv_peft.training.optim import (
    build_optimizer,
    check_optimizer,
    keep_in_bf16,
    lr_scale,
    parameter_groups,
    set_rates,
)
from rwkv_peft.training.schedule import learning_rate, weight_decay

ROOT = Path(__file__).parents[1]
EVERYWHERE = ("adamw", "adamw8bit", "adafactor", "muon")
PAGED = ("paged-adamw", "paged-adamw8bit")
PARTS = ("time", "ln", "emb", "head", "state", "shift")
MATRICES = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
on_a_gpu = pytest.param("cuda", marks=gpu)


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(Path("base.pth"), [Path("data.jsonl")], Path("run"), **changes).resolved()


# --- schedules

LINES = {"lr": 1.0, "lr_final": 0.1, "warmup_steps": 4}


def rates(total: int, **changes: Any) -> list[float]:
    config = settings(**{**LINES, **changes})
    return [learning_rate(config, step, total) for step in range(total)]


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_ends_are_exact(schedule: str, warmup: int) -> None:
    """With rates that no power of two divides."""
    lr, final, total = 0.0003, 0.00007, 53
    got = rates(total, schedule=schedule, warmup_steps=warmup, lr=lr, lr_final=final)
    assert got[0] == (pytest.approx(lr / warmup, rel=1e-15) if warmup else lr)
    assert got[max(0, warmup - 1)] == got[warmup] == max(got) == lr
    assert got[-1] == (lr if schedule == "constant" else final)


@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_are_their_formulas(warmup: int) -> None:
    total, after = 30, range(warmup, 30)
    rise = [(i + 1) / 4 for i in range(warmup)]
    length = total - 1 - warmup
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * (i - warmup) / length)) / 2 for i in after]
    linear = [1 - 0.9 * (i - warmup) / length for i in after]
    wsd = [1.0 if i <= 23 else 1 - 0.9 * (i - 23) / 6 for i in after]  # a fifth of 30 steps is below the peak
    for name, want in {"cosine": cosine, "linear": linear, "wsd": wsd, "constant": [1.0] * len(after)}.items():
        assert rates(total, schedule=name, warmup_steps=warmup) == pytest.approx(rise + want, abs=1e-12), name


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_rises_then_falls(schedule: str) -> None:
    got = np.array(rates(101, schedule=schedule, warmup_steps=10))
    assert (np.diff(got[:10]) > 0).all()
    assert (np.diff(got[10:]) <= 0).all()
    assert (np.diff(got[81:]) < 0).all()
    assert (np.diff(rates(20, schedule=schedule, lr_final=3.0)) >= 0).all()  # one may also end above


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_runs_without_room(schedule: str) -> None:
    """A warm-up longer than the run just rises; as long as the run, it ends at the peak, as does a run of one step."""
    assert rates(3, schedule=schedule, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])
    assert rates(4, schedule=schedule) == [0.25, 0.5, 0.75, 1.0]
    assert rates(5, schedule=schedule) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(6, schedule=schedule)[4:] == [1.0, 1.0 if schedule == "constant" else 0.1]
    assert rates(1, schedule=schedule, warmup_steps=0) == [1.0]
    assert rates(2, schedule=schedule, warmup_steps=0) == [1.0, 1.0 if schedule == "constant" else 0.1]


@pytest.mark.parametrize(("share", "falling"), [(0, 0), (0.05, 2), (0.25, 10), (0.5, 20), (0.9, 35), (1, 35)])
def test_wsd_falls_over_its_share(share: float, falling: int) -> None:
    """Of all 40 steps; where the warm-up leaves less, over what is left after one at the peak."""
    got = rates(40, schedule="wsd", wsd_decay=share)
    assert got[3 : 40 - falling] == [1.0] * (37 - falling)
    assert got[40 - falling :] == pytest.approx([1 - 0.9 * (i + 1) / falling for i in range(falling)])
    assert got[-1] == (0.1 if share else 1.0)


def test_weight_decay_follows_a_cosine() -> None:
    config = settings(weight_decay=0.3, weight_decay_final=0.01)
    got = [weight_decay(config, step, 31) for step in range(31)]
    assert (got[0], got[-1]) == (0.3, 0.01)
    assert got == pytest.approx([0.01 + 0.29 * (1 + math.cos(math.pi * i / 30)) / 2 for i in range(31)], abs=1e-12)
    assert weight_decay(config, 0, 1) == 0.3
    assert {weight_decay(settings(weight_decay=0.3), step, 7) for step in range(7)} == {0.3}
    growing = settings(weight_decay=0.0, weight_decay_final=0.1)
    assert [weight_decay(growing, step, 3) for step in range(3)] == pytest.approx([0.0, 0.05, 0.1])


# --- groups


def named_groups(model: nn.Module, groups: list[dict[str, Any]]) -> dict[tuple[float, bool, bool], set[str]]:
    """Names by (lr_scale, decays, muon); every trained parameter is in one group, once."""
    names = {p: n for n, p in model.named_parameters()}
    listed = [p for g in groups for p in g["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {p for p in model.parameters() if p.requires_grad}
    found = {(g["lr_scale"], g["decays"], g["muon"]): {names[p] for p in g["params"]} for g in groups}
    assert len(found) == len(groups)
    return found


def test_groups_of_full_tuning(load: Callable[..., Rwkv]) -> None:
    model = load()
    matrices = {f"blocks.{i}.{name}.weight" for i in range(2) for name in MATRICES}
    w0 = {f"blocks.{i}.att.w0" for i in range(2)}
    rest = {n for n, _ in model.named_parameters()} - matrices - w0 - {"emb.weight", "head.weight"}
    assert {"blocks.1.att.w1", "blocks.0.att.r_k", "blocks.0.ln0.weight", "blocks.1.att.ln_x.bias"} < rest
    got = named_groups(model, parameter_groups(model, settings(peft="full")))
    large = matrices | {"emb.weight", "head.weight"}
    assert got == {(1.0, True, False): large, (2.0, False, False): w0, (1.0, False, False): rest}
    plain = named_groups(model, parameter_groups(model, settings(peft="full", layerwise_lr=False)))
    assert plain == {(1.0, True, False): large, (1.0, False, False): rest | w0}
    muon = named_groups(model, parameter_groups(model, settings(peft="full", optim="muon")))
    assert muon == {
        (1.0, True, True): matrices,
        (1.0, True, False): {"emb.weight", "head.weight"},
        (2.0, False, False): w0,
        (1.0, False, False): rest,
    }


def test_groups_of_lora_and_parts(load: Callable[..., Rwkv]) -> None:
    model = rp.attach_adapter(load(), AdapterConfig(rank=4), ("time", "ln", "state", "shift"))
    blocks = [f"blocks.{i}." for i in range(2)]
    lora = {f"{b}{name}.lora_{x}.weight" for b in blocks for name in MATRICES for x in "AB"}
    states = {b + s for b in blocks for s in ("att.time_state", "att.shift_state", "ffn.shift_state")}
    vectors = {n for n, p in model.named_parameters() if p.requires_grad} - lora - states
    assert {"blocks.0.att.w0", "blocks.1.att.v0", "blocks.0.ffn.x_k", "ln_out.weight"} < vectors
    got = named_groups(model, parameter_groups(model, settings(lr=0.5, lr_state=2.0)))
    assert got == {(1.0, True, False): lora, (4.0, False, False): states, (1.0, False, False): vectors}
    w0 = {f"{b}att.w0" for b in blocks}
    got = named_groups(model, parameter_groups(model, settings(lr=0.5, lr_state=0.5, layerwise_lr=True, optim="muon")))
    assert got == {
        (1.0, True, True): lora,
        (2.0, False, False): w0,
        (1.0, False, False): states | (vectors - w0),
    }


@pytest.mark.parametrize(
    ("config", "decays", "muon"),
    [
        (AdapterConfig("bone", rank=8), "miss_block", "miss_block"),
        (AdapterConfig("bat", rank=8), "bat_block", None),  # a pile of small matrices is none of Muon's
        (AdapterConfig("lora", rank=1), None, None),  # one row is a vector
        (AdapterConfig("lora", rank=2, dora=True), "lora_[AB].weight", "lora_[AB].weight"),
    ],
    ids=["bone", "bat", "rank 1", "dora"],
)
def test_groups_of_other_adapters(
    config: AdapterConfig, decays: str | None, muon: str | None, load: Callable[..., Rwkv]
) -> None:
    model = rp.attach_adapter(load(), config, ("time",))
    got = named_groups(model, parameter_groups(model, settings(optim="muon")))
    trained = set().union(*got.values())
    for kind, want in (1, decays), (2, muon):
        names = set().union(*(names for key, names in got.items() if key[kind]))
        assert names == {n for n in trained if want and re.search(rf"\.{want}$", n)}


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("blocks.3.att.w0", 2.0),
        ("blocks.3.att.time_decay", 2.0),
        ("blocks.3.att.w1", 1.0),
        ("blocks.3.att.time_decay_w1", 1.0),
        ("blocks.3.att.time_faaaa", 1.0),
        ("blocks.3.att.time_maa_w", 1.0),
        ("blocks.3.att.time_mix_k", 1.0),
        ("blocks.3.att.key.weight", 1.0),
        ("emb.weight", 1.0),
    ],
)
def test_layerwise_rates_are_the_originals(name: str, scale: float) -> None:
    assert lr_scale(name, settings(peft="full")) == scale
    assert lr_scale(name, settings()) == 1.0


def test_rates_of_each_group_at_each_step(load: Callable[..., Rwkv]) -> None:
    """A learned state falls from its own peak by the same factor, by default to a tenth."""
    model = rp.attach_adapter(load(), AdapterConfig(rank=4), ("time", "state"))
    config = settings(
        lr=2e-3, lr_state=0.5, layerwise_lr=True, weight_decay=0.2, weight_decay_final=0.1, schedule="wsd"
    )
    optimizer = build_optimizer(model, config)
    assert sorted(g["lr"] for g in optimizer.param_groups) == pytest.approx([2e-3, 2e-3, 4e-3, 0.5])
    for step in range(20):
        assert set_rates(optimizer, config, step, 20) == learning_rate(config, step, 20)
        for g in optimizer.param_groups:
            assert g["lr"] == learning_rate(config, step, 20) * g["lr_scale"]
            assert g["weight_decay"] == (weight_decay(config, step, 20) if g["decays"] else 0.0)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([2e-4, 4e-4, 0.05])
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.1, 0.0}


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 500.0),
        ({"peft": "state"}, 1.0),
        ({"peft": "state", "lr": 0.5}, 1.0),
        ({"peft": "state", "lr_state": 2.0}, 1.0),
    ],
    ids=str,
)
def test_rate_of_learned_states(changes: dict[str, Any], scale: float) -> None:
    assert lr_scale("blocks.0.att.time_state", settings(**changes)) == pytest.approx(scale)


def test_a_run_sets_the_rates_before_each_step(
    tmp_path: Path, model_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "some text to learn"}\n' * 8)
    seen: list[list[tuple[float, float]]] = []

    def step(engine: SingleProcess, optimizer: torch.optim.Optimizer, keep_gradients: bool) -> None:
        seen.append([(g["lr"], g["weight_decay"]) for g in optimizer.param_groups])
        optimizer.step()

    monkeypatch.setattr(SingleProcess, "step", step)
    config = TrainConfig(
        model_file(), [tmp_path / "data.jsonl"], tmp_path / "run", peft="full", max_steps=4, micro_batch=2,
        weight_decay=0.4, weight_decay_final=0.2, warmup_steps=2, lr=1e-3, schedule="linear", device="cpu",
    )  # fmt: skip
    rp.train(config, Console(file=io.StringIO()))
    config = config.resolved()
    for i, groups in enumerate(seen):
        lr, decay = learning_rate(config, i, 4), weight_decay(config, i, 4)
        assert set(groups) == {(lr, decay), (2 * lr, 0.0), (lr, 0.0)}
    assert len(seen) == 4


# --- optimisers


def tuned(load: Callable[..., Rwkv], device: str = "cpu", **sizes: Any) -> Rwkv:
    """A model with LoRA and every part training."""
    torch.manual_seed(3)
    return rp.attach_adapter(load(**sizes), AdapterConfig(rank=4), PARTS).to(device).train()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def loss_of(model: Rwkv) -> Tensor:
    tokens = random_tokens(257, 2, 17).to(model.like.device)
    return F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator).to(p)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, steps: range) -> None:
    """Steps of a run of 20 with random gradients."""
    for step in steps:
        give_gradients(model, step)
        set_rates(optimizer, config, step, 20)
        SingleProcess().step(optimizer)


@pytest.mark.parametrize("device", ["cpu", on_a_gpu])
@pytest.mark.parametrize("peft", ["lora", "full"])
@pytest.mark.parametrize("optim", EVERYWHERE)
def test_learns(optim: str, peft: str, device: str, load: Callable[..., Rwkv]) -> None:
    """30 steps halve a loss and move every parameter."""
    model = tuned(load, device) if peft == "lora" else load().to(device)
    config = settings(peft=peft, optim=optim, lr=3e-3, lr_state=3e-2, warmup_steps=3)
    optimizer = build_optimizer(model, config)
    before, losses = trained(model), []
    for step in range(30):
        loss = loss_of(model)
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        set_rates(optimizer, config, step, 30)
        SingleProcess().step(optimizer)
    assert losses[-1] < 0.5 * losses[0], losses
    assert not [n for n, p in trained(model).items() if torch.equal(p, before[n])]


@pytest.mark.parametrize("optim", EVERYWHERE)
def test_only_matrices_decay(optim: str, load: Callable[..., Rwkv]) -> None:
    """By rate times decay: what a step without a gradient leaves of them."""
    model = tuned(load)
    give_gradients(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.copy_(p.grad)  # also what begins at zero
                p.grad.zero_()
    before = trained(model)
    build_optimizer(model, settings(optim=optim, lr=0.1, weight_decay=0.5)).step()
    decayed = {n for n in before if n in ("emb.weight", "head.weight") or ".lora_" in n}
    for name, p in trained(model).items():
        torch.testing.assert_close(p, before[name] * (0.95 if name in decayed else 1.0), msg=name)


@pytest.mark.parametrize(
    ("optim", "device"),
    [("adamw", "cpu"), pytest.param("adamw", "cuda", marks=gpu), pytest.param("paged-adamw", "cuda", marks=gpu)],
)
def test_adamw_is_its_formula(optim: str, device: str, load: Callable[..., Rwkv]) -> None:
    """Loshchilov & Hutter 2019 (arXiv 1711.05101) in float64."""
    model = tuned(load, device)
    config = settings(optim=optim, lr=1e-2, lr_state=0.05, layerwise_lr=True, weight_decay=0.1, weight_decay_final=0.3)
    (b1, b2), eps = config.betas, config.adam_eps
    want = {n: (p.double().cpu(), 0.0, 0.0) for n, p in trained(model).items()}
    optimizer = build_optimizer(model, config)
    groups = {p: g for g in optimizer.param_groups for p in g["params"]}
    for step in range(20):
        take_steps(model, optimizer, config, range(step, step + 1))
        give_gradients(model, step)
        for name, p in model.named_parameters():
            if p.grad is not None:
                x, m, v = want[name]
                g, group = p.grad.double().cpu(), groups[p]
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
                move = group["lr"] * m / (1 - b1 ** (step + 1)) / ((v / (1 - b2 ** (step + 1))).sqrt() + eps)
                keep = 1 - group["lr"] * group["weight_decay"]
                want[name] = keep * x - move, m, v
    errors = {n: difference(p.cpu(), want[n][0]) for n, p in trained(model).items()}
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("device", ["cpu", on_a_gpu])
def test_adamw_in_8_bits_is_near(device: str, load: Callable[..., Rwkv]) -> None:
    """Small tensors, which it keeps in 32 bits, exactly so; large ones within a tenth of the way that they went."""
    config = settings(lr=1e-2)
    models = [tuned(load, device) for _ in range(2)]
    start = trained(models[0])
    for model, optim in zip(models, ("adamw", "adamw8bit"), strict=True):
        take_steps(model, build_optimizer(model, replace(config, optim=optim)), config, range(20))
    want, got = (trained(model) for model in models)
    off = {n: float((got[n] - want[n]).norm() / (want[n] - start[n]).norm()) for n in want}
    assert max(error for n, error in off.items() if want[n].numel() < 4096) < 1e-5, off
    assert 1e-4 < off["emb.weight"] < 0.1, off


def test_muon_takes_the_matrices(load: Callable[..., Rwkv]) -> None:
    """And AdamW the rest, each as torch's own would alone."""
    config = settings(optim="muon", lr=1e-2, lr_state=0.05, weight_decay=0.1, betas=(0.8, 0.95), adam_eps=1e-6)
    model, alone = tuned(load), tuned(load)
    groups = parameter_groups(alone, config)
    muon = torch.optim.Muon([g for g in groups if g["muon"]], adjust_lr_fn="match_rms_adamw")
    others = torch.optim.AdamW([g for g in groups if not g["muon"]], betas=(0.8, 0.95), eps=1e-6, fused=True)
    take_steps(model, build_optimizer(model, config), config, range(5))
    for step in range(5):
        give_gradients(alone, step)
        for optimizer in (others, muon):
            set_rates(optimizer, config, step, 20)
            optimizer.step()
    got, want, start = trained(model), trained(alone), trained(tuned(load))
    assert all(torch.equal(got[n], want[n]) for n in want)
    moved = (got["blocks.0.att.key.lora_B.weight"] - start["blocks.0.att.key.lora_B.weight"]).square().mean().sqrt()
    assert 0.1 < moved / sum(learning_rate(config, i, 20) for i in range(5)) < 0.4  # AdamW's steps are so long too


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8])
def test_adafactor_steps_are_as_long_as_the_rate(size: float, load: Callable[..., Rwkv]) -> None:
    """However small the gradient, and also where a tensor begins at zero."""
    model = tuned(load)
    config = settings(optim="adafactor", lr=1e-3, lr_state=1e-3)
    give_gradients(model, 0)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= size
    before = trained(model)
    build_optimizer(model, config).step()
    for name, p in trained(model).items():
        step = float((p - before[name]).square().mean().sqrt())
        assert step == pytest.approx(1e-3 * max(1.0, float(before[name].square().mean().sqrt())), rel=0.05), name


# --- state


def assert_continues(optim: str, master: str, device: str, load: Callable[..., Rwkv]) -> torch.optim.Optimizer:
    """A new optimiser with the state of another, through a file, goes on as that one does, bit for bit; that one."""
    config = settings(optim=optim, lr=1e-2, weight_decay=0.1, master_weights=master, precision="bf16")
    one, two = tuned(load, device, vocab_size=1024), tuned(load, device, vocab_size=1024)
    if master == "bf16":
        keep_in_bf16(one)
        keep_in_bf16(two)
    first, second = build_optimizer(one, config), build_optimizer(two, config)
    take_steps(one, first, config, range(3))
    take_steps(two, second, config, range(1))  # what it has is replaced
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(torch.load(file, weights_only=True))
    for model, optimizer in (one, first), (two, second):
        take_steps(model, optimizer, config, range(3, 6))
    got, want = trained(two), trained(one)
    assert not [n for n in want if not torch.equal(got[n], want[n])]
    return second


@pytest.mark.parametrize("device", ["cpu", on_a_gpu])
@pytest.mark.parametrize(
    ("optim", "master"), [*((optim, "fp32") for optim in EVERYWHERE), ("adamw", "bf16"), ("adamw8bit", "bf16")]
)
def test_state_continues_exactly(optim: str, master: str, device: str, load: Callable[..., Rwkv]) -> None:
    assert_continues(optim, master, device, load)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("master", ["fp32", "bf16"])
@pytest.mark.parametrize("optim", PAGED)
def test_paged_state(optim: str, master: str, load: Callable[..., Rwkv]) -> None:
    """Large tensors have it, after `load_state_dict` too; it changes no result, and it continues exactly."""
    config = settings(optim=optim, lr=1e-2)
    models = [tuned(load, "cuda", vocab_size=4096) for _ in range(2)]
    optimizers = [build_optimizer(m, replace(config, optim=o)) for m, o in zip(models, (optim, optim[6:]), strict=True)]
    for model, optimizer in zip(models, optimizers, strict=True):
        take_steps(model, optimizer, config, range(5))
    got, want = (trained(model) for model in models)
    assert max(difference(got[n], want[n]) for n in want) < 1e-6
    for optimizer in optimizers[0], assert_continues(optim, master, "cuda", load):
        large = [p for g in optimizer.param_groups for p in g["params"] if p.numel() >= 4096]
        assert len(large) >= 2
        assert all(optimizer.state[p][name].is_pinned() for p in large for name in "mv")


# --- parameters in bf16


@pytest.mark.parametrize("device", ["cpu", on_a_gpu])
@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
def test_learns_in_bf16(optim: str, device: str, load: Callable[..., Rwkv]) -> None:
    """As `test_learns`: matrices in bf16, gradients too; vectors, mixes' own matrices and states in float32."""
    model = rp.attach_adapter(load("bf16", width=128), AdapterConfig(rank=64), PARTS).to(device).train()
    config = settings(optim=optim, lr=3e-3, lr_state=3e-2, warmup_steps=3, master_weights="bf16", precision="bf16")
    keep_in_bf16(model)
    short = {n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.bfloat16}
    assert short == {n for n in trained(model) if n in ("emb.weight", "head.weight") or ".lora_" in n}
    assert "blocks.0.att.w1" not in short
    optimizer = build_optimizer(model, config)
    before, losses = trained(model), []
    for step in range(30):
        loss = loss_of(model)
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)
        SingleProcess().clip([p for p in model.parameters() if p.requires_grad], 1.0)
        set_rates(optimizer, config, step, 30)
        SingleProcess().step(optimizer)
    assert losses[-1] < 0.5 * losses[0], losses
    assert not [n for n, p in trained(model).items() if torch.equal(p, before[n])]


def test_the_norm_of_mixed_gradients_is_exact_and_clipped() -> None:
    """bf16 would round it to three digits."""
    parts = [torch.nn.Parameter(torch.zeros(n, dtype=d)) for n, d in ((3000, torch.bfloat16), (500, torch.float32))]
    for p in parts:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p.dtype)
    want = torch.cat([p.grad.double() for p in parts]).norm()
    assert float(SingleProcess().clip(parts, 0.0)) == pytest.approx(float(want), rel=1e-6)
    assert float(SingleProcess().clip(parts, 2.0)) == pytest.approx(float(want), rel=1e-6)
    assert float(torch.cat([p.grad.double() for p in parts]).norm()) == pytest.approx(2.0, rel=5e-3)


@pytest.mark.parametrize("peft", ["lora", "pissa", "bone", "bat", "full"])
def test_a_run_in_bf16(peft: str, tmp_path: Path, model_file: Callable[..., Path]) -> None:
    """Its adapter is in float32, loads again and trains on; a full run's file has the base's number formats."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "some text to learn"}\n' * 8)
    base = model_file(width=128, dtype=torch.bfloat16)
    config = TrainConfig(
        base, [data], tmp_path / "run", peft=peft, rank=64, max_steps=3, micro_batch=2, lr=1e-2, device="cpu",
        master_weights="bf16", precision="bf16", train_parts=("none",) if peft == "full" else ("time", "head"),
    )  # fmt: skip
    done = rp.train(config, Console(file=io.StringIO()))
    assert done.losses[-1] < done.losses[0]
    if peft == "full":
        before, after = (torch.load(path, weights_only=True) for path in (base, done.result))
        assert {n: x.dtype for n, x in before.items()} == {n: x.dtype for n, x in after.items()}
        assert not torch.equal(before["blocks.0.att.key.weight"], after["blocks.0.att.key.weight"])
        return
    tensors = {
        name: x for file in done.result.glob("*.safetensors") for name, x in safetensors.torch.load_file(file).items()
    }
    assert {x.dtype for x in tensors.values()} == {torch.float32}
    head = tensors["head.weight"]
    assert torch.equal(head, head.bfloat16().float())
    again = replace(config, adapter=done.result, out=tmp_path / "again", train_parts=("none",))
    assert rp.train(again, Console(file=io.StringIO())).losses[0] < done.losses[0]


def test_a_run_takes_steps_early_where_it_can(
    tmp_path: Path, model_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without clipping; it is the same run, and the engine has no step to take."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "some text to learn"}\n' * 8)
    config = TrainConfig(
        model_file(), [data], tmp_path / "one", optim="adamw8bit", clip=1e9, max_steps=3, micro_batch=2, device="cpu"
    )
    want = rp.train(config, Console(file=io.StringIO()))
    monkeypatch.setattr(SingleProcess, "step", None)
    got = rp.train(replace(config, clip=0, out=tmp_path / "two"), Console(file=io.StringIO()))
    assert got.losses == want.losses
    records = [(run.out / "metrics.jsonl").read_text().splitlines() for run in (want, got)]
    norms = [[json.loads(line)["grad_norm"] for line in lines] for lines in records]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_lengths_of_rows_are_taken_in_float32(load: Callable[..., Rwkv]) -> None:
    """DoRA's, of bf16 factors."""
    layer = rp.attach_adapter(load(width=128), AdapterConfig(rank=64, dora=True)).blocks[0].att.key
    torch.nn.init.normal_(layer.lora_B.weight)
    keep_in_bf16(layer)
    assert layer.lora_A.weight.dtype == torch.bfloat16
    a, b = layer.lora_A.weight.double(), layer.lora_B.weight.double()
    want = (layer.base.weight.double() + layer.config.scale * b @ a).norm(dim=1)
    assert difference(layer.row_lengths(), want.float()) < 1e-5


# --- what cannot run


def refusal(model: Rwkv, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(model, settings(**changes))
    return str(caught.value)


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own AdamW is a Triton kernel on a GPU."""
    monkeypatch.setitem(sys.modules, "triton", None)
    for changes, flag in (
        ({"optim": "adamw8bit"}, "--optim adamw8bit"),
        ({"optim": "paged-adamw"}, "--optim paged-adamw"),
        ({"master_weights": "bf16"}, "--master-weights bf16"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_optimizer(settings(**changes), torch.device("cuda"))
        assert re.fullmatch(rf"{flag}: needs the package triton \(.*\); pip install triton", str(caught.value))
    check_optimizer(settings(), torch.device("cuda"))
    check_optimizer(settings(optim="adamw8bit"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optim": "muon"},
            "--optim muon, only with adamw, adamw8bit, paged-adamw and paged-adamw8bit; leave one out",
        ),
        (
            {"optim": "adafactor"},
            "--optim adafactor, only with adamw, adamw8bit, paged-adamw and paged-adamw8bit; leave one out",
        ),
        ({"precision": "fp32"}, "--precision fp32; use --precision bf16, or leave it out"),
        ({"peft": "peft:OFT"}, "--peft peft:OFT, which has its own; leave it out"),
    ],
    ids=str,
)
def test_bf16_cannot_go_with(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(master_weights="bf16", **changes).check()
    assert str(caught.value) == f"--master-weights bf16: not with {message}"


def test_bf16_is_not_for_a_run_in_fp32() -> None:
    """Nor one that is so by its device."""
    with pytest.raises(ConfigError) as caught:
        check_optimizer(settings(master_weights="bf16"), torch.device("cpu"))
    want = "not with --precision auto on cpu, where it is fp32; add --precision bf16, or leave it out"
    assert str(caught.value) == f"--master-weights bf16: {want}"
    states = TrainConfig(Path("m"), [Path("d")], Path("r"), peft="state", master_weights="bf16")
    assert states.without_effect() == ["--master-weights: no effect where no matrix trains"]


@pytest.mark.parametrize("optim", PAGED)
def test_paging_needs_a_gpu(optim: str, load: Callable[..., Rwkv]) -> None:
    want = f"--optim {optim}: needs a GPU, and the model is on cpu; use --optim {optim[6:]}"
    assert refusal(load(), optim=optim) == want


def test_an_unknown_optimiser(load: Callable[..., Rwkv]) -> None:
    known = "adamw adamw8bit paged-adamw paged-adamw8bit adafactor muon"
    assert refusal(load(), optim="sgd") == f"--optim sgd: unknown; allowed are {known}"


def test_muon_needs_its_torch_and_matrices(load: Callable[..., Rwkv], monkeypatch: pytest.MonkeyPatch) -> None:
    states = rp.attach_adapter(load(), AdapterConfig("state"))
    assert refusal(states, optim="muon") == "--optim muon: nothing that trains is a matrix; use --optim adamw"
    only = rp.attach_adapter(load(), AdapterConfig(rank=4))
    assert [g["muon"] for g in build_optimizer(only, settings(optim="muon")).param_groups] == [True]
    monkeypatch.delattr(torch.optim, "Muon")
    want = f"--optim muon: needs torch 2.9 or newer, this is {torch.__version__}; use --optim adamw"
    assert refusal(load(), optim="muon") == want


# --- the page


def test_bytes_of_state_are_those_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "optimisers.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code[0], "docs/optimisers.md", "exec"), {})
    measured = dict(re.findall(r"(\S+) +(\S+) bytes a parameter", capsys.readouterr().out))
    table = dict(re.findall(r"^\| `([^`]+)`.*?\| (\d+\.\d+) \|", page, re.MULTILINE))
    assert measured == {name: table[name] for name in EVERYWHERE}
    assert (table["paged-adamw"], table["paged-adamw8bit"]) == (measured["adamw"], measured["adamw8bit"])


def points(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Each curve's points, in the picture's own coordinates."""
    curves = re.findall(r'<g id="curve-(\w+)">\s*<path d="([^"]+)"', path.read_text(encoding="utf-8"))
    return {name: np.array(re.findall(r"[ML] (\S+) (\S+)", line), dtype=float) for name, line in curves}


def test_the_picture_shows_the_schedules(tmp_path: Path) -> None:
    """Every step is a point of its curve; drawn again, it is the same."""
    spec = importlib.util.spec_from_file_location("draw_schedules", ROOT / "tools" / "draw_schedules.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    drawn, curves = points(tool.PICTURE), tool.curves()
    assert drawn.keys() == curves.keys() == {"cosine", "linear", "wsd", "constant", "decay"}
    heights = np.concatenate([drawn[name][:, 1] for name in curves])
    values = np.concatenate([curves[name] for name in curves])
    slope, zero = np.polyfit(heights, values, 1)
    assert np.abs(slope * heights + zero - values).max() < 1e-4
    for name in curves:
        assert np.ptp(np.diff(drawn[name][:, 0])) < 1e-4
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in pictures:
        tool.draw(path)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    texts = [re.findall(r"<text[^>]*>(.*?)</text>", path.read_text()) for path in (pictures[0], tool.PICTURE)]
    assert texts[0] == texts[1]
    assert {"learning rate", "weight decay", *curves} - {"decay"} < set(texts[0])
