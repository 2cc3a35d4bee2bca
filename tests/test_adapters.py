"""Adapters: attaching, folders that we and PEFT write and read, and merging, judged by PEFT and PyPI `rwkv`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import rwkv_peft as rp
from conftest import PypiRwkv, difference, random_rwkv7, random_tokens
from rwkv_peft.adapters import ADAPTERS, AdaptedLinear, merge_adapter, unmerge_adapter
from rwkv_peft.adapters.lora import LoraLinear
from rwkv_peft.checkpoint import read_tensors, write_tensors
from rwkv_peft.config import AdapterConfig
from rwkv_peft.errors import CheckpointError, ConfigError, OutputError
from rwkv_peft.models import Rwkv
from rwkv_peft.ops.matrix import Dense

DEFAULT_TARGETS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
SIZES: dict[str, Any] = {"layers": 2, "width": 64, "vocab_size": 257, "layer0_v": True}
TOKENS = random_tokens(257, 2, 20)
CONFIGS = {
    "default": AdapterConfig(),
    "rank 1": AdapterConfig(rank=1),
    "odd alpha": AdapterConfig(rank=3, alpha=7.5),
    "subset": AdapterConfig(rank=4, alpha=4, targets=("receptance", "ffn.value")),
    "one layer, dropout": AdapterConfig(rank=5, alpha=1, dropout=0.3, targets=("blocks.1.att.key",)),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def disturb(model: nn.Module) -> nn.Module:
    """Change all that trains, as training would."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(TOKENS)[0].float()


@pytest.fixture
def tuned(load: Callable[..., Rwkv]) -> Callable[..., Rwkv]:
    """A model with an adapter that does something: `tuned(config, parts, **load's arguments)`."""

    def make(config: AdapterConfig | None = None, parts: Iterable[str] = (), **arguments: Any) -> Rwkv:
        model = rp.attach_adapter(load(**SIZES, **arguments), config or AdapterConfig(rank=4), parts)
        disturb(model)
        return model

    return make


# --- attaching


@configs
def test_attached_names_and_what_trains(config: AdapterConfig, load: Callable[..., Rwkv]) -> None:
    model = load(**SIZES)
    before, logits = set(dict(model.named_parameters())), logits_of(model)
    assert rp.attach_adapter(model, config) is model
    parameters = dict(model.named_parameters())
    new = parameters.keys() - before
    assert before <= parameters.keys()
    assert {n for n, p in parameters.items() if p.requires_grad} == new
    assert all(n.endswith((".lora_A.weight", ".lora_B.weight")) for n in new)
    targets = config.targets or DEFAULT_TARGETS
    assert {n.split(".lora_")[0] for n in new} == {
        n.removesuffix(".weight")
        for n in before
        if n.endswith(".weight") and n.removesuffix(".weight").endswith(targets)
    }
    assert all(p.shape[0 if "lora_A" in n else 1] == config.rank for n, p in parameters.items() if n in new)
    assert torch.equal(logits_of(model), logits)  # a new adapter changes nothing
    assert model.training is False
    assert all(m.training is False for m in model.modules())


TIME = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a", "r_k")
PARTS = {
    "ln": {
        *(f"blocks.{i}.{n}.{w}" for i in (0, 1) for n in ("ln1", "ln2", "att.ln_x") for w in ("weight", "bias")),
        *(f"{n}.{w}" for n in ("blocks.0.ln0", "ln_out") for w in ("weight", "bias")),
    },
    "time": {*(f"blocks.{i}.att.{n}" for i in (0, 1) for n in TIME), *(f"blocks.{i}.ffn.x_k" for i in (0, 1))}
    - {"blocks.0.att.v0"},
    "emb": {"emb.weight"},
    "head": {"head.weight"},
}


@pytest.mark.parametrize("parts", [*([p] for p in PARTS), ["time", "ln"], list(PARTS)], ids="+".join)
def test_parts_that_train_beside(parts: list[str], load: Callable[..., Rwkv]) -> None:
    model = rp.attach_adapter(load(**SIZES), AdapterConfig(), parts)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == set().union(*(PARTS[part] for part in parts))


@pytest.mark.parametrize(
    ("config", "parts", "message"),
    [
        (
            AdapterConfig(targets=("qkv",)),
            (),
            r"--targets qkv: no matrix ends in it; allowed are .*att\.key.*ffn\.value",
        ),
        (AdapterConfig(targets=("ey",)), (), "--targets ey: no matrix ends in it"),
        (AdapterConfig(), ("lm_head",), "--train-parts lm_head: allowed are time ln emb head"),
        (AdapterConfig(rank=0), (), "--rank 0: must be at least 1"),
        (AdapterConfig(alpha=0), (), "--alpha 0: must be above 0"),
        (AdapterConfig(dropout=1), (), "--dropout 1: must be from 0 to below 1"),
        (AdapterConfig(peft="dora"), (), "--peft dora: unknown; allowed are lora"),
    ],
)
def test_settings_that_are_refused(
    config: AdapterConfig, parts: tuple[str, ...], message: str, load: Callable[..., Rwkv]
) -> None:
    model = load(**SIZES)
    with pytest.raises(ConfigError, match=message):
        rp.attach_adapter(model, config, parts)
    assert not any("lora_" in n for n, _ in model.named_parameters())  # the model is as it was
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_new_adapter_is_refused(tuned: Callable[..., Rwkv]) -> None:
    model = tuned()
    with pytest.raises(ConfigError, match="has an adapter already"):
        rp.attach_adapter(model, AdapterConfig())


def test_lora_is_its_formula() -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(12, 7, bias=False), torch.randn(3, 5, 12)
    layer = LoraLinear(base, AdapterConfig(rank=3, alpha=7.5))
    disturb(layer)
    A, B = layer.lora_A.weight, layer.lora_B.weight
    want = base.weight + 7.5 / 3 * B @ A
    torch.testing.assert_close(layer(x), x @ want.T)
    merged = LoraLinear.merged(
        base.weight, {n: p.detach() for n, p in layer.trained().items()}, AdapterConfig("lora", 3, 7.5)
    )
    torch.testing.assert_close(merged, want)


def test_dropout_is_of_training_only_and_of_the_adapter_only() -> None:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(400, 1, bias=False), AdapterConfig(rank=1, alpha=1, dropout=0.25))
    x, plain = torch.ones(2000, 400), layer.base(torch.ones(1, 400))
    with torch.no_grad():
        layer.lora_A.weight.fill_(1)
        layer.lora_B.weight.fill_(1)
        assert torch.allclose(layer.eval()(x), plain + 400)
        added = layer.train()(x) - plain
    assert added.std() > 1
    assert abs(float(added.mean()) - 400) < 2  # what is left is scaled up


@pytest.mark.parametrize("parts", [(), ("time", "ln", "emb", "head")], ids=["adapter", "with parts"])
def test_bf16_model_trains_in_float32(parts: tuple[str, ...], load: Callable[..., Rwkv]) -> None:
    model = rp.attach_adapter(load(as_dtype="bf16", **SIZES), AdapterConfig(rank=4), parts).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in trained}
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    before = {n: p.detach().clone() for n, p in trained.items()}
    for _ in range(2):  # in the first step, A has no gradient yet
        optimizer.zero_grad()
        logits, _ = model(TOKENS)
        assert logits.dtype == torch.bfloat16
        logits.float().square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())
    assert [n for n, p in trained.items() if torch.equal(p, before[n])] == []
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


# --- folders, ours


@configs
@pytest.mark.parametrize("parts", [(), ("time", "ln", "emb", "head")], ids=["adapter", "with parts"])
def test_a_saved_adapter_is_the_same_when_loaded(
    config: AdapterConfig,
    parts: tuple[str, ...],
    tuned: Callable[..., Rwkv],
    load: Callable[..., Rwkv],
    tmp_path: Path,
) -> None:
    model = tuned(config, parts)
    rp.save_adapter(model, tmp_path / "a")
    again = rp.load_adapter(load(**SIZES), tmp_path / "a")
    assert torch.equal(logits_of(again), logits_of(model))
    assert not torch.equal(logits_of(again), logits_of(load(**SIZES)))
    rp.save_adapter(again, tmp_path / "b")  # what was loaded is saved again whole
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(
        ["adapter_config.json", "adapter_model.safetensors", "rwkv_peft.json", *["parts.safetensors"] * bool(parts)]
    )
    for name in names:
        if name.endswith(".safetensors"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_an_adapter_folder_holds(tuned: Callable[..., Rwkv], tmp_path: Path) -> None:
    model = tuned(AdapterConfig(rank=3, alpha=7.5, dropout=0.1, targets=("att.key",)), ("emb",))
    rp.save_adapter(model, tmp_path / "a")
    tensors = read_tensors(tmp_path / "a" / "adapter_model.safetensors")
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        f"base_model.model.blocks.{i}.att.key.lora_{x}.weight": shape
        for i in (0, 1)
        for x, shape in (("A", (3, 64)), ("B", (64, 3)))
    }
    assert read_tensors(tmp_path / "a" / "parts.safetensors").keys() == {"emb.weight"}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("LORA", 3, 7.5, 0.1)
    ours = json.loads((tmp_path / "a" / "rwkv_peft.json").read_text())
    assert ours == {
        "format": 1, "peft": "lora", "base": model.fingerprint, "parts": ["emb.weight"], "state": [],
    }  # fmt: skip


def test_saving_again_replaces_an_adapter_and_nothing_else(tuned: Callable[..., Rwkv], tmp_path: Path) -> None:
    rp.save_adapter(tuned(None, ("ln",)), tmp_path / "a")
    rp.save_adapter(tuned(), tmp_path / "a")
    assert not (tmp_path / "a" / "parts.safetensors").exists()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    before = sorted((p.name, p.read_bytes()) for p in (tmp_path / "a").iterdir())
    with pytest.raises(OutputError, match=r"holds notes\.txt, which is no adapter's file; name a new folder"):
        rp.save_adapter(tuned(None, ("ln",)), tmp_path / "a")
    assert sorted((p.name, p.read_bytes()) for p in (tmp_path / "a").iterdir()) == before
    assert {p.name for p in tmp_path.iterdir()} == {"a", "base.pth"}


def test_an_adapter_of_float32_loads_into_a_bf16_model(
    tuned: Callable[..., Rwkv], load: Callable[..., Rwkv], tmp_path: Path
) -> None:
    rp.save_adapter(tuned(None, ("ln",)), tmp_path / "a")
    model = rp.load_adapter(load(as_dtype="bf16", **SIZES), tmp_path / "a")
    assert difference(logits_of(model), logits_of(tuned(None, ("ln",)))) < 0.05
    assert difference(logits_of(load(**SIZES)), logits_of(tuned(None, ("ln",)))) > 0.1


# --- folders, PEFT's


@configs
def test_peft_loads_our_folder(
    config: AdapterConfig, tuned: Callable[..., Rwkv], load: Callable[..., Rwkv], tmp_path: Path
) -> None:
    model = tuned(config)
    rp.save_adapter(model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(load(**SIZES), tmp_path / "a", is_trainable=True).eval()
    assert difference(logits_of(theirs), logits_of(model)) <= 1e-5

    for one in (model, theirs):
        one(TOKENS)[0].square().mean().backward()
    ours = {f"base_model.model.{n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    peft = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert ours.keys() == peft.keys()
    assert max(difference(ours[n], peft[n]) for n in ours) <= 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["receptance", "key"]},
        {"target_modules": r"blocks\.\d+\.ffn\.(key|value)"},
        {"target_modules": ["att.value"], "layers_to_transform": [1], "layers_pattern": "blocks"},
        {"target_modules": ["att.key", "ffn.key"], "exclude_modules": ["blocks.0.ffn.key"]},
    ],
    ids=["names", "pattern", "one layer", "exclusion"],
)
def test_a_folder_that_peft_wrote(
    settings: dict[str, Any], load: Callable[..., Rwkv], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    theirs = disturb(get_peft_model(load(**SIZES), LoraConfig(r=6, lora_alpha=9, **settings))).eval()
    theirs.save_pretrained(str(tmp_path / "a"))
    ours = rp.load_adapter(load(**SIZES), tmp_path / "a")
    assert difference(logits_of(ours), logits_of(theirs)) <= 1e-5
    merged = rp.merge(model_file(**SIZES), tmp_path / "a", tmp_path / "merged.pth")
    assert difference(logits_of(rp.load_model(merged)), logits_of(theirs)) <= 1e-5
    assert difference(logits_of(load(**SIZES)), logits_of(theirs)) > 0.05


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=6, target_modules=["att.key"], rank_pattern={"blocks.0.att.key": 3}),
        LoraConfig(r=6, target_modules=["att.key"], alpha_pattern={"blocks.0.att.key": 3}),
        MissConfig(r=8, target_modules=["att.key"], init_weights="bat"),
        MissConfig(r=8, target_modules=["att.key"], init_weights="mini"),
    ],
    ids=["rank_pattern", "alpha_pattern", "PEFT's bat", "mini"],
)
def test_what_peft_has_and_we_have_not_is_left_to_peft(
    config: Any, load: Callable[..., Rwkv], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    theirs = disturb(get_peft_model(load(**SIZES), config)).eval()
    theirs.save_pretrained(str(tmp_path / "a"))
    ours = rp.load_adapter(load(**SIZES), tmp_path / "a")
    assert difference(logits_of(ours), logits_of(theirs)) <= 1e-5
    merged = rp.merge(model_file(**SIZES), tmp_path / "a", tmp_path / "merged.pth")
    assert difference(logits_of(rp.load_model(merged)), logits_of(theirs)) <= 1e-5


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_lora_of_peft_that_changed_its_base_is_refused(start: str, load: Callable[..., Rwkv], tmp_path: Path) -> None:
    """Its folder does not hold the changed base; read as a plain LoRA, it would be wrong without a word."""
    config = LoraConfig(r=4, target_modules=["att.key"], init_lora_weights=start)
    get_peft_model(load(**SIZES), config).save_pretrained(str(tmp_path / "a"))
    model = load(**SIZES)
    logits = logits_of(model)
    with pytest.raises(CheckpointError, match=f"init_lora_weights {start} changes the base .*path_initial_model"):
        rp.load_adapter(model, tmp_path / "a")
    assert torch.equal(logits_of(model), logits)


def test_an_adapter_of_the_embedding_is_left_to_peft(load: Callable[..., Rwkv], tmp_path: Path) -> None:
    theirs = disturb(get_peft_model(load(**SIZES), LoraConfig(r=4, target_modules=["emb", "att.key"]))).eval()
    theirs.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    ours = rp.load_adapter(load(**SIZES), tmp_path / "a")
    assert difference(logits_of(ours), logits_of(theirs)) <= 1e-5


def test_biases_that_peft_would_train_are_refused(load: Callable[..., Rwkv], tmp_path: Path) -> None:
    config = LoraConfig(r=6, target_modules=["att.key"], bias="all")
    get_peft_model(load(**SIZES), config).save_pretrained(str(tmp_path / "a"))
    with pytest.raises(CheckpointError, match=r"does not fit.*it trains .*\.bias, which is not its own"):
        rp.load_adapter(load(**SIZES), tmp_path / "a")


# --- merging


@configs
@pytest.mark.parametrize("parts", [(), ("time", "ln", "emb", "head")], ids=["adapter", "with parts"])
def test_merged_is_base_and_adapter_also_for_pypi_rwkv(
    config: AdapterConfig,
    parts: tuple[str, ...],
    tuned: Callable[..., Rwkv],
    model_file: Callable[..., Path],
    pypi_rwkv: PypiRwkv,
    tmp_path: Path,
) -> None:
    model = tuned(config, parts)
    rp.save_adapter(model, tmp_path / "a")
    path = rp.merge(model_file(**SIZES), tmp_path / "a", tmp_path / "merged.pth")
    assert path == tmp_path / "merged.pth"
    assert difference(logits_of(rp.load_model(path)), logits_of(model)) <= 1e-5
    theirs, *_ = pypi_rwkv(path, TOKENS[0].tolist())
    assert difference(theirs, logits_of(model)[0]) <= 1e-4


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_merging_keeps_the_rest_of_a_bf16_base(
    form: str, tuned: Callable[..., Rwkv], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Every tensor's number format; layer 0's unused tensors; to the bit, what was not trained."""
    model = tuned(AdapterConfig(rank=4, targets=("att.key",)), ("ln",), dtype=torch.bfloat16, as_dtype="bf16")
    rp.save_adapter(model, tmp_path / "a")
    base_path = model_file(**SIZES, dtype=torch.bfloat16)
    merged = read_tensors(rp.merge(base_path, tmp_path / "a", tmp_path / f"merged.{form}"))
    base = read_tensors(base_path)
    assert {n: (t.dtype, t.shape) for n, t in merged.items()} == {n: (t.dtype, t.shape) for n, t in base.items()}
    changed = {n for n in base if not torch.equal(merged[n], base[n])}
    assert changed == {"blocks.0.att.key.weight", "blocks.1.att.key.weight"} | PARTS["ln"]
    parameters = dict(model.named_parameters())
    for i in (0, 1):  # summed in float32, rounded once
        A, B = (parameters[f"blocks.{i}.att.key.lora_{x}.weight"] for x in "AB")
        name = f"blocks.{i}.att.key.weight"
        assert torch.equal(merged[name], (base[name].float() + 2 * (B @ A)).bfloat16())


@pytest.mark.parametrize(
    ("dtype", "number"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_merging_into_another_number_format(
    dtype: str, number: torch.dtype, tuned: Callable[..., Rwkv], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    rp.save_adapter(tuned(), tmp_path / "a")
    merged = read_tensors(rp.merge(model_file(**SIZES), tmp_path / "a", tmp_path / "m.pth", dtype))
    assert {t.dtype for t in merged.values()} == {number}


def test_merging_does_not_replace_a_file_unasked(
    tuned: Callable[..., Rwkv], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    rp.save_adapter(tuned(), tmp_path / "a")
    base, out = model_file(**SIZES), tmp_path / "m.pth"
    out.write_text("mine")
    with pytest.raises(OutputError, match=r"m\.pth: exists already"):
        rp.merge(base, tmp_path / "a", out)
    assert out.read_text() == "mine"
    rp.merge(base, tmp_path / "a", out, overwrite=True)
    assert read_tensors(out).keys() == random_rwkv7(**SIZES).keys()


# --- folders and bases that do not belong together


def foreign(folder: Path) -> None:
    """As if PEFT had written it: without the base's fingerprint."""
    (folder / "rwkv_peft.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "was trained on a base with other weights"),
        ({"layers": 1}, "was trained on a base with other weights"),
        ({"layers": 1, "foreign": True}, r"adapts blocks\.1\.\S+, which"),
        ({"width": 128, "foreign": True}, "does not fit"),
        ({"ffn": 100, "foreign": True}, r"ffn\.\S+ .*does not fit"),
    ],
    ids=str,
)
def test_another_base(
    change: dict[str, Any], message: str, tuned: Callable[..., Rwkv], model_file: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = tmp_path / "a", tmp_path / "m.pth"
    rp.save_adapter(tuned(), folder)
    if change.pop("foreign", False):
        foreign(folder)
    other = model_file("other.pth", **{**SIZES, **change})
    with pytest.raises(CheckpointError, match=message) as caught:
        rp.load_adapter(rp.load_model(other), folder)
    assert str(caught.value).startswith(f"{folder}: ")
    with pytest.raises(CheckpointError, match=message):
        rp.merge(other, folder, out)
    assert not out.exists()


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors)


FIRST = "base_model.model.blocks.0.att.key.lora_"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda a: (a / "adapter_config.json").unlink(), r"adapter_config\.json: no such file"),
    "no tensors": (lambda a: (a / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors: no such file"),
    "no parts": (lambda a: (a / "parts.safetensors").unlink(), r"parts\.safetensors does not hold what"),
    "broken JSON": (lambda a: (a / "adapter_config.json").write_text("{"), r"adapter_config\.json: cannot be read"),
    "JSON list": (lambda a: (a / "adapter_config.json").write_text("[]"), "holds no object"),
    "alpha NaN": (
        lambda a: edit_json(a / "adapter_config.json", lora_alpha=float("nan")),
        "--alpha nan: must be above 0",
    ),
    "rank Infinity": (lambda a: edit_json(a / "adapter_config.json", r=float("inf")), "is missing or out of range"),
    "no rank": (lambda a: edit_json(a / "adapter_config.json", r=None), "is missing or out of range"),
    "other method": (
        lambda a: (
            (a / "rwkv_peft.json").unlink(),
            edit_json(a / "adapter_config.json", peft_type="LOLA"),
        ),
        "LOLA",
    ),
    "newer format": (lambda a: edit_json(a / "rwkv_peft.json", format=2), "has format 2; this program reads 1"),
    "other rank": (lambda a: edit_json(a / "adapter_config.json", r=5), "does not fit"),
    "half a pair": (
        lambda a: edit_tensors(a / "adapter_model.safetensors", lambda w: w.pop(f"{FIRST}B.weight")),
        r"blocks\.0\.att\.key\.lora_B\.weight",
    ),
    "stray tensor": (
        lambda a: edit_tensors(
            a / "adapter_model.safetensors", lambda w: w.update({f"{FIRST}C.weight": torch.zeros(2)})
        ),
        r"blocks\.0\.att\.key\.lora_C\.weight",
    ),
    "no prefix": (
        lambda a: edit_tensors(a / "adapter_model.safetensors", lambda w: w.update({"x": torch.zeros(2)})),
        r"tensor x does not begin with base_model\.model\.",
    ),
    "NaN": (
        lambda a: edit_tensors(a / "adapter_model.safetensors", lambda w: w[f"{FIRST}A.weight"].fill_(float("nan"))),
        "NaN",
    ),
    "misshapen part": (
        lambda a: edit_tensors(a / "parts.safetensors", lambda w: w.update({"ln_out.bias": torch.zeros(3)})),
        r"ln_out\.bias.* does not fit",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder(
    damage: Callable[[Path], object],
    message: str,
    tuned: Callable[..., Rwkv],
    model_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder, out = tmp_path / "a", tmp_path / "m.pth"
    rp.save_adapter(tuned(AdapterConfig(rank=4, targets=("att.key",)), ("ln",)), folder)
    damage(folder)
    base = model_file(**SIZES)
    with pytest.raises(CheckpointError, match=message) as caught:
        rp.load_adapter(rp.load_model(base), folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=message):
        rp.merge(base, folder, out)
    assert not out.exists()


def test_no_folder_and_no_adapter(load: Callable[..., Rwkv], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder; an adapter is a folder"):
        rp.load_adapter(load(**SIZES), tmp_path / "a")
    with pytest.raises(ConfigError, match="the model has no adapter; attach one first"):
        rp.save_adapter(load(**SIZES), tmp_path / "a")
    assert not (tmp_path / "a").exists()


# --- what would be wrong without a word


@pytest.mark.parametrize("peft", ["lora", "pissa", "bone", "bat"])
def test_a_matrix_has_an_adapter_or_trains_in_full(peft: str, load: Callable[..., Rwkv], tmp_path: Path) -> None:
    model, plain = load(**SIZES), dict(load(**SIZES).named_parameters())
    config = AdapterConfig(peft, rank=1, targets=("head", "att.key"))
    with pytest.raises(ConfigError, match=r"--train-parts: head\.weight has an adapter, by --targets; leave it out"):
        rp.attach_adapter(model, config, ("head",))
    assert dict(model.named_parameters()).keys() == plain.keys()
    rp.save_adapter(rp.attach_adapter(model, config), tmp_path / "a")
    write_tensors(tmp_path / "a" / "parts.safetensors", {"head.weight": plain["head.weight"]})
    ours = json.loads((tmp_path / "a" / "rwkv_peft.json").read_text())
    (tmp_path / "a" / "rwkv_peft.json").write_text(json.dumps(ours | {"parts": ["head.weight"]}))
    with pytest.raises(CheckpointError, match=r"head\.weight is missing or has no use"):
        rp.load_adapter(load(**SIZES), tmp_path / "a")


def test_an_adapter_beside_merged_ones_is_refused(load: Callable[..., Rwkv], tmp_path: Path) -> None:
    rp.save_adapter(disturb(rp.attach_adapter(load(**SIZES), AdapterConfig(rank=2))), tmp_path / "a")
    model = rp.load_adapter(load(**SIZES), tmp_path / "a")
    merge_adapter(model)
    with pytest.raises(ConfigError, match=r"adapters are merged; unmerge_adapter\(model\) first"):
        rp.load_adapter(model, tmp_path / "a")
    unmerge_adapter(model)
    rp.load_adapter(model, tmp_path / "a")


def test_dora_of_rows_that_are_zero(model_file: Callable[..., Path], tmp_path: Path) -> None:
    tensors = random_rwkv7(**SIZES)
    tensors["blocks.0.att.output.weight"].zero_()
    tensors["blocks.1.ffn.value.weight"][3] = 0
    torch.save(tensors, tmp_path / "zero.pth")
    model = rp.attach_adapter(rp.load_model(tmp_path / "zero.pth"), AdapterConfig("lora", 4, dora=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        model(TOKENS)[0].square().mean().backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
        optimizer.step()
    rp.save_adapter(model, tmp_path / "a")
    merged = rp.load_model(rp.merge(tmp_path / "zero.pth", tmp_path / "a", tmp_path / "m.pth"))
    assert difference(logits_of(merged), logits_of(model)) <= 1e-4


@pytest.mark.parametrize("config", [AdapterConfig(rank=4), AdapterConfig(rank=4, dora=True), AdapterConfig("pissa", 4),
                                    AdapterConfig("bone", 4), AdapterConfig("bat", 4)], ids=str)  # fmt: skip
def test_float64_is_float64_throughout(config: AdapterConfig, load: Callable[..., Rwkv]) -> None:
    model = disturb(rp.attach_adapter(load(**SIZES), config)).double()
    assert model(TOKENS)[0].dtype == torch.float64
    assert difference(model(TOKENS)[0], disturb(rp.attach_adapter(load(**SIZES), config))(TOKENS)[0]) <= 1e-4


@pytest.mark.parametrize("name", ["blocks.0.att.key.weight", "emb.weight"], ids=["adapted", "the base's own"])
def test_a_merge_that_overflows_is_refused(name: str, tmp_path: Path) -> None:
    """In fp16; in fp32 it is written."""
    tensors = random_rwkv7(**SIZES)
    tensors[name][0, 0] = 1e5
    torch.save(tensors, tmp_path / "base.pth")
    config = AdapterConfig(rank=2, targets=("att.key",))
    rp.save_adapter(rp.attach_adapter(rp.load_model(tmp_path / "base.pth"), config), tmp_path / "a")
    files = tmp_path / "base.pth", tmp_path / "a", tmp_path / "m.pth"
    with pytest.raises(CheckpointError, match=rf"merged, {name} holds NaN or Inf in float16; try --dtype fp32"):
        rp.merge(*files, dtype="fp16")
    assert not files[2].exists()
    assert read_tensors(rp.merge(*files, dtype="fp32"))[name][0, 0] == 1e5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rwkv_peft.json", "[" * 100_000),
        ("adapter_config.json", "[" * 100_000),
        ("adapter_config.json", '{"peft_type": "LORA", "r": 1000000000000000000, "lora_alpha": 1}'),
    ],
    ids=["nested", "nested settings", "rank"],
)
def test_absurd_settings_in_a_folder(name: str, content: str, load: Callable[..., Rwkv], tmp_path: Path) -> None:
    rp.save_adapter(rp.attach_adapter(load(**SIZES), AdapterConfig(rank=2)), tmp_path / "a")
    (tmp_path / "a" / name).write_text(content)
    with pytest.raises(CheckpointError) as error:
        rp.load_adapter(load(**SIZES), tmp_path / "a")
    assert "\n" not in str(error.value)


# --- fewer passes, the same numbers


FUSED = {
    "lora": AdapterConfig("lora", 4, 6.5),
    "dora": AdapterConfig("lora", 4, 6.5, dora=True),
    "pissa": AdapterConfig("pissa", 4, 6.5),
    "bone": AdapterConfig("bone", 6),
    "bone, no divisor": AdapterConfig("bone", 7),
    "bone, one shard": AdapterConfig("bone", 24),
    "bat": AdapterConfig("bat", 6),
}


def frozen_layer(config: AdapterConfig, dtype: torch.dtype, bias: bool = False) -> AdaptedLinear:
    torch.manual_seed(0)
    base = nn.Linear(24, 36, bias=bias).requires_grad_(False)
    layer = ADAPTERS[config.peft](base, config)
    layer.reset()
    disturb(layer)
    base.to(dtype)
    return layer


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (24,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", FUSED.values(), ids=FUSED)
def test_fewer_passes_give_the_formula(config: AdapterConfig, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The output, and the gradients of x and of all that trains."""
    layer = frozen_layer(config, dtype)
    if dtype == torch.float64:
        layer.double()
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    assert layer.fused(x, Dense(layer.base.weight)) is not None
    weight = torch.randn(*shape[:-1], 36, dtype=dtype)
    inputs = [x, *layer.trained().values()]
    got, want = layer(x), layer.by_formula(x)
    assert got.shape == want.shape
    ours, theirs = (torch.autograd.grad((y * weight).sum(), inputs) for y in (got, want))
    assert [g.dtype for g in ours] == [p.dtype for p in inputs]
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 0.02}[dtype]
    assert max(difference(a, b) for a, b in zip((got, *ours), (want, *theirs), strict=True)) <= tolerance
    with torch.no_grad():
        assert torch.equal(layer(x), got)


@pytest.mark.parametrize("config", [c for c in FUSED.values() if not c.dora], ids=[n for n in FUSED if n != "dora"])
def test_gradients_of_fewer_passes_by_differences(config: AdapterConfig) -> None:
    """Not DoRA's, whose backward takes the lengths as constant."""
    layer = frozen_layer(config, torch.float64).double()
    names, values = zip(*layer.trained().items(), strict=True)
    x = torch.randn(4, 24, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(product, (x, *values))


@pytest.mark.parametrize("needed", ["x", "first", "last"])
@pytest.mark.parametrize("config", FUSED.values(), ids=FUSED)
def test_only_what_needs_a_gradient_gets_one(config: AdapterConfig, needed: str) -> None:
    layer = frozen_layer(config, torch.float32).requires_grad_(False)
    x, trained = torch.randn(4, 24), list(layer.trained().values())
    one = {"x": x, "first": trained[0], "last": trained[-1]}[needed].requires_grad_()
    ours, theirs = (torch.autograd.grad(y.square().sum(), one)[0] for y in (layer(x), layer.by_formula(x)))
    assert difference(ours, theirs) <= 1e-6


def refuse(*args: Any) -> Tensor:
    raise AssertionError("the formula was wanted")


@pytest.mark.parametrize("case", ["bias", "trains", "dtype", "class", "hook", "dropout", "beside"])
def test_the_formula_where_the_base_or_the_settings_need_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AdapterConfig("lora", 4, dropout=0.1 * (case == "dropout"))
    layer = frozen_layer(config, torch.float32, bias=case == "bias")
    base = layer.base
    if case == "trains":
        base.weight.requires_grad_()
    elif case == "dtype":
        base.double()
        base.register_forward_pre_hook(lambda module, args: (args[0].double(),))
        base.register_forward_hook(lambda module, args, out: out.float())
    elif case == "class":
        base.__class__ = type("Other", (nn.Linear,), {})
    elif case == "hook":
        base.register_forward_hook(lambda module, args, out: out + 1)
    elif case == "beside":
        layer.others.append(LoraLinear(base, config, beside=True))
    monkeypatch.setattr("rwkv_peft.adapters.lora.low_rank_linear", refuse)
    assert layer(torch.randn(3, 24)).shape == (3, 36)


def test_a_matrix_of_a_model_takes_the_fewest_passes(
    load: Callable[..., Rwkv], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rp.attach_adapter(load(**SIZES), AdapterConfig(rank=4)).train()
    monkeypatch.setattr(AdaptedLinear, "by_formula", refuse)
    model(TOKENS)[0].sum().backward()
