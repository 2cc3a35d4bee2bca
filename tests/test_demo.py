"""The embedded model and data, and the demo on a few of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import rwkv_peft as rp
from rwkv_peft import demo
from rwkv_peft.cli import main
from rwkv_peft.config import DemoConfig, TrainConfig
from rwkv_peft.training import run as training
from rwkv_peft.training.run import RunResult
from rwkv_peft.yaml_config import to_yaml


def records(path: Path) -> list[dict[str, str]]:
    """The wanted answer of each example."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(json.loads(line)["messages"][-1]["content"]) for line in lines]


def test_held_out_names_and_items_are_not_trained_on() -> None:
    trained, heldout = records(demo.TRAIN_DATA), records(demo.HELDOUT)
    assert len(trained) >= 1000 and len(heldout) >= 200
    for key in ("to", "item"):
        assert not {record[key] for record in heldout} & {record[key] for record in trained}


def test_the_tiny_base_is_small_and_has_read_english() -> None:
    assert demo.BASE.stat().st_size <= 8 * 2**20
    model = rp.load_model(demo.BASE)
    ids = torch.tensor([rp.Tokenizer.byte().encode("In the beginning was the word, and the word was with the people.")])
    with torch.no_grad():
        logits, _ = model(ids)
    assert torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]) < 1.7  # a byte at random costs 5.5


@pytest.fixture
def short_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo with a fifth of its steps and 24 held-out examples; gives its folder."""
    few = tmp_path / "heldout.jsonl"
    few.write_text("".join(demo.HELDOUT.read_text(encoding="utf-8").splitlines(keepends=True)[:24]), encoding="utf-8")
    whole = demo.demo_settings
    monkeypatch.setattr(demo, "HELDOUT", few)
    monkeypatch.setattr(demo, "demo_settings", lambda out: replace(whole(out), max_steps=20))
    return tmp_path / "out"


def test_the_demo_learns_and_replaces_an_earlier_one(short_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.run_demo(DemoConfig(short_demo))
    shown = capsys.readouterr().out
    result = json.loads((short_demo / "demo.json").read_text())
    assert result["before"] == 0 and result["after"] >= 0.25 and result["train_seconds"] > 0
    assert all(str(short_demo / name) in shown for name in ("adapter", "model.pth", "loss.png"))
    assert shown.count("  before  ") == shown.count("  after   ") == demo.SHOWN
    assert "rwkv-peft train --model" in shown
    demo.remove_earlier_demo(short_demo)
    assert not list(short_demo.iterdir())


def test_a_demo_stopped_by_hand_ends_there_and_can_be_run_again(
    short_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: TrainConfig, console: Console) -> RunResult:
        return replace(training.train(replace(config, max_steps=1), console), interrupted=True)

    monkeypatch.setattr(demo, "train", interrupted)
    assert main(["demo", "--out", str(short_demo)]) == 130
    assert (short_demo / "adapter").is_dir() and not (short_demo / "demo.json").exists()
    (short_demo / "config.yaml").write_text(to_yaml(demo.demo_settings(short_demo)))
    demo.remove_earlier_demo(short_demo)
    assert not list(short_demo.iterdir())


def test_the_demo_touches_nothing_of_others(short_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short_demo.mkdir()
    mine = replace(demo.demo_settings(short_demo), rank=4)  # a run of one's own on the demo's data
    (short_demo / "config.yaml").write_text(to_yaml(mine))
    assert main(["demo", "--out", str(short_demo)]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert [path.name for path in short_demo.iterdir()] == ["config.yaml"]
