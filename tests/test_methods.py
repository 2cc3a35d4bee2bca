"""Every version with every method: trained, saved, loaded, merged, un-merged, run with a state."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import Tensor, nn

import rwkv_peft as rp
from conftest import PypiRwkv, difference, random_model, random_tokens
from rwkv_peft.adapters import ADAPTERS, SavedAdapter, merge_adapter, read_adapter, unmerge_adapter
from rwkv_peft.checkpoint import read_tensors
from rwkv_peft.cli import main
from rwkv_peft.config import AdapterConfig, TrainConfig
from rwkv_peft.data.batches import Batch, beside, padded
from rwkv_peft.data.masking import Encoded
from rwkv_peft.errors import ConfigError
from rwkv_peft.export.merge import changed_tensor
from rwkv_peft.models import ModelState, Rwkv
from rwkv_peft.training.run import RunResult
from rwkv_peft.training.step import batch_loss

VERSIONS = ("x070", "x070a", "x060", "x052")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"peft": "lora"},
    "lora, rank-stabilised": {"peft": "lora", "rank_stabilised": True, "alpha": 12},
    "lora and every part": {"peft": "lora", "train_parts": ("time", "ln", "emb", "head")},
    "lora and state": {"peft": "lora", "train_parts": ("time", "ln", "state")},
    "dora": {"peft": "lora", "dora": True, "train_parts": "none"},
    "pissa": {"peft": "pissa", "train_parts": "ln"},
    "pissa, exact SVD": {"peft": "pissa", "svd_iterations": 0, "train_parts": "none"},
    "bone": {"peft": "bone"},
    "bone, rank no divisor": {"peft": "bone", "rank": 5, "train_parts": "none"},
    "bat": {"peft": "bat", "train_parts": "time"},
    "bat, state and shift": {"peft": "bat", "train_parts": ("state", "shift")},
    "state": {"peft": "state"},
    "state and shift": {"peft": "state", "train_parts": "shift"},
    "state and norms": {"peft": "state", "train_parts": "ln"},
    "full": {"peft": "full", "lr": 1e-3},
    "full and state": {"peft": "full", "train_parts": "state", "lr": 1e-3},
}
TEXTS = ["the quick brown fox jumps over", "a lazy dog, and then sleeps on"]
TOKENS = random_tokens(257, 2, 21)


@dataclass
class Trained:
    """A run of 20 steps, and what it left in the trained model."""

    base: Path
    run: RunResult
    config: TrainConfig
    model: Rwkv
    """Base and adapter, loaded anew."""
    logits: Tensor
    """Of TOKENS, as the trained model had them when the run ended."""


@pytest.fixture(scope="module", params=[(v, m) for v in VERSIONS for m in METHODS], ids=lambda p: f"{p[0]}-{p[1]}")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    version, method = request.param
    folder = tmp_path_factory.mktemp("run")
    base, data = folder / "base.pth", folder / "data.jsonl"
    torch.save(random_model(version, layers=2, width=64, vocab_size=257, head_size=32), base)
    data.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    settings = {"rank": 8, "lr": 5e-3, "warmup_steps": 0, "max_steps": 20, "micro_batch": 2, **METHODS[method]}
    config = TrainConfig(base, [data], folder / "out", device="cpu", **settings)
    models: list[Rwkv] = []
    with pytest.MonkeyPatch.context() as patch:
        from rwkv_peft.training import run as training

        save = training.save
        patch.setattr(training, "save", lambda model, *rest: (models.append(model), save(model, *rest))[1])
        result = training.train(config, Console(file=io.StringIO()))
    model = rp.load_model(result.result if config.peft == "full" else base)
    if config.peft != "full":
        rp.load_adapter(model, result.result)
    return Trained(base, result, config, model, logits_of(models[0].eval()))


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens)[0]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- the table


def test_training_lowers_the_loss(trained: Trained) -> None:
    losses = trained.run.losses
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.01


def test_only_what_the_method_names_has_changed(trained: Trained) -> None:
    before = read_tensors(trained.base)
    after = {n: t for n, t in tensors_of(trained.model).items() if n in before}
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    parts = {name for part in trained.config.parts() for name in part_of(trained.model, part)} & before.keys()
    if trained.config.peft == "full":
        assert len(changed) > 0.9 * len(after)  # layer 0's v_first gates and rows of the embedding can be without use
    else:
        assert changed <= parts and len(changed) >= 0.9 * len(parts)


LENGTHS = [1, 48, 2, 17, 1, 16, 5, 33, 3, 48, 4]


def test_packed_documents_are_documents_one_by_one(trained: Trained) -> None:
    """Loss, and the gradient of everything that trains, learned states included; padded on either side too.

    In float64 exactly; in float32 to 1e-5, or as near as each document by itself is to float64 where that is less.
    """
    random, rows = np.random.default_rng(4), []
    for length in LENGTHS:
        target = random.random(length + 1) < 0.6
        target[0], target[-1] = False, True
        rows.append(Encoded(random.integers(0, 257, length + 1, np.int32), target))
    model = trained.model.requires_grad_(True) if trained.config.peft == "full" else trained.model
    double, singly = copy.deepcopy(model).double(), [padded([row]) for row in rows]
    alone, exact = gradients(model, singly), gradients(double, singly)
    layouts = [beside] if trained.config.peft != "lora" else [beside, padded, partial(padded, side="left")]
    for layout in layouts:
        together, exactly_together = gradients(model, [layout(rows)]), gradients(double, [layout(rows)])
        assert together[0] == pytest.approx(alone[0], rel=1e-5)
        assert together[1].keys() == alone[1].keys() and len(alone[1]) > 0
        for name, want in exact[1].items():
            assert distance(exactly_together[1][name], want) <= 1e-9, name
            assert distance(together[1][name], alone[1][name]) <= max(1e-5, 4 * distance(alone[1][name], want)), name
            assert distance(alone[1][name], want) <= 1e-3, name


def distance(got: Tensor, want: Tensor) -> float:
    """The norm of their difference, relative to the norm of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side_changes_no_logits(version: str, side: str, load: Callable[..., Rwkv]) -> None:
    model, random = load(version=version), np.random.default_rng(5)
    rows = [Encoded(random.integers(0, 257, n + 1, np.int32), np.ones(n + 1, np.bool_)) for n in (1, 40, 16, 7)]
    batch = padded(rows, side)
    with torch.no_grad():
        logits = model(batch.tokens, cu_seqlens=batch.cu_seqlens)[0].view(len(rows), 40, -1)
        for row, got in zip(rows, logits, strict=True):
            alone = model(torch.from_numpy(row.ids[None, :-1].astype(np.int64)))[0][0]
            real = got[: row.inputs] if side == "right" else got[-row.inputs :]
            assert difference(real, alone) <= 1e-5


def gradients(model: Rwkv, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step with these batches, and its gradients."""
    total = 0.0
    for batch in batches:
        trained, loss = batch_loss(model, batch, 0.05)
        trained.backward()
        total += float(loss.detach())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total, found


def part_of(model: Rwkv, part: str) -> list[str]:
    from rwkv_peft.adapters.trainable import part_names

    return part_names(model, part)


def test_saved_and_loaded_is_exact(trained: Trained) -> None:
    assert torch.equal(logits_of(trained.model), trained.logits)
    assert not torch.allclose(logits_of(rp.load_model(trained.base)), trained.logits)


def test_merged_is_attached(trained: Trained, tmp_path: Path) -> None:
    path = trained.run.result
    if trained.config.peft != "full":
        path = rp.merge(trained.base, trained.run.result, tmp_path / "merged.pth")
    assert difference(logits_of(rp.load_model(path)), trained.logits) <= 1e-4
    unchanged = read_tensors(trained.base).keys() - read_tensors(path).keys()
    assert not unchanged


def test_unmerging_is_exact(trained: Trained) -> None:
    before = tensors_of(trained.model)
    merge_adapter(trained.model)
    assert difference(logits_of(trained.model), trained.logits) <= 1e-4
    adapts = trained.config.peft in ADAPTERS
    assert any(not torch.equal(p, before[n]) for n, p in trained.model.named_parameters()) == adapts
    merge_adapter(trained.model)  # a second time does nothing
    assert difference(logits_of(trained.model), trained.logits) <= 1e-4
    unmerge_adapter(trained.model)
    assert all(torch.equal(p, before[n]) for n, p in trained.model.named_parameters())
    assert torch.equal(logits_of(trained.model), trained.logits)


@torch.no_grad()
def test_inference_with_state(trained: Trained) -> None:
    """In pieces, the state handed on; and packed, each document from the learned state."""
    first, state = trained.model(TOKENS[:, :9])
    second, _ = trained.model(TOKENS[:, 9:], state)
    assert difference(torch.cat((first, second), 1), trained.logits) <= 1e-5
    packed, _ = trained.model(TOKENS.view(1, -1), cu_seqlens=torch.tensor([0, 21, 42]))
    assert difference(packed.view(trained.logits.shape), trained.logits) <= 1e-5


def test_the_command_line_generates(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = [] if trained.config.peft == "full" else ["--adapter", str(trained.run.result)]
    model = str(trained.run.result if trained.config.peft == "full" else trained.base)
    flags = ["--prompt", TEXTS[0][:10], "--max-tokens", "3", "--temperature", "0", "--device", "cpu"]
    assert main(["generate", "--model", model, *adapter, *flags]) == 0
    shown = capsys.readouterr().out
    session = rp.generate(trained.model, rp.Tokenizer.byte(), TEXTS[0][:10], 3, temperature=0)
    assert shown == "".join(session) + "\n"


def test_training_goes_on_where_it_ended(trained: Trained, tmp_path: Path) -> None:
    if trained.config.peft == "full":
        config = TrainConfig(trained.run.result, trained.config.data, tmp_path / "out", peft="full", lr=1e-6)
    else:
        config = TrainConfig(trained.base, trained.config.data, tmp_path / "out", adapter=trained.run.result, lr=1e-6)
    config.max_steps, config.lr_state, config.device, config.micro_batch = 2, 1e-6, "cpu", 2
    again = rp.train(config, Console(file=io.StringIO()))
    # the loss of the last step was taken before the last change
    assert abs(again.losses[0] - trained.run.losses[-1]) < 0.5 * (trained.run.losses[0] - trained.run.losses[-1])
    assert again.losses[0] < trained.run.losses[0]
    names = sorted(p.name for p in trained.run.result.iterdir()) if trained.config.peft != "full" else []
    assert names == (sorted(p.name for p in again.result.iterdir()) if names else [])
    if names:
        was, now = read_adapter(trained.run.result), read_adapter(again.result)
        assert was.config == now.config
        assert {n: t.shape for n, t in was.tensors.items()} == {n: t.shape for n, t in now.tensors.items()}
        assert was.parts.keys() == now.parts.keys()


# --- several adapters on one base


def test_several_adapters_add_up(tmp_path: Path) -> None:
    """In any order, with parts and states of their own; attached, merged in memory and merged into a file."""
    base = tmp_path / "base.pth"
    torch.save(random_model("x060"), base)
    folders = []
    for i, (peft, parts) in enumerate(
        [("lora", ("ln",)), ("bat", ("state",)), ("pissa", ()), ("bone", ("ln", "state")), ("state", ())]
    ):
        model = rp.attach_adapter(rp.load_model(base), AdapterConfig(peft, rank=8), parts)
        disturb(model, seed=i)
        rp.save_adapter(model, tmp_path / f"a{i}")
        folders.append(tmp_path / f"a{i}")
    tensors = read_tensors(base)
    shapes = {n: torch.zeros(2, 32, 32) for i in (0, 1) for n in [f"blocks.{i}.att.time_state"]}
    want = {n: t.double() for n, t in (tensors | shapes).items()}
    for folder in folders:
        adapter = read_adapter(folder)
        for name in list(want):
            tensor = changed_tensor(name, tensors.get(name), adapter)
            if tensor is not None:
                want[name] = want[name] + (tensor.double() - tensors.get(name, torch.zeros(())).double())
    torch.save({n: t.float() for n, t in want.items()}, tmp_path / "want.pth")
    logits = logits_of(rp.load_model(tmp_path / "want.pth"))

    for order in (folders, folders[::-1]):
        model = rp.load_model(base)
        for folder in order:
            rp.load_adapter(model, folder)
        assert difference(logits_of(model), logits) <= 1e-5
        merge_adapter(model)
        assert difference(logits_of(model), logits) <= 1e-5
        merged = rp.merge(base, order, tmp_path / "merged.pth", overwrite=True)
        assert difference(logits_of(rp.load_model(merged)), logits) <= 1e-5
    with pytest.raises(ConfigError, match="has several adapters"):
        rp.save_adapter(model, tmp_path / "all")
    argv = ["--model", str(base), *(x for f in folders for x in ("--adapter", str(f)))]
    assert main(["generate", *argv, "--prompt", "a", "--max-tokens", "1", "--device", "cpu"]) == 0
    assert main(["merge", str(base), *map(str, folders), str(tmp_path / "m2.pth")]) == 0
    assert (tmp_path / "m2.pth").read_bytes() == (tmp_path / "merged.pth").read_bytes() or difference(
        logits_of(rp.load_model(tmp_path / "m2.pth")), logits
    ) <= 1e-5


def disturb(model: nn.Module, seed: int = 6) -> nn.Module:
    """Change all that trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


# --- states


@pytest.mark.parametrize("version", VERSIONS)
def test_state_tuning_changes_only_the_state(version: str, tmp_path: Path, pypi_rwkv: PypiRwkv) -> None:
    base, data = tmp_path / "base.pth", tmp_path / "data.jsonl"
    torch.save(random_model(version, layers=3, width=64, head_size=32), base)
    before = base.read_bytes()
    data.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    argv = ["train", "--model", str(base), "--data", str(data), "--out", str(tmp_path / "out"), "--peft", "state"]
    assert main([*argv, "--max-steps", "8", "--device", "cpu"]) == 0
    assert base.read_bytes() == before
    folder = tmp_path / "out" / "adapter"
    assert {p.name for p in folder.iterdir()} == {"rwkv_peft.json", "state.pth"}
    state = torch.load(folder / "state.pth", weights_only=True)
    assert {n: (tuple(t.shape), t.dtype) for n, t in state.items()} == {
        f"blocks.{i}.att.time_state": ((2, 32, 32), torch.float32) for i in range(3)
    }
    assert all(bool(t.any()) for t in state.values())

    model = rp.load_model(base)
    start = rp.load_state(folder / "state.pth")
    with torch.no_grad():
        want, _ = model(TOKENS[:1], start)
    assert torch.equal(logits_of(rp.load_adapter(model, folder), TOKENS[:1]), want)
    merged = rp.merge(base, folder, tmp_path / "merged.pth")
    if model.version.startswith("x070"):
        theirs, *_ = pypi_rwkv(base, TOKENS[0].tolist(), wkv=start.wkv[:, 0])
    else:
        theirs, *_ = pypi_rwkv(merged, TOKENS[0].tolist())
    assert difference(theirs, want[0]) <= 1e-4
    assert difference(theirs, logits_of(rp.load_model(base), TOKENS[:1])[0]) > 1e-3


@pytest.mark.parametrize("version", ["x070", "x052"])
def test_generate_begins_with_a_state_file(version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.pth"
    torch.save(random_model(version), base)
    model = rp.load_model(base)
    zeros = ModelState.zeros(model)
    state = ModelState(torch.randn_like(zeros.wkv) * 3, torch.randn_like(zeros.shift))
    rp.save_state(state, tmp_path / "s.pth")
    flags = ["--prompt", "Hello", "--max-tokens", "12", "--temperature", "0", "--device", "cpu"]
    assert main(["generate", "--model", str(base), "--state", str(tmp_path / "s.pth"), *flags]) == 0
    want = "".join(rp.generate(model, rp.Tokenizer.byte(), "Hello", 12, temperature=0, state=state))
    assert capsys.readouterr().out == want + "\n"
    assert want != "".join(rp.generate(model, rp.Tokenizer.byte(), "Hello", 12, temperature=0))
    torch.save(random_model(version, layers=3), tmp_path / "other.pth")
    argv = ["generate", "--model", str(tmp_path / "other.pth"), "--state", str(tmp_path / "s.pth"), *flags]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "2 layers" in error and "3 layers" in error and error.count("\n") == 1


# --- PEFT as the judge of forward and gradients


def peft_model(model: Rwkv, config: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, config)


TARGETS = ("receptance", "key", "value", "gate", "output")
PEFT: dict[str, tuple[AdapterConfig, Any]] = {
    "lora": (AdapterConfig("lora", 6, 9), {"r": 6, "lora_alpha": 9}),
    "rslora": (AdapterConfig("lora", 6, 9, rank_stabilised=True), {"r": 6, "lora_alpha": 9, "use_rslora": True}),
    "dora": (AdapterConfig("lora", 6, 9, dora=True), {"r": 6, "lora_alpha": 9, "use_dora": True}),
    "pissa": (AdapterConfig("pissa", 6, 6, svd_iterations=0), {"r": 6, "lora_alpha": 6, "init_lora_weights": "pissa"}),
    "bone": (AdapterConfig("bone", 8), {"r": 8}),
    "bone, no divisor": (AdapterConfig("bone", 7), {"r": 7}),
}


@pytest.mark.parametrize("version", ["x070", "x060", "x052"])
@pytest.mark.parametrize("method", PEFT)
def test_forward_and_gradients_are_pefts(version: str, method: str, load: Callable[..., Rwkv]) -> None:
    """The same values in both, then the logits and the gradient of every trained tensor."""
    config, settings = PEFT[method]
    kind = MissConfig if config.peft == "bone" else LoraConfig
    ours = rp.attach_adapter(load(version=version), config)
    names = sorted(
        {n.rsplit(".lora_", 1)[0].rsplit(".miss_", 1)[0] for n, p in ours.named_parameters() if p.requires_grad}
    )
    theirs = peft_model(load(version=version), kind(target_modules=names, **settings))
    own = dict(ours.named_parameters())
    pairs = [(official(name), p) for name, p in theirs.named_parameters() if p.requires_grad]
    assert {name for name, _ in pairs} == {n for n, p in own.items() if p.requires_grad}
    generator = torch.Generator().manual_seed(2)
    for name, p in pairs:
        change = 0.1 * torch.randn(p.shape, generator=generator)
        if config.peft == "pissa":  # its values come from the base, up to the sign of a pair
            p.data = own[name].data.clone()
        own[name].data, p.data = (
            own[name].data + change,
            p.data.clone() if config.peft == "pissa" else own[name].data + change,
        )
        if config.peft == "pissa":
            p.data = own[name].data.clone()
    weight = torch.randn(2, 21, 257, generator=generator)
    logits = [model(TOKENS)[0] for model in (ours, theirs)]
    for one in logits:
        (one * weight).sum().backward()
    assert difference(logits[0], logits[1]) <= 1e-5
    errors = {name: difference(own[name].grad, p.grad) for name, p in pairs}
    assert max(errors.values()) <= 1e-4, errors


def official(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".default", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


@pytest.mark.parametrize("method", [m for m in PEFT if m != "pissa"] + ["pissa"])
def test_peft_loads_our_folder(method: str, load: Callable[..., Rwkv], tmp_path: Path) -> None:
    model = rp.attach_adapter(load(version="x060"), PEFT[method][0])
    disturb(model)
    rp.save_adapter(model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(load(version="x060"), tmp_path / "a").eval()
    assert difference(logits_of(theirs), logits_of(model)) <= 1e-5
    assert difference(logits_of(load(version="x060")), logits_of(model)) > 0.01


@pytest.mark.parametrize("method", ["rslora", "dora", "bone"])
def test_a_folder_that_peft_wrote(method: str, load: Callable[..., Rwkv], tmp_path: Path) -> None:
    config, settings = PEFT[method]
    kind = MissConfig if config.peft == "bone" else LoraConfig
    theirs = disturb(peft_model(load(), kind(target_modules=["att.key", "ffn.value"], **settings))).eval()
    theirs.save_pretrained(str(tmp_path / "a"))
    assert difference(logits_of(rp.load_adapter(load(), tmp_path / "a")), logits_of(theirs)) <= 1e-5


def test_peft_does_not_take_bat_for_its_own(load: Callable[..., Rwkv], tmp_path: Path) -> None:
    """PEFT's bat has another formula: it must refuse the folder rather than load it wrongly."""
    rp.save_adapter(disturb(rp.attach_adapter(load(), AdapterConfig("bat", 8))), tmp_path / "a")
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(load(), tmp_path / "a")


# --- the formulas


def adapted_layer(config: AdapterConfig, out: int = 48, inner: int = 64) -> Any:
    torch.manual_seed(0)
    layer = ADAPTERS[config.peft](nn.Linear(inner, out, bias=False), config)
    layer.reset()
    return layer


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_bat_is_its_formula(rank: int) -> None:
    """W[a,b] + W[a,b]·D[b] + D[b] block by block, and its gradient."""
    layer = adapted_layer(AdapterConfig("bat", rank))
    disturb(layer)
    x = torch.randn(3, 5, 64, requires_grad=True)
    W, D = layer.base.weight.detach().double(), layer.bat_block.detach().double().requires_grad_()
    rows = [
        torch.cat([block + block @ D[b] + D[b] for b, block in enumerate(row.split(rank, 1))], 1)
        for row in W.split(rank, 0)
    ]
    want = x.double() @ torch.cat(rows).T
    got = layer(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.merged(layer.base.weight, layer.to_file(), layer.config).double(), torch.cat(rows))
    torch.testing.assert_close(layer.base(x) + layer.delta(x, layer.base(x)), got, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(got)
    ours = torch.autograd.grad((got * weight).sum(), [layer.bat_block, x])
    theirs = torch.autograd.grad((want * weight).sum(), [D, x])
    for mine, other in zip(ours, theirs, strict=True):
        assert difference(mine, other) <= 1e-5


@pytest.mark.parametrize(("rank", "inner"), [(8, 64), (7, 64), (64, 64), (5, 63)])
def test_bone_is_its_formula(rank: int, inner: int) -> None:
    layer = adapted_layer(AdapterConfig("bone", rank), inner=inner)
    disturb(layer)
    W = layer.base.weight.detach().clone()
    for start in range(0, inner, rank):
        W[:, start : start + rank] += layer.miss_block.detach().T[:, : inner - start]
    x = torch.randn(2, 3, inner)
    torch.testing.assert_close(layer(x), x @ W.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.merged(layer.base.weight, layer.to_file(), layer.config), W)


@pytest.mark.parametrize("iterations", [0, 4])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_pissa_begins_at_the_largest_singular_values(iterations: int, alpha: float | None) -> None:
    layer = adapted_layer(AdapterConfig("pissa", 6, alpha, svd_iterations=iterations))
    W = layer.base.weight.detach()
    U, S, Vh = torch.linalg.svd(W)
    product = (layer.config.scale * layer.lora_B.weight @ layer.lora_A.weight).detach()
    best = U[:, :6] @ torch.diag(S[:6]) @ Vh[:6]
    if iterations == 0:
        assert difference(product, best) <= 1e-5
    assert (W - product).norm() <= 1.01 * (W - best).norm()
    x = torch.randn(4, 64)
    torch.testing.assert_close(layer(x), layer.base(x), rtol=1e-5, atol=1e-5)  # nothing has changed yet
    disturb(layer)
    want = W + layer.config.scale * (layer.lora_B.weight @ layer.lora_A.weight).detach() - product
    torch.testing.assert_close(layer(x), x @ want.T, rtol=1e-4, atol=1e-5)


def test_a_pissa_folder_is_a_plain_lora(load: Callable[..., Rwkv], tmp_path: Path) -> None:
    """Without our own file beside it, it is a LoRA of twice the rank, and nothing else is needed."""
    model = disturb(rp.attach_adapter(load(), AdapterConfig("pissa", 5)))
    rp.save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / "rwkv_peft.json").unlink()
    saved = read_adapter(tmp_path / "a")
    assert isinstance(saved, SavedAdapter) and saved.config is not None
    assert (saved.config.peft, saved.config.rank) == ("lora", 10)
    plain = rp.load_adapter(load(), tmp_path / "a")
    assert difference(logits_of(plain), logits_of(model)) <= 1e-5


def test_dora_is_its_formula() -> None:
    layer = adapted_layer(AdapterConfig("lora", 4, 6, dora=True))
    torch.testing.assert_close(layer.lora_magnitude_vector, layer.base.weight.norm(dim=1))
    disturb(layer)
    V = layer.base.weight + 6 / 4 * layer.lora_B.weight @ layer.lora_A.weight
    want = layer.lora_magnitude_vector[:, None] * V / V.norm(dim=1, keepdim=True)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ want.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.merged(layer.base.weight, layer.to_file(), layer.config), want.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_doras_lengths_of_a_base_in_any_precision(dtype: torch.dtype) -> None:
    """Within a hundredth of what training has changed, which is itself a small part of them."""
    layer = adapted_layer(AdapterConfig("lora", 4, 6, dora=True))
    disturb(layer)
    layer.base.to(dtype)
    W, a, b = (x.double() for x in (layer.base.weight, layer.lora_A.weight, layer.lora_B.weight))
    want = (W + 6 / 4 * b @ a).norm(dim=1)
    changed = (want - W.norm(dim=1)).abs().mean()
    assert changed > 1e-3 * want.mean()
    assert (layer.row_lengths() - want).abs().max() <= (1e-6 * want.max() if dtype == torch.float32 else 0.01 * changed)


# --- what does not fit


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdapterConfig("bat", 48), "--rank 48: bat needs a divisor of both sides of a matrix, here 64 and 64; try 64"),
        (AdapterConfig("bone", 65), "--rank 65: bone needs at most 64"),
        (AdapterConfig("pissa", 65), "--rank 65: pissa needs at most 64"),
        (AdapterConfig("bone", 8, dora=True), "--dora: only with --peft lora, not bone"),
        (AdapterConfig("pisa"), "--peft pisa: unknown; allowed are lora pissa .*; did you mean pissa"),
        (AdapterConfig("bone", peft_config={"r": 3}), "--peft-config: only with --peft peft:METHOD"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(config: AdapterConfig, message: str, load: Callable[..., Rwkv]) -> None:
    model = load()
    before = dict(model.named_modules())
    with pytest.raises(ConfigError, match=message):
        rp.attach_adapter(model, config)
    assert dict(model.named_modules()) == before and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "4"], r"--rank 4: .*adapter has 8; leave it out"),
        (["--peft", "bone"], r"--peft bone: .*adapter has lora"),
        (["--alpha", "5"], r"--alpha 5\.0: .*has 16"),
        (["--peft", "full"], "--adapter: not with --peft full"),
        (["--train-parts", "head"], r"--train-parts: head\.weight has an adapter, by --targets; leave it out"),
    ],
    ids=str,
)
def test_going_on_with_other_settings(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    base, data = tmp_path / "base.pth", tmp_path / "data.jsonl"
    torch.save(random_model(), base)
    data.write_text(json.dumps({"text": TEXTS[0]}))
    rp.save_adapter(
        rp.attach_adapter(rp.load_model(base), AdapterConfig("lora", 8, targets=("head", "key"))), tmp_path / "adapter"
    )
    argv = ["train", "--model", str(base), "--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*argv, "--adapter", str(tmp_path / "adapter"), *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("peft", "parts", "settings", "rates"),
    [
        ("state", (), {}, {0.1}),
        ("state", (), {"lr": 0.01}, {0.01}),
        ("state", (), {"lr": 0.01, "peft": "state"}, {0.01}),  # which need not be said again
        ("state", ("ln",), {}, {0.0002, 0.1}),
        ("lora", ("state",), {}, {0.0002, 0.1}),
        ("lora", ("state",), {"lr": 0.01}, {0.01, 0.1}),
    ],
    ids=str,
)
def test_each_part_goes_on_at_its_own_rate(
    peft: str,
    parts: tuple[str, ...],
    settings: dict[str, Any],
    rates: set[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rwkv_peft.training import run

    base, data = tmp_path / "base.pth", tmp_path / "data.jsonl"
    torch.save(random_model(), base)
    data.write_text(json.dumps({"text": TEXTS[0]}))
    rp.save_adapter(rp.attach_adapter(rp.load_model(base), AdapterConfig(peft, 4), parts), tmp_path / "a")
    found: set[float] = set()
    build = run.build_optimizer

    def spy(model: Rwkv, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer = build(model, config)
        found.update(group["lr"] for group in optimizer.param_groups)
        return optimizer

    monkeypatch.setattr(run, "build_optimizer", spy)
    config = TrainConfig(base, [data], tmp_path / "o", adapter=tmp_path / "a", max_steps=1, device="cpu", **settings)
    rp.train(config, Console(file=io.StringIO()))
    assert found == rates
    assert f"peft: {peft}" in (tmp_path / "o" / "config.yaml").read_text()


def test_an_initial_value_file_needs_an_adapter() -> None:
    with pytest.raises(ConfigError, match=r"--pissa-init i\.pth: only with --adapter"):
        TrainConfig(Path("m"), [Path("d")], Path("o"), pissa_init=Path("i.pth")).check()


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({}, []),
        ({"peft": "full", "peft_config": "{}", "rank": 3}, ["--peft-config --rank: no effect with --peft full"]),
        ({"peft": "full", "train_parts": ("state", "emb")}, ["--train-parts emb: no effect with --peft full"]),
        ({"peft": "peft:OFT", "peft_config": "{}", "targets": "key"}, []),
        ({"epochs": 2, "max_steps": 5}, ["--epochs: no effect with --max-steps"]),
        ({"wsd_decay": 0.3, "schedule": "linear"}, ["--wsd-decay: no effect with --schedule linear"]),
        ({"lr": 1.0, "lr_final": 0.5, "schedule": "constant"}, ["--lr-final: no effect with --schedule constant"]),
        ({"lr": 1.0, "lr_final": 1.0, "schedule": "constant"}, []),
        ({"optim": "adafactor", "betas": (0.1, 0.2)}, ["--betas: no effect with --optim adafactor"]),
        ({"lr_state": 0.3}, ["--lr-state: no effect where no state trains"]),
        ({"lr_state": 0.3, "train_parts": "shift"}, []),
        ({"peft": "pissa", "svd_iterations": 0, "adapter": Path("a")}, ["--svd-iterations: no effect with --adapter"]),
    ],
    ids=str,
)
def test_settings_without_effect(settings: dict[str, Any], lines: list[str]) -> None:
    config = TrainConfig(Path("m"), [], Path("o"), **settings)
    assert config.without_effect() == lines
    if not lines:
        assert config.resolved().without_effect() == []  # as the run's config.yaml has it


def test_an_adapter_loaded_in_python_trains_on_with_its_parts(tmp_path: Path) -> None:
    base = tmp_path / "base.pth"
    torch.save(random_model(), base)
    model = rp.attach_adapter(rp.load_model(base), AdapterConfig("bone", 4), ("ln", "state", "head"))
    rp.save_adapter(model, tmp_path / "a")
    again = rp.load_adapter(rp.load_model(base), tmp_path / "a")
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_the_default_scale_of_a_rank_stabilised_lora() -> None:
    assert AdapterConfig(rank=16).scale == 2
    assert AdapterConfig(rank=16, rank_stabilised=True).scale == 32 / 4
    assert AdapterConfig("pissa", rank=16).scale == 1


@pytest.mark.parametrize(("targets", "same"), [("key", True), (("att.key", "ffn.key"), True), ("att.key", False)])
def test_the_same_targets_again_are_no_contradiction(targets: Any, same: bool, tmp_path: Path) -> None:
    base, data = tmp_path / "base.pth", tmp_path / "data.jsonl"
    torch.save(random_model(), base)
    data.write_text(json.dumps({"text": TEXTS[0]}))
    rp.save_adapter(rp.attach_adapter(rp.load_model(base), AdapterConfig(targets="key")), tmp_path / "a")
    config = TrainConfig(
        base, [data], tmp_path / "o", adapter=tmp_path / "a", targets=targets, max_steps=1, device="cpu"
    )
    if same:
        rp.train(config, Console(file=io.StringIO()))
    else:
        with pytest.raises(ConfigError, match=r"--targets att\.key: .* has its own; leave it out"):
            rp.train(config, Console(file=io.StringIO()))
