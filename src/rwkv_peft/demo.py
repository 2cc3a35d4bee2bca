"""`rwkv-peft demo`: the whole path on a laptop, with the model and the data that come with the program."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from rich.console import Console

from .config import DemoConfig, TrainConfig
from .data.examples import segments_of
from .data.sources import read_items
from .data.templates import find_template
from .data.tokenizer import Tokenizer
from .errors import DataError
from .export.merge import merge
from .files import write_text
from .inference import answer_all
from .loading import load_model
from .models import Rwkv
from .training.run import check_out, train
from .yaml_config import to_yaml

ASSETS = Path(__file__).parent / "assets"
BASE = ASSETS / "tiny" / "model.pth"
TRAIN_DATA, HELDOUT = ASSETS / "demo" / "train.jsonl", ASSETS / "demo" / "heldout.jsonl"
WRITTEN = ("config.yaml", "metrics.jsonl", "log.txt", "loss.png", "model.pth", "demo.json")
LONGEST_ANSWER = 64  # tokens, more than any answer of the data has
SHOWN = 3


def run_demo(config: DemoConfig) -> None:
    """Score the tiny base on held-out examples, tune it with LoRA, merge, and score the merged file.

    Raises ConfigError if `config.out` holds anything but an earlier demo, OutputError if the disk fails, and
    KeyboardInterrupt if the training was stopped by hand, after it has saved.
    """
    out, console = Path(config.out), Console()
    remove_earlier_demo(out)
    check_out(out)
    console.print("An order in plain words becomes a JSON record. First the base model, which has never seen the task:")
    before, answers_before = score(load_model(BASE))
    console.print(f"before: {before:.1%} of the held-out answers are right\n", highlight=False)
    began = time.perf_counter()
    run = train(demo_settings(out), console)
    seconds = time.perf_counter() - began
    if run.interrupted:
        raise KeyboardInterrupt
    merged = merge(BASE, run.result, out / "model.pth")
    after, answers_after = score(load_model(merged))
    result = {"before": before, "after": after, "train_seconds": round(seconds, 1)}
    write_text(out / "demo.json", json.dumps(result, indent=2) + "\n")
    for (prompt, want), old, new in zip(heldout()[:SHOWN], answers_before, answers_after, strict=False):
        shown = (prompt.splitlines()[0], f"  wanted  {want}", f"  before  {_one_line(old)}", f"  after   {new}")
        console.print("", *shown, sep="\n", highlight=False, markup=False, soft_wrap=True)
    console.print(farewell(out, result), highlight=False, markup=False, soft_wrap=True)


def demo_settings(out: Path) -> TrainConfig:
    """The training run of the demo."""
    return TrainConfig(
        model=BASE, data=[str(TRAIN_DATA)], out=out, peft="lora", rank=16, ctx_len=256, micro_batch=6, max_steps=100,
        lr=2e-3, lr_final=1e-4, warmup_steps=5, device="cpu",
    ).resolved()  # fmt: skip


def heldout() -> list[tuple[str, str]]:
    """Prompt and wanted answer of each held-out example."""
    template = find_template("rwkv")
    values = [item.value for item in read_items(str(HELDOUT))]
    pairs = [segments_of(value, None, template)[0] for value in values if not isinstance(value, DataError)]
    return [(prompt.text, answer.text.strip()) for prompt, answer in pairs]


def score(model: Rwkv) -> tuple[float, list[str]]:
    """Share of the held-out examples that the model answers exactly, and its answers."""
    prompts, wanted = zip(*heldout(), strict=True)
    answers = [a.strip() for a in answer_all(model, Tokenizer.byte(), prompts, LONGEST_ANSWER)]
    return sum(map(str.__eq__, answers, wanted)) / len(wanted), answers


def remove_earlier_demo(out: Path) -> None:
    """Remove what an earlier demo wrote, and nothing else."""
    settings = out / "config.yaml"
    broken_off = settings.is_file() and settings.read_text(encoding="utf-8") == to_yaml(demo_settings(out))
    if broken_off or (out / "demo.json").is_file():
        for name in WRITTEN:
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "adapter", ignore_errors=True)


def farewell(out: Path, result: dict[str, float]) -> str:
    """The score, where everything is, and what to type next."""
    return f"""
held-out answers that are right: {result["before"]:.1%} before, {result["after"]:.1%} after \
({result["train_seconds"]:.0f} s of training)

adapter       {out / "adapter"}
merged model  {out / "model.pth"}
loss          {out / "loss.png"}

Next, with a model and a file of your own:
  rwkv-peft train --model MODEL.pth --data FILE.jsonl --out runs/first"""


def _one_line(text: str) -> str:
    return text.replace("\n", " ⏎ ")
