"""Every file of examples/ runs as it stands, a few steps of it on the tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_peft.cli import main

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SHORT = ["--max-steps", "2", "--micro-batch", "2", "--device", "cpu"]
ALONE = sorted(path.name for path in EXAMPLES.glob("*.yaml") if path.name != "continue.yaml")


def train(name: str, out: Path, *flags: str) -> None:
    assert main(["train", "--config", str(EXAMPLES / name), "--out", str(out), *SHORT, *flags]) == 0


@pytest.mark.parametrize("name", ALONE)
def test_training(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    train(name, tmp_path / "out")
    assert (tmp_path / "out" / ("model.pth" if name == "full.yaml" else "adapter")).exists()
    assert (tmp_path / "out" / "adapter" / "state.pth").exists() == ("state" in name)


def test_going_on_and_merging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    train("lora.yaml", tmp_path / "first")
    train("continue.yaml", tmp_path / "second", "--adapter", str(tmp_path / "first" / "adapter"))
    base, adapter, merged = (
        ROOT / "src/rwkv_peft/assets/tiny/model.pth",
        tmp_path / "second/adapter",
        tmp_path / "m.pth",
    )
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    command = ["sh", str(EXAMPLES / "merge.sh"), str(base), str(adapter), str(merged)]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True)
    assert merged.exists() and done.stdout.startswith(f"{merged}\n")


def test_own_loop(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "own_loop.py"), str(tmp_path / "adapter")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 20 and losses[-1] < losses[0] / 2
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_the_readme_names_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"[{path.name}]({path.name})" in text for path in EXAMPLES.iterdir() if path.name != "README.md")
