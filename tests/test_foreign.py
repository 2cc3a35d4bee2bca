"""Methods of Hugging Face PEFT through PEFT: each one trained, saved, loaded by us and by PEFT, and merged."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, LoHaConfig, PeftModel, PsoftConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import rwkv_peft as rp
from conftest import difference, random_model, random_tokens
from rwkv_peft.adapters import foreign, merge_adapter, unmerge_adapter
from rwkv_peft.checkpoint import write_tensors
from rwkv_peft.config import AdapterConfig, TrainConfig
from rwkv_peft.errors import CheckpointError, ConfigError
from rwkv_peft.models import Rwkv

SIZES: dict[str, Any] = {"layers": 2, "width": 64, "vocab_size": 257}
TOKENS = random_tokens(257, 2, 20)
# every method that PEFT can put on matrices, with its own settings or none
METHODS: dict[str, dict[str, Any]] = {
    "ADALORA": {}, "BEFT": {}, "BOFT": {}, "C3A": {}, "DEFT": {}, "DELORA": {},
    "FOURIERFT": {"init_weights": True},
    "FROD": {}, "GLORA": {}, "GRALORA": {}, "HIRA": {}, "HRA": {}, "IA3": {}, "LILY": {}, "LN_TUNING": {}, "LOHA": {},
    "LOKR": {}, "LORA": {"r": 4, "use_dora": True}, "MISS": {}, "OFT": {"oft_block_size": 16}, "OSF": {}, "PEANUT": {},
    "PSOFT": {}, "PVERA": {}, "RANDLORA": {}, "ROAD": {}, "SHIRA": {}, "SUPERTUNING": {}, "TINYLORA": {},
    "UNILORA": {}, "VBLORA": {}, "VERA": {}, "WAVEFT": {},
}  # fmt: skip
UNMERGEABLE = {"BEFT": "no bias", "LILY": "not supported"}
OURS_ALONE = {"GLORA"}  # PEFT itself puts it on no subclass of nn.Linear
FEW = ("LOHA", "OFT", "VERA")


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(TOKENS)[0].float()


def train(model: Rwkv, steps: int = 20, lr: float = 0.02) -> list[float]:
    """As the loop of a run does, on two rows; the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
    foreign.follow(model, optimizer, steps)
    losses = []
    model.train()
    for _ in range(steps):
        logits, _ = model(TOKENS)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), TOKENS[:, 1:].flatten())
        loss.backward()
        extra = foreign.extra_loss(model)
        if extra is not None:
            extra.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    model.eval()
    return losses


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pth"
    torch.save(random_model(**SIZES, dtype=torch.bfloat16), path)
    return path


@dataclass
class Trained:
    method: str
    model: Rwkv
    losses: list[float]
    logits: Tensor
    folder: Path


@pytest.fixture(scope="module", params=METHODS)
def trained(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """A model with an adapter of each method, trained and saved."""
    torch.manual_seed(0)
    config = AdapterConfig(f"peft:{request.param}", peft_config=METHODS[request.param])
    model = rp.attach_adapter(rp.load_model(base), config)
    losses = train(model)
    folder = tmp_path_factory.mktemp(request.param) / "adapter"
    rp.save_adapter(model, folder)
    yield Trained(request.param, model, losses, logits_of(model), folder)


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# --- every method


def test_every_method_of_peft_is_in_the_table() -> None:
    with pytest.raises(ConfigError, match="allowed are") as error:
        rp.attach_adapter(nn.Linear(1, 1), AdapterConfig("peft:NONE", targets=("",)))
    allowed = str(error.value).split("allowed are ")[1].split(";")[0].split()
    assert set(allowed) == set(METHODS)


def test_training_lowers_the_loss_and_changes_nothing_but_the_adapter(trained: Trained, base: Path) -> None:
    assert trained.losses[-1] < trained.losses[0] - 0.1
    plain = dict(rp.load_model(base).named_parameters())
    now = dict(trained.model.named_parameters())
    assert all(p.dtype == torch.float32 for p in now.values())
    own = foreign.parameters(trained.model)
    assert trained_names(trained.model) == own
    kept = {name.replace(".base_layer", ""): p for name, p in now.items() if name not in own}
    assert all(torch.equal(kept[name], p) for name, p in plain.items())
    assert not any(module.training for module in trained.model.modules())


def test_a_saved_adapter_is_the_same_when_loaded(trained: Trained, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    again = rp.load_adapter(rp.load_model(base), trained.folder)
    assert torch.equal(logits_of(again), trained.logits)
    assert trained_names(again) == trained_names(trained.model)
    rp.save_adapter(again, tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == sorted(p.name for p in trained.folder.iterdir())
    assert all((tmp_path / "b" / p.name).read_bytes() == p.read_bytes() for p in trained.folder.iterdir())
    assert train(again, 5)[-1] < trained.losses[0]


def test_peft_loads_our_folder(trained: Trained, base: Path) -> None:
    if trained.method in OURS_ALONE:
        pytest.skip("PEFT puts it on no subclass of nn.Linear")
    theirs = PeftModel.from_pretrained(rp.load_model(base), trained.folder).eval()
    assert difference(logits_of(theirs), trained.logits) <= 1e-6


def test_merged_and_unmerged(trained: Trained, base: Path, tmp_path: Path) -> None:
    model = rp.load_adapter(rp.load_model(base), trained.folder)
    before = {name: p.clone() for name, p in model.named_parameters()}
    if trained.method in UNMERGEABLE:
        message = f"peft:{trained.method} cannot be merged: .*{UNMERGEABLE[trained.method]}"
        with pytest.raises(ConfigError, match=message):
            merge_adapter(model)
    else:
        merge_adapter(model)
        assert difference(logits_of(model), trained.logits) <= 1e-4
        plain = rp.load_model(base)
        changed = {name: p for name, p in plain.named_parameters() if name in foreign.merged_tensors(model)}
        assert changed.keys() == foreign.merged_tensors(model).keys()
        assert any(not torch.equal(p, foreign.merged_tensors(model)[name]) for name, p in changed.items())
        rp.save_adapter(model, tmp_path / "merged")
        assert all((tmp_path / "merged" / p.name).read_bytes() == p.read_bytes() for p in trained.folder.iterdir())
        assert difference(logits_of(model), trained.logits) <= 1e-4
        merge_adapter(model)  # a second time changes nothing
        unmerge_adapter(model)
    assert torch.equal(logits_of(model), trained.logits)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_merged_file_is_base_and_adapter(trained: Trained, base: Path, tmp_path: Path) -> None:
    if trained.method in UNMERGEABLE:
        with pytest.raises(ConfigError, match="cannot be merged"):
            rp.merge(base, trained.folder, tmp_path / "merged.pth")
        assert not list(tmp_path.iterdir())
        return
    merged = rp.load_model(rp.merge(base, trained.folder, tmp_path / "merged.pth", dtype="fp32"))
    assert difference(logits_of(merged), trained.logits) <= 1e-4


def test_a_bf16_model_computes_in_bf16_and_trains_in_float32(trained: Trained, base: Path) -> None:
    model = rp.load_adapter(rp.load_model(base, "bf16"), trained.folder)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert {model.get_parameter(name).dtype for name in trained_names(model)} == {torch.float32}
    assert trained_names(model) == trained_names(trained.model)
    seen = set()
    for layer in foreign.layers(model).values():
        layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    assert difference(logits_of(model), trained.logits) < 0.1
    assert seen == {torch.bfloat16}
    unmerged = logits_of(model)
    if trained.method not in UNMERGEABLE:
        merge_adapter(model)
        assert difference(logits_of(model), trained.logits) < 0.1
        unmerge_adapter(model)
        assert torch.equal(logits_of(model), unmerged)
    assert train(model, 3)[-1] < trained.losses[0]
    assert all(torch.equal(model.get_parameter(name), p) for name, p in frozen.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(method: str, base: Path, tmp_path: Path) -> None:
    def logits(model: Rwkv) -> Tensor:
        with torch.no_grad():
            return model(TOKENS.to(model.like.device))[0].float().cpu()

    model = rp.load_model(base, "bf16", "cuda")
    rp.attach_adapter(model, AdapterConfig(f"peft:{method}", peft_config=METHODS[method])).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    foreign.follow(model, optimizer, 3)
    for _ in range(3):
        extra = foreign.extra_loss(model)
        loss = model(TOKENS.cuda())[0].float().square().mean() + (0.0 if extra is None else extra)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rp.save_adapter(model.eval(), tmp_path / "a")
    assert torch.equal(logits(rp.load_adapter(rp.load_model(base, "bf16", "cuda"), tmp_path / "a")), logits(model))
    assert difference(logits(rp.load_adapter(rp.load_model(base), tmp_path / "a")), logits(model)) < 0.1
    if method not in UNMERGEABLE:
        before = logits(model)
        merge_adapter(model)
        assert difference(logits(model), before) < 0.1
        unmerge_adapter(model)
        assert torch.equal(logits(model), before)


# --- beside it, and on other versions


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("version", ["x052", "x060", "x070a"])
def test_other_versions(version: str, method: str, model_file: Callable[..., Path], tmp_path: Path) -> None:
    path = model_file(version=version, **SIZES)
    model = rp.attach_adapter(rp.load_model(path), AdapterConfig(f"peft:{method}"))
    losses = train(model, 8)
    assert losses[-1] < losses[0] - 0.1
    rp.save_adapter(model, tmp_path / "a")
    assert torch.equal(logits_of(rp.load_adapter(rp.load_model(path), tmp_path / "a")), logits_of(model))
    merged = rp.merge(path, tmp_path / "a", tmp_path / "merged.pth")
    assert difference(logits_of(rp.load_model(merged)), logits_of(model)) <= 1e-4


PARTS = ("time", "ln", "emb", "head", "state")


@pytest.mark.parametrize("method", FEW)
def test_parts_beside_it(method: str, base: Path, tmp_path: Path) -> None:
    model = rp.attach_adapter(rp.load_model(base, "bf16"), AdapterConfig(f"peft:{method}"), PARTS)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train(model, 3)
    rp.save_adapter(model, tmp_path / "a")
    again = rp.load_adapter(rp.load_model(base, "bf16"), tmp_path / "a")
    assert torch.equal(logits_of(again), logits_of(model))
    full = rp.load_adapter(rp.load_model(base), tmp_path / "a")
    merged = rp.load_model(rp.merge(base, tmp_path / "a", tmp_path / "merged.pth", dtype="fp32"))
    assert difference(logits_of(merged), logits_of(full)) <= 1e-4
    assert merged.blocks[1].att.time_state.abs().max() > 0


@pytest.mark.parametrize("method", FEW)
def test_blocks_computed_again_have_the_same_gradients(method: str, base: Path) -> None:
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = rp.attach_adapter(rp.load_model(base), AdapterConfig(f"peft:{method}")).train()
        model.grad_checkpoint = "block" if again else "none"
        model(TOKENS)[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_targets_and_what_needs_defaults(base: Path) -> None:
    def adapted(peft: str, *targets: str, **settings: Any) -> tuple[Any, set[str]]:
        model = rp.attach_adapter(rp.load_model(base), AdapterConfig(peft, targets=targets, peft_config=settings))
        found = foreign.of(model)
        assert found is not None
        return found.config, set(foreign.layers(model))

    assert adapted("peft:oft", "att.key")[1] == {"blocks.0.att.key", "blocks.1.att.key"}  # in any case
    assert adapted("peft:OFT", target_modules=r".*ffn\.(key|value)", exclude_modules=["blocks.0.ffn.key"])[1] == {
        "blocks.0.ffn.value", "blocks.1.ffn.key", "blocks.1.ffn.value",
    }  # fmt: skip
    assert len(adapted("peft:OFT")[1]) == 12
    first = {name for name in adapted("peft:OFT")[1] if name.startswith("blocks.1.")}
    assert adapted("peft:OFT", layers_to_transform=[1])[1] == adapted("peft:LORA", layers_to_transform=1)[1] == first
    assert adapted("peft:C3A")[0].block_size == 64
    assert adapted("peft:C3A", block_size=32)[0].block_size == 32
    assert adapted("peft:VBLORA")[0].vector_length == 64
    norms = {"ln_out", "blocks.0.ln0", *(f"blocks.{i}.{n}" for i in (0, 1) for n in ("ln1", "ln2", "att.ln_x"))}
    assert adapted("peft:LN_TUNING")[1] == norms
    model = rp.attach_adapter(rp.load_model(base), AdapterConfig("peft:IA3"))
    kinds = {name: tuple(layer.ia3_l["default"].shape) for name, layer in foreign.layers(model).items()}
    assert (kinds["blocks.0.ffn.value"], kinds["blocks.0.ffn.key"]) == ((1, 256), (256, 1))


def test_shared_projections_that_are_not_saved_come_out_the_same(base: Path, tmp_path: Path) -> None:
    config = AdapterConfig("peft:VERA", peft_config={"save_projection": False, "projection_prng_key": 5, "r": 8})
    model = rp.attach_adapter(rp.load_model(base), config)
    train(model, 3)
    rp.save_adapter(model, tmp_path / "a")
    assert not any("vera_A" in name for name in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    assert torch.equal(logits_of(rp.load_adapter(rp.load_model(base), tmp_path / "a")), logits_of(model))


def test_what_our_own_reading_of_a_lora_has_not(base: Path, tmp_path: Path) -> None:
    """A folder of peft:LORA is read by PEFT, with all of PEFT's settings."""
    settings = {"r": 4, "rank_pattern": {"att.key": 2}, "use_rslora": True}
    model = rp.attach_adapter(rp.load_model(base), AdapterConfig("peft:LORA", peft_config=settings))
    train(model, 3)
    rp.save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["rank_pattern"] == {"att.key": 2}
    assert torch.equal(logits_of(rp.load_adapter(rp.load_model(base), tmp_path / "a")), logits_of(model))


# --- AdaLoRA, which shares out its ranks while it trains


def active_ranks(model: nn.Module) -> int:
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if ".lora_E." in name)


ADALORA = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3}


def test_adalora_ends_with_the_ranks_it_was_given(base: Path, tmp_path: Path) -> None:
    model = rp.attach_adapter(rp.load_model(base), AdapterConfig("peft:ADALORA", peft_config=ADALORA))
    train(model, 12)
    assert active_ranks(model) == 2 * 12
    rp.save_adapter(model, tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (settings["total_step"], settings["rank_pattern"]) == (12, None)
    again = rp.load_adapter(rp.load_model(base), tmp_path / "a")
    assert torch.equal(logits_of(again), logits_of(model))
    train(again, 20)
    found = foreign.of(again)
    assert found is not None
    assert found.config.total_step == 20  # the second run's
    assert active_ranks(again) == 2 * 12


def test_adalora_is_penalised_as_by_peft(base: Path) -> None:
    """What PEFT adds to a loss, of an output that has one."""
    model = rp.attach_adapter(rp.load_model(base), AdapterConfig("peft:ADALORA", peft_config={"orth_reg_weight": 0.7}))
    found, extra = foreign.of(model), foreign.extra_loss(model)
    assert found is not None
    assert extra is not None

    class Output:
        loss = torch.zeros(())

    tuner = found.peft.base_model
    tuner.model.forward = Output
    torch.testing.assert_close(extra, tuner().loss)
    assert foreign.extra_loss(rp.attach_adapter(rp.load_model(base), AdapterConfig("peft:OFT"))) is None
    assert foreign.extra_loss(rp.load_model(base)) is None


def test_an_adalora_whose_ranks_peft_left_out(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AdaLoraConfig(target_modules=["att.key", "ffn.value"], total_step=6, init_r=6, target_r=2)
    theirs = get_peft_model(rp.load_model(base), config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], 0.05)
    for step in range(1, 7):
        theirs(TOKENS)[0].square().mean().backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    want = logits_of(theirs.eval())
    theirs.save_pretrained(str(tmp_path / "a"))
    assert any(t.shape[0] < 6 for n, t in load_file(tmp_path / "a" / "adapter_model.safetensors").items() if "_E" in n)
    ours = rp.load_adapter(rp.load_model(base), tmp_path / "a")
    assert difference(logits_of(ours), want) <= 1e-6
    train(ours, 6)
    assert active_ranks(ours) == 2 * 4
    rp.save_adapter(ours, tmp_path / "b")
    assert torch.equal(logits_of(rp.load_adapter(rp.load_model(base), tmp_path / "b")), logits_of(ours))


def test_adalora_needs_steps_between_its_first_and_its_last(base: Path) -> None:
    model = rp.attach_adapter(rp.load_model(base), AdapterConfig("peft:ADALORA", peft_config=ADALORA))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with pytest.raises(ConfigError, match="--peft-config: tinit 2 and tfinal 3 must leave some of 5 steps"):
        foreign.follow(model, optimizer, 5)
    foreign.follow(model, optimizer, 6)


def test_adalora_keeps_the_steps_that_it_was_given(base: Path) -> None:
    settings = ADALORA | {"total_step": 6, "tinit": 3, "tfinal": 2}
    model = rp.attach_adapter(rp.load_model(base), AdapterConfig("peft:ADALORA", peft_config=settings))
    foreign.follow(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1), 100)
    found = foreign.of(model)
    assert found is not None
    assert found.config.total_step == 6


def test_a_run(base: Path, tmp_path: Path) -> None:
    """The loop adds AdaLoRA's penalty, and shares its ranks out by the run's steps."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": str(i), "response": "abc" * i}) + "\n" for i in range(1, 9)))
    config = TrainConfig(
        base, [data], tmp_path / "run", peft="peft:AdaLoRA", max_steps=4, micro_batch=2, lr=0.01, warmup_steps=0,
        peft_config=json.dumps({"init_r": 4, "target_r": 2, "orth_reg_weight": 50}), device="cpu",
    )  # fmt: skip
    result = rp.train(config, Console(file=io.StringIO()))
    model = rp.load_adapter(rp.load_model(base), result.result)
    assert active_ranks(model) == 2 * 12
    first = rp.attach_adapter(rp.load_model(base), config.adapter_config())
    extra, before = foreign.extra_loss(model), foreign.extra_loss(first)
    assert extra is not None
    assert before is not None
    assert extra < 0.9 * before


def test_going_on_with_other_settings(base: Path, trained_oft: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "abc"}\n')

    def go_on(**settings: Any) -> str:
        config = TrainConfig(base, [data], tmp_path / "run", adapter=trained_oft, device="cpu", max_steps=1, **settings)
        rp.train(config, Console(file=io.StringIO()))
        return (tmp_path / "run" / "adapter" / "rwkv_peft.json").read_text()

    for settings, message in (
        ({"rank": 9}, "--rank 9: .* has none, as peft:OFT; leave it out"),
        ({"peft": "peft:LOHA"}, "--peft peft:LOHA: .* has peft:OFT; leave it out"),
        ({"peft": "peft:OFT", "peft_config": '{"r": 2}'}, "--peft-config: not with --adapter"),
    ):
        with pytest.raises(ConfigError, match=message):
            go_on(**settings)
        assert not (tmp_path / "run").exists()
    assert '"peft": "peft:OFT"' in go_on(peft="peft:oft")


def test_a_merge_that_fails_changes_nothing(base: Path, tmp_path: Path) -> None:
    model = rp.attach_adapter(rp.load_model(base), AdapterConfig("peft:LORA", peft_config={"lora_bias": True}))
    train(model, 2)
    before = logits_of(model)
    with pytest.raises(ConfigError, match=r"peft:LORA cannot be merged: .*lora_bias"):
        merge_adapter(model)
    assert torch.equal(logits_of(model), before)
    rp.save_adapter(model, tmp_path / "a")
    with pytest.raises(ConfigError, match="cannot be merged"):
        rp.merge(base, tmp_path / "a", tmp_path / "m.pth")


# --- errors


def refused(message: str, peft: str, *, targets: tuple[str, ...] = (), parts: tuple[str, ...] = (), **settings: Any):  # type: ignore[no-untyped-def]
    return pytest.param(AdapterConfig(peft, targets=targets, peft_config=settings), parts, message, id=message[:40])


@pytest.mark.parametrize(
    ("config", "parts", "message"),
    [
        refused("--peft peft:OFTT: PEFT has no such method; allowed are .*LOHA.*did you mean OFT", "peft:OFTT"),
        refused("--peft peft:PREFIX_TUNING: works on the prompts of attention.*--peft state", "peft:PREFIX_TUNING"),
        refused("--peft peft:XLORA: mixes finished adapters", "peft:xlora"),
        refused("--peft peft:ADAMSS: clusters the rows of the base anew", "peft:ADAMSS"),
        refused("--peft peft:POLY: needs the number of a task", "peft:POLY"),
        refused("--peft peft:TRAINABLE_TOKENS: .*--train-parts emb", "peft:TRAINABLE_TOKENS"),
        refused(
            "--peft-config block_size: OFT has no such setting; allowed are .*did you mean oft_block_size",
            "peft:OFT",
            block_size=8,
        ),
        refused("--peft-config inference_mode: OFT has no such setting", "peft:OFT", inference_mode=True),
        refused("--peft-config r 'eight': must be a number; LOHA's default is 8", "peft:LOHA", r="eight"),
        refused("--peft-config: not for OFT: .*only specify either r", "peft:OFT", r=8, oft_block_size=8),
        refused("not for ADALORA: target_r 9 must be below init_r 9", "peft:ADALORA", init_r=9, target_r=9),
        refused("--peft peft:LOHA: does not fit: .*positive integer", "peft:LOHA", r=0),
        refused("peft:C3A: does not fit: .*input size is 64 .* block size is 48", "peft:C3A", block_size=48),
        refused("--peft peft:OFT: does not fit: .*nothing.* not found", "peft:OFT", target_modules=["nothing"]),
        refused("it trains head.modules_to_save.default.weight", "peft:OFT", modules_to_save=["head"]),
        refused(r"it trains blocks\.0\.\S*bias, which is not its own; use --train", "peft:LORA", bias="all"),
        refused("init_lora_weights pissa changes the base", "peft:LORA", init_lora_weights="pissa"),
        refused("init_lora_weights olora changes the base", "peft:LORA", init_lora_weights="olora"),
        refused(r"it adapts blocks\.0\.\S*, which --train-parts is to train", "peft:LN_TUNING", parts=("ln",)),
        refused("it adapts head.weight, which --train-parts", "peft:OFT", parts=("head",), targets=("head",)),
        refused("not for ADALORA: deltaT 0 must be at least 1", "peft:ADALORA", deltaT=0),
        refused("alora_invocation_tokens: works only where PEFT", "peft:LORA", alora_invocation_tokens=[1]),
        refused("trainable_token_indices: .*--train-parts emb", "peft:LORA", trainable_token_indices={"emb": [1]}),
        refused(r"layers_to_transform \[7\]: the model has no such layer", "peft:OFT", layers_to_transform=[7]),
        refused("--targets nothing: no matrix ends in it", "peft:OFT", targets=("nothing",)),
    ],
)  # fmt: skip
def test_settings_that_are_refused(config: AdapterConfig, parts: tuple[str, ...], message: str, base: Path) -> None:
    model = rp.load_model(base)
    before, logits = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}, logits_of(model)
    with pytest.raises(ConfigError, match=message) as error:
        rp.attach_adapter(model, config, parts)
    assert "\n" not in str(error.value)
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == before  # the model is as it was
    assert torch.equal(logits_of(model), logits)
    rp.attach_adapter(model, AdapterConfig("peft:OFT"))


def test_a_method_that_changes_the_base_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attach_and_change(model: Rwkv, config: Any) -> Any:
        wrapped = get_peft_model(model, config)
        weight = model.blocks[0].att.key.base_layer.weight
        weight.data = weight.data + 1
        return wrapped

    monkeypatch.setattr("peft.get_peft_model", attach_and_change)
    model = rp.load_model(base)
    logits = logits_of(model)
    with pytest.raises(ConfigError, match="changes weights of the base"):
        rp.attach_adapter(model, AdapterConfig("peft:OFT"))
    assert torch.equal(logits_of(model), logits)


def test_the_package_is_missing(base: Path, trained_oft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for attempt in (
        lambda: rp.attach_adapter(rp.load_model(base), AdapterConfig("peft:OFT")),
        lambda: rp.load_adapter(rp.load_model(base), trained_oft),
    ):
        with pytest.raises(ConfigError, match=r"needs the package peft .*; pip install peft$"):
            attempt()


@pytest.fixture
def trained_oft(base: Path, tmp_path: Path) -> Path:
    rp.save_adapter(rp.attach_adapter(rp.load_model(base), AdapterConfig("peft:OFT")), tmp_path / "oft")
    return tmp_path / "oft"


def change_settings(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    write_tensors(folder / "adapter_model.safetensors", tensors)


FIRST = "base_model.model.blocks.0.att.key.oft_R.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: change_tensors(a, lambda t: t.pop(FIRST)), r"\.att\.key\.oft_R\.weight is missing or has no"),
        (lambda a: change_tensors(a, lambda t: t.update({FIRST + "s": t[FIRST] + 0})), "oft_R.weights is missing or"),
        (lambda a: change_tensors(a, lambda t: t.update({FIRST: t[FIRST][:, :3]})), r"is \(2, 3\), not \(2, 496\)"),
        (lambda a: change_settings(a, peft_type="NEWEST"), "peft:NEWEST: PEFT has no such method"),
        (lambda a: change_settings(a, peft_type=None), "names no method as peft_type"),
        (lambda a: change_settings(a, newest=1), "--peft-config newest: OFT has no such setting"),
        (lambda a: change_settings(a, oft_block_size=16), r"is \(2, 496\), not \(4, 120\)"),
        (lambda a: change_settings(a, target_modules=["blocks.7.att.key"]), "does not fit"),
    ],
    ids=["missing", "left over", "misshapen", "method", "no method", "setting", "size", "target"],
)  # fmt: skip
def test_folders_that_are_refused(damage: Callable[[Path], None], message: str, base: Path, trained_oft: Path) -> None:
    damage(trained_oft)
    model = rp.load_model(base)
    names, logits = [name for name, _ in model.named_parameters()], logits_of(model)
    with pytest.raises(CheckpointError, match=message) as error:
        rp.load_adapter(model, trained_oft)
    assert str(error.value).startswith(str(trained_oft))
    assert "\n" not in str(error.value)
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(logits_of(model), logits)


def test_factors_of_another_base_are_refused(base: Path, tmp_path: Path) -> None:
    """PEFT saves one half of FRoD's factors, and computes the other from the base."""
    rp.save_adapter(rp.attach_adapter(rp.load_model(base), AdapterConfig("peft:FROD")), tmp_path / "a")
    change_tensors(tmp_path / "a", lambda t: t["base_model.frod_V.att_key"].neg_())
    with pytest.raises(CheckpointError, match="its factors of the base come out otherwise here"):
        rp.load_adapter(rp.load_model(base), tmp_path / "a")


def test_directions_that_come_out_otherwise_are_those_that_were_trained(base: Path, tmp_path: Path) -> None:
    """PSOFT's, on another machine: PEFT does not save them, but we do."""
    model = rp.attach_adapter(rp.load_model(base), AdapterConfig("peft:PSOFT"))
    train(model, 3)
    rp.save_adapter(model, tmp_path / "a")
    svd = torch.linalg.svd

    def otherwise(*args: Any, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        U, S, V = svd(*args, **settings)
        signs = torch.ones_like(S)
        signs[::2] = -1
        return U * signs, S, signs[:, None] * V

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.linalg.svd", otherwise)
        again = rp.load_adapter(rp.load_model(base), tmp_path / "a")
        fresh = rp.attach_adapter(rp.load_model(base), AdapterConfig("peft:PSOFT"))
    assert torch.equal(logits_of(again), logits_of(model))
    assert difference(logits_of(fresh), logits_of(rp.load_model(base))) <= 1e-5
    taken, anew = (foreign.tensors(m)["blocks.0.att.key.psoft_A"] for m in (again, fresh))
    assert torch.equal(taken[1::2], anew[1::2])
    assert torch.equal(taken[::2], -anew[::2])


def test_a_psoft_folder_of_peft_itself(base: Path, tmp_path: Path) -> None:
    theirs = get_peft_model(rp.load_model(base), PsoftConfig(target_modules=["att.key"], init_weights=False)).eval()
    theirs.save_pretrained(str(tmp_path / "a"))
    assert difference(logits_of(rp.load_adapter(rp.load_model(base), tmp_path / "a")), logits_of(theirs)) <= 1e-6


@pytest.mark.parametrize("second", ["oft", "lora"])
@pytest.mark.parametrize("first", ["oft", "lora"])
def test_it_must_be_the_only_adapter(first: str, second: str, base: Path, trained_oft: Path, tmp_path: Path) -> None:
    rp.save_adapter(rp.attach_adapter(rp.load_model(base), AdapterConfig(rank=2)), tmp_path / "lora")
    model = rp.load_adapter(rp.load_model(base), tmp_path / first)
    if first == second == "lora":
        rp.load_adapter(model, tmp_path / second)
        return
    with pytest.raises(ConfigError, match="the only one"):
        rp.load_adapter(model, tmp_path / second)


def test_a_folder_of_peft_itself(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoHaConfig(r=3, target_modules=r"blocks\.\d+\.ffn\.(key|value)", init_weights=False)
    theirs = get_peft_model(rp.load_model(base), config).eval()
    theirs.save_pretrained(str(tmp_path / "a"))
    assert difference(logits_of(rp.load_adapter(rp.load_model(base), tmp_path / "a")), logits_of(theirs)) <= 1e-6
    merged = rp.merge(base, tmp_path / "a", tmp_path / "merged.pth", dtype="fp32")
    assert difference(logits_of(rp.load_model(merged)), logits_of(theirs)) <= 1e-4
