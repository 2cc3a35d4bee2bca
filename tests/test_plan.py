"""The memory plan: its counts against loaded models, its table of activations against autograd, its proposals."""

from __future__ import annotations

import json
import re
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import random_model
from rwkv_peft.adapters import attach_adapter, read_adapter, save_adapter
from rwkv_peft.cli import main
from rwkv_peft.config import TrainConfig
from rwkv_peft.errors import ConfigError, TrainingError
from rwkv_peft.export.quantised import export_quantised
from rwkv_peft.loading import load_model
from rwkv_peft.models import MODELS, Rwkv, Rwkv7Sizes
from rwkv_peft.models.layers import Documents
from rwkv_peft.ops import BACKENDS
from rwkv_peft.plan import Card, Outline, Plan, plan, proposals
from rwkv_peft.plan.activations import MODES, Activations
from rwkv_peft.plan.cards import GIB, size_in_bytes
from rwkv_peft.plan.fitting import every
from rwkv_peft.plan.memory import CUBLAS
from rwkv_peft.training import memory
from rwkv_peft.training.model import prepare
from rwkv_peft.training.run import train

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4, "dora": True},
    "targets": {"rank": 4, "targets": ("att.key",), "train_parts": ("none",)},
    "pissa": {"peft": "pissa", "rank": 4},
    "bone": {"peft": "bone", "rank": 8},
    "bat": {"peft": "bat", "rank": 8},
    "state": {"peft": "state"},
    "shift": {"rank": 4, "train_parts": ("time", "state", "shift", "head")},
    "full": {"peft": "full"},
}
BIG = Rwkv7Sizes(
    layers=61, width=4096, head_size=64, vocab_size=65536, ffn=16384, rank_w=192, rank_a=192, rank_v=128, rank_g=384
)
SMALL = replace(BIG, layers=12, width=768, ffn=3072, rank_w=64, rank_a=64, rank_v=32, rank_g=128)


def settings(path: Path = Path("m.pth"), **changes: Any) -> TrainConfig:
    return TrainConfig(path, ["d.jsonl"], Path("o"), **changes).resolved()


def planned(sizes: Rwkv7Sizes = SMALL, free: float | None = None, **changes: Any) -> Plan:
    config = settings(**{"micro_batch": 2, "grad_checkpoint": "none", **changes})
    return plan(config, Outline.of(MODELS["x070"], sizes, config), Card(free))


@pytest.fixture(scope="module")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 13 billion parameters that takes no room on the disk: a header, and a hole."""
    path, entries, at = tmp_path_factory.mktemp("big") / "big.safetensors", {}, 0
    with torch.device("meta"):
        model = MODELS["x070"](BIG)
    for name, p in model.named_parameters():
        entries[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": [at, at + 2 * p.numel()]}
        at += 2 * p.numel()
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
    return path


# --- counts


@pytest.mark.parametrize("version", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_a_loaded_model(method: str, version: str, model_file: Callable[..., Path]) -> None:
    path = model_file(version=version)
    config = settings(path, device="cpu", precision="bf16", **METHODS[method])
    outline = Outline.of_file(path, config)
    model = load_model(path, "bf16", "cpu", "torch")
    prepare(model, config)
    own = [p for p in model.parameters() if p.requires_grad]
    found = plan(config, outline, Card(None))
    assert found.trained == sum(p.numel() for p in own)
    assert found.parts["trained"] == sum(p.nbytes for p in own)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    beside = sum(b.nbytes for n, b in model.named_buffers() if n != "like")
    embedding = 0 if model.emb.weight.requires_grad else model.emb.weight.nbytes
    assert found.parts["weights"] == frozen + beside - embedding


def test_going_on_with_an_adapter(model_file: Callable[..., Path], tmp_path: Path) -> None:
    config = settings(model_file(), rank=4)
    model = attach_adapter(load_model(config.model), config.adapter_config(), config.parts())
    save_adapter(model, tmp_path / "adapter")
    saved = read_adapter(tmp_path / "adapter")
    again = plan(
        goes_on := replace(config, adapter=tmp_path / "adapter", train_parts=("none",)),
        Outline.of_file(goes_on.model, goes_on, saved),
        Card(None),
    )
    assert again.trained == plan(config, Outline.of_file(config.model, config), Card(None)).trained


# --- activations


def bytes_kept(model: Rwkv, tokens: int) -> float:
    """By autograd, of a forward pass of the layers; parameters are not counted."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden_of(Documents(torch.randint(1, 257, (1, tokens)), None))
    return float(sum(tensor.untyped_storage().nbytes() for tensor in seen.values()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter of kernels is off where there is a GPU")
@pytest.mark.parametrize("version", ["x070", "x060", "x052"])
def test_the_table_is_what_autograd_keeps(version: str, tmp_path: Path) -> None:
    """With the kernels of a GPU, in Triton's interpreter: one more layer keeps what the table says of it."""
    tokens, sizes, kept, told = 128, {"width": 64, "head_size": 64}, [], []
    for layers in (1, 2):
        path = tmp_path / f"{layers}.pth"
        torch.save(random_model(version, layers=layers, **sizes), path)
        model = load_model(path, "bf16", "cpu", "torch")
        prepare(model, settings(path, device="cpu", rank=1))
        model.op = BACKENDS["triton"]
        kept.append(bytes_kept(model, tokens))
        told.append(Activations.of(model, tokens, 2).kept(("none",) * layers))
    unit = tokens * 64 * 2
    assert (told[1] - told[0]) / unit == pytest.approx((kept[1] - kept[0]) / unit, abs=0.9)


# --- what a plan says


def test_parts_are_the_total() -> None:
    one = planned(peft="pissa", quant="nf4", quant_head=True)
    assert all(size >= 0 for size in one.parts.values())
    assert one.total == pytest.approx(sum(one.parts.values()))
    assert one.process == one.total + one.context


@pytest.mark.parametrize(
    "ladder",
    [
        [{"ctx_len": n} for n in (256, 512, 4096)],
        [{"micro_batch": n} for n in (1, 2, 8)],
        [{"rank": n} for n in (4, 32, 256)],
        [{"grad_checkpoint": mode} for mode in MODES],
        [{"grad_checkpoint": "block", "offload_checkpoints": away} for away in (True, False)],
        [{"grad_checkpoint": "selective", "offload_checkpoints": away} for away in (True, False)],
        [{"quant": form} for form in ("nf4", "int8", "none")],
        [{"quant": form} for form in ("nf4", "fp8", "none")],
        [{"quant": "nf4", "quant_head": head, "micro_batch": 16} for head in (True, False)],
        [{"optim": name} for name in ("paged-adamw8bit", "adamw8bit", "adamw")],
        [{"master_weights": "bf16"}, {"master_weights": "fp32"}],
        [{"embedding": where} for where in ("cpu", "gpu")],
        [{"peft": method} for method in ("state", "bone", "lora", "pissa", "full")],
    ],
    ids=lambda ladder: "-".join(map(str, ladder[-1])),
)
def test_more_takes_more(ladder: list[dict[str, Any]]) -> None:
    sizes = replace(SMALL, layers=24, width=2048, ffn=8192)
    totals = [planned(sizes, grad_accum=2, **changes).total for changes in ladder]
    assert totals == sorted(totals)
    assert len(set(totals)) == len(totals)


@pytest.mark.parametrize(
    ("changes", "gib"),
    [
        ({"rank": 64}, 6.0), ({"rank": 64, "dora": True}, 6.9), ({"rank": 64, "peft": "pissa"}, 6.2),
        ({"peft": "bone"}, 5.0), ({"peft": "bat"}, 5.4), ({"peft": "state"}, 4.8),
    ],
)  # fmt: skip
def test_peaks_that_were_measured(changes: dict[str, Any], gib: float) -> None:
    """RWKV-7 1.5B at ctx 1024 on an H100: docs/performance.md, which rounds to a tenth; with larger workspaces then."""
    sizes = replace(SMALL, layers=24, width=2048, ffn=8192, rank_w=96, rank_a=96, rank_v=64, rank_g=256)
    one = planned(sizes, micro_batch=1, embedding="gpu", sampling="get", **changes)
    assert (one.total + 2**26 - CUBLAS) / GIB == pytest.approx(gib, abs=0.1)


def test_auto_keeps_what_the_card_has_room_for() -> None:
    modes = [planned(BIG, free=n * GIB, grad_checkpoint="auto").modes for n in (28, 40, 48, 80)]
    assert modes[0] == ("block",) * 61
    assert len(set(modes)) == 4
    assert all(planned(BIG, free=n * GIB, grad_checkpoint="auto").fits() for n in (40, 48, 80))


# --- proposals


@pytest.mark.parametrize("free", [2.5, 3, 4, 6])
def test_proposals_fit_and_the_cheapest_is_first(free: float) -> None:
    sizes = replace(SMALL, layers=24, width=2048, ffn=8192)
    config = settings(rank=64, micro_batch=8, grad_checkpoint="none")
    card = Card(free * GIB)
    found = proposals(config, Outline.of(MODELS["x070"], sizes, config), card)
    assert found
    assert [one.cost for one in found] == sorted(one.cost for one in found)
    for one in found:
        changed = replace(config, **one.changes)
        assert plan(changed, Outline.of(MODELS["x070"], sizes, changed), card).fits()
        assert changed.micro_batch * changed.grad_accum == 8  # the same rows a step
    sets = [one.changes.items() for one in found]
    assert not any(sets[i] <= other for i in range(len(sets)) for other in sets[i + 1 :])


def test_long_rows_are_proposed_with_their_inputs_in_ram() -> None:
    """Before paging, and only where something is computed anew; they are counted in RAM then."""
    sizes = replace(SMALL, layers=24, width=2048, ffn=8192)
    config = settings(rank=64, micro_batch=1, ctx_len=32768)
    outline, card = Outline.of(MODELS["x070"], sizes, config), Card(12 * GIB)
    best = proposals(config, outline, card)[0]
    assert best.changes["offload_checkpoints"]
    assert "paged" not in best.flags
    assert {"block", "selective"} & set(best.planned.modes)
    away = plan(replace(config, offload_checkpoints=True, grad_checkpoint="block"), outline, card)
    there = plan(replace(config, grad_checkpoint="block"), outline, card)
    inputs = (2 * 24 + 1) * 32768 * 2048 * 2
    assert inputs <= away.ram - there.ram <= 1.2 * inputs
    assert away.total < there.total - 0.8 * inputs
    kept = settings(grad_checkpoint="none", micro_batch=1)
    for one in proposals(kept, Outline.of(MODELS["x070"], SMALL, kept), card):
        replace(kept, **one.changes).check()


def test_nothing_is_changed_where_it_fits() -> None:
    config = settings()
    assert [p.changes for p in proposals(config, Outline.of(MODELS["x070"], SMALL, config), Card(80 * GIB))] == [{}]


def test_a_card_without_fp8_is_not_given_it() -> None:
    config = settings(micro_batch=1)
    outline = Outline.of(MODELS["x070"], BIG, config)
    given = [proposals(config, outline, Card(24 * GIB, fp8=fp8))[0].changes["quant"] for fp8 in (True, False)]
    assert given[0] == "fp8"
    assert given[1] in ("int8", "nf4")


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GiB", 12 * GIB), ("12GB", 12e9), ("12000MiB", 12000 * 2**20), ("12G", 12 * GIB), ("12", 12 * GIB),
     ("1.5 gib", 1.5 * GIB)],
)  # fmt: skip
def test_sizes(text: str, size: float) -> None:
    assert size_in_bytes("--fit", text) == size


@pytest.mark.parametrize("text", ["", "much", "12XB", "-3GiB", "0GiB", "12GiB 3", "5b"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--fit "):
        size_in_bytes("--fit", text)


# --- the command


def test_no_value_is_read(big_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Outline.of(MODELS["x070"], SMALL, settings())  # torch imports what it needs for this
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert main(["plan", str(big_file), "--card", "80GiB"]) == 0
    assert time.process_time() - began < 2  # 0.5 s alone
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    shown = capsys.readouterr().out
    assert "61 layers, width 4096" in shown
    assert shown.rstrip().endswith("fits 80.0 GiB")
    assert len(shown.splitlines()) <= 25


def test_it_tells_what_is_missing(big_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(big_file), "--card", "24GiB"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"does not fit: needs \d+\.\d GiB, 24\.0 GiB are free; --fit 24GiB proposes settings", last)


@pytest.mark.parametrize("argv", [["--fit", "24GiB"], ["--fit", "24GiB", "--micro-batch", "1", "--peft", "bone"]])
def test_flags_that_are_proposed_work(argv: list[str], big_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(big_file), *argv]) == 0
    shown = capsys.readouterr().out
    flags = re.search(r"^fits 24\.0 GiB with (--.*)$", shown, re.MULTILINE)
    assert flags is not None
    given = [word for word in argv if word not in ("--fit", "24GiB")]
    assert main(["plan", str(big_file), *given, *flags[1].split(), "--card", "24GiB"]) == 0


def test_where_nothing_fits(big_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(big_file), "--fit", "2GiB"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2].startswith("does not fit 2.00 GiB: needs at least ")
    assert shown[-1] == "would fit with a smaller model"


def test_shorter_rows_or_a_smaller_rank_may_help(big_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", str(big_file), "--micro-batch", "1", "--ctx-len", "16384", "--fit", "10GiB"]
    assert main(argv) == 1
    assert "would fit with --ctx-len" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--fit", "much"], "--fit much: must be a number and a unit"),
        (["--card", "0GiB"], "--card 0GiB: must be at least"),
        (["--device", "gpu"], "--device gpu: unknown"),
        (["--fit", "8GiB", "--device", "cpu"], "--fit 8GiB: is for a GPU's memory"),
        (["--card", "8GiB", "--device", "cpu"], "--card 8GiB: is for a GPU's memory"),
        (["--card", "A100"], "--card A100: must be a number and a unit, or H100; try"),
        (["--device", "cpu", "--optim", "paged-adamw"], "--optim paged-adamw: needs a GPU"),
        (["--device", "cpu", "--offload-checkpoints"], "--offload-checkpoints: needs a GPU"),
        (["--device", "cpu", "--embedding", "gpu"], "--embedding gpu: the run is on the CPU"),
        (["--device", "cpu", "--master-weights", "bf16"], "--master-weights bf16: not with --precision auto"),
        (["--peft", "peft:OFT"], "--peft peft:OFT: "),
        (["--rank", "0"], "--rank 0: must be at least 1"),
        (["--rank", "7", "--peft", "bat"], "--rank 7: bat needs a divisor"),
    ],
)
def test_wrong_settings(
    argv: list[str], message: str, model_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(model_file()), *argv]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--quant", "nf4"], "--quant nf4: .* holds int8 already; leave it out"),
        (["--peft", "full"], "--peft full: .* holds int8, which cannot train; name"),
        (["--peft", "pissa"], "--peft pissa: starts from dense matrices, which .* has not; name"),
        (["--train-parts", "head"], "--train-parts head: .* holds it in int8; leave it out, or name"),
    ],
)
def test_settings_that_a_quantised_file_contradicts(
    argv: list[str], message: str, model_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`plan` and `train` say the same."""
    file = export_quantised(model_file(), tmp_path / "q.safetensors", "int8", quant_head=True)
    (tmp_path / "d.jsonl").write_text('{"text": "hello"}\n')
    run = ["train", "--model", str(file), "--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "o")]
    for command in (["plan", str(file)], [*run, "--device", "cpu"]):
        assert main([*command, *argv]) == 2
        assert re.match(f"error: {message}", capsys.readouterr().err)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rank", "7"], "--rank 7: .* has 4; leave it out"),
        (["--peft", "bone"], "--peft bone: .* has lora; leave it out"),
        (["--quant", "nf4", "--quant-head"], "--quant-head: .* trains the head; leave it out"),
        (["--embedding", "cpu"], "--embedding cpu: .* trains the embedding; leave it out"),
    ],
)
def test_settings_that_an_adapter_contradicts(
    argv: list[str], message: str, model_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(model_file(), rank=4, train_parts=("emb", "head"))
    model = attach_adapter(load_model(config.model), config.adapter_config(), config.parts())
    save_adapter(model, tmp_path / "adapter")
    assert main(["plan", str(config.model), "--adapter", str(tmp_path / "adapter"), *argv]) == 2
    assert re.match(f"error: {message}", capsys.readouterr().err)


@pytest.mark.parametrize("optim", ["muon", "adafactor", "adamw"])
def test_only_settings_that_can_go_together_are_proposed(optim: Any) -> None:
    config = settings(Path("m"), optim=optim, precision="fp32" if optim == "adamw" else "bf16")
    found = list(every(config, Outline.of(MODELS["x070"], BIG, config), Card(8 * GIB)))
    assert len(found) > 10
    assert not [one.changes for one in found if "master_weights" in one.changes]


def test_a_smaller_rank_of_a_quantised_file(
    model_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is proposed there leaves the file's format alone, and fits."""
    dense = model_file(layers=4, width=256, head_size=64, vocab_size=1024)
    file = export_quantised(dense, tmp_path / "q.safetensors", "int8")
    given = ["plan", str(file), "--micro-batch", "1", "--ctx-len", "128"]
    sizes = [f"{size}MiB" for size in range(722, 760, 2)]
    for size in sizes:
        main([*given, "--rank", "256", "--fit", size])
        flags = re.search(r"^would fit with --rank (.*)$", capsys.readouterr().out, re.MULTILINE)
        if flags:
            break
    assert flags, "no size was between"
    assert "--quant " not in flags[1]
    assert main([*given, "--rank", *flags[1].split(), "--card", size]) == 0


def test_a_card_that_was_measured(big_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(big_file), "--card", "H100"]) == 0
    assert "no benchmark known for this run" in capsys.readouterr().out  # 13B was not


def test_the_time_of_a_run_that_was_measured() -> None:
    config = settings(micro_batch=4, ctx_len=8192, max_steps=100)
    outline = Outline.of(MODELS["x070"], SMALL, config)
    told = plan(config, outline, Card(79 * GIB, "NVIDIA H100 80GB HBM3")).time()
    assert told is not None
    assert told.startswith("about 333,697 tokens/s, measured on an H100 with lora")
    assert told.endswith("; 3,276,800 tokens in 0 min")
    assert plan(config, outline, Card(79 * GIB, "another")).time() is None
    assert plan(replace(config, ctx_len=512), outline, Card(79 * GIB, "NVIDIA H100")).time() is not None
    assert plan(replace(config, ctx_len=2048), outline, Card(79 * GIB, "NVIDIA H100")).time() is None


# --- a run


@pytest.fixture
def run(tmp_path: Path, model_file: Callable[..., Path]) -> TrainConfig:
    (tmp_path / "d.jsonl").write_text('{"text": "hello"}\n' * 4, encoding="utf-8")
    return TrainConfig(
        model_file(), [str(tmp_path / "d.jsonl")], tmp_path / "out", rank=4, max_steps=3, device="cpu", ctx_len=64
    )


def test_a_run_tells_what_it_needs(run: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(run)
    assert re.search(r"^memory needs about \d+.* in the CPU's memory: ", capsys.readouterr().out, re.MULTILINE)


def test_too_little_ram_is_a_note(
    run: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rwkv_peft.plan.memory.free_ram", lambda: 1e6)
    train(run)
    assert re.search(r"^note +needs about .* of RAM, 1 MiB are free", capsys.readouterr().out, re.MULTILINE)


def forecast_on(run: TrainConfig, free: float) -> memory.Forecast:
    """As on a GPU with so many bytes."""
    config = replace(run, ctx_len=8192, device="cuda").resolved()
    outline = Outline.of_file(config.model, config)
    return memory.Forecast(config, None, outline, plan(config, outline, Card(free), on_gpu=True))


def test_a_run_that_cannot_fit_is_refused(run: TrainConfig) -> None:
    forecast_on(run, 80 * GIB).check()
    needs = forecast_on(run, 80 * GIB).planned.needs
    forecast_on(replace(run, grad_checkpoint="none"), needs / 1.05).check()  # nearly: the plan is no oracle
    with pytest.raises(ConfigError, match=r"^--device cuda: the run needs about .*, .* are free; try --"):
        forecast_on(replace(run, grad_checkpoint="none"), needs / 1.15).check()


def test_out_of_memory_names_what_helps(run: TrainConfig) -> None:
    told = forecast_on(run, 80 * GIB).explained(torch.OutOfMemoryError("CUDA out of memory.\nTried"))
    assert isinstance(told, TrainingError)
    assert re.fullmatch(r"out of memory; the run was expected to need about .* were free; try --.*", str(told))
    other = RuntimeError("a mistake")
    assert forecast_on(run, 80 * GIB).explained(other) is other


@pytest.mark.parametrize("step", [1, 3])
def test_what_was_trained_before_memory_ended_is_kept(
    step: int, run: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwkv_peft.training.step import MicroBatches

    calls, plain = iter(range(1, 10)), MicroBatches.run

    def fails(self: MicroBatches, *args: Any) -> Tensor:
        if next(calls) == step:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return plain(self, *args)

    monkeypatch.setattr(MicroBatches, "run", fails)
    with pytest.raises(TrainingError, match=r"^out of memory; .* about .*; try ") as caught:
        train(run)
    assert ("what was trained until then is in" in str(caught.value)) == (step > 1)
    assert (run.out / "adapter").exists() == (step > 1)
