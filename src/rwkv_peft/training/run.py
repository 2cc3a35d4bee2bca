"""A run from its settings to its adapter, in the order in which it happens."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console

from ..adapters import (
    follow,
    save_adapter,
)
from ..checkpoint import read_tensors, stream_tensors
from ..config import ChatForm, TrainConfig, shares_of
from ..data.binidx import is_binidx
from ..data.dataset import Dataset, load_for_training
from ..data.sampling import Sampler
from ..data.templates import find_template
from ..data.tokenizer import Tokenizer, tokenizer_for
from ..errors import ConfigError, OutputError, TrainingError
from ..loading import find_device, read_sizes
from ..models import Rwkv
from ..ops.quant.fp8 import has_fp8
from ..yaml_config import to_yaml
from .engine import SingleProcess, lean_memory
from .evaluation import Evaluation
from .loop import train_loop
from .memory import Forecast
from .metrics import Metrics
from .model import going_on, load_base, prepare, saved_adapter
from .optim import build_optimizer, check_optimizer

LONGEST_NAME = 255  # bytes that file systems allow


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    out: Path
    """The run's folder."""
    result: Path
    """The adapter folder, or for `--peft full` the model file."""
    steps: int
    losses: list[float]
    interrupted: bool
    best: Path | None = None
    """As `result`, after the step with the lowest loss on the examples for evaluation."""
    eval_losses: dict[int, float] = field(default_factory=dict)
    """The loss on these, by step."""


def train(config: TrainConfig, console: Console | None = None) -> RunResult:
    """Fine-tune as `config` says, and write the run's folder.

    Raises ConfigError, CheckpointError or DataError before anything is written; TrainingError if the loss or a gradient
    is NaN or Inf or memory ends, after saving what was trained until then; OutputError if the disk fails.
    """
    config.check()
    lean_memory(find_device(config.device))
    saved = saved_adapter(config)
    config = going_on(config, saved)
    idle = config.without_effect()
    config = config.resolved()
    out = config.out
    check_out(out)
    check_optimizer(config, find_device(config.device))
    vocab_size = read_sizes(config.model).vocab_size
    tokenizer = tokenizer_for_data(config, vocab_size).with_special(config.special_tokens, vocab_size)
    data, held = load_for_training(config, tokenizer, vocab_size)
    sampler = Sampler.of(config, data)
    total = config.max_steps or sampler.total_steps(config.epochs)
    forecast = Forecast.of(replace(config, max_steps=total), saved)
    forecast.check()
    with forecast.explaining():
        model = load_base(config, saved)
        prepare(model, config, saved)
    model.form = form_of(config)
    check_space(out, model)
    optimizer = build_optimizer(model, config)
    follow(model, optimizer, total)
    metrics = Metrics(out, to_yaml(config), total, model.like.device, console or Console())
    for line in (*describe(config, model, data, held, sampler, total, idle), *forecast.lines()):
        metrics.say(line)
    evaluation = evaluation_of(config, model, held, total)
    try:
        with interruption() as stopped, metrics.progress:
            train_loop(config, model, sampler, optimizer, SingleProcess(), metrics, stopped, evaluation)
    except Exception as error:  # whatever it is, what was trained is not lost
        told = forecast.explained(error)
        if not metrics.records:
            if told is error:
                raise
            raise told from error
        result = save(model, config, out)
        metrics.finish()
        if isinstance(told, TrainingError):
            raise TrainingError(f"{told}; what was trained until then is in {result}") from error
        metrics.say(f"broken off after {len(metrics.records)} steps; what was trained until then is in {result}")
        raise
    result = save(model, config, out)
    metrics.finish()
    return ended(out, result, metrics, evaluation, stopped())


def ended(out: Path, result: Path, metrics: Metrics, evaluation: Evaluation | None, interrupted: bool) -> RunResult:
    """Say how a run ended, and what it left behind."""
    steps = len(metrics.records)
    is_whole = steps == metrics.total_steps
    why = "stopped by hand" if interrupted else "done" if is_whole else "stopped, since it got no better,"
    metrics.say(f"{why} after {steps} steps: {result}")
    losses = [record.loss for record in metrics.records]
    if evaluation is None or evaluation.best is None:
        return RunResult(out, result, steps, losses, interrupted)
    at = evaluation.best_step
    metrics.say(f"best after {at} steps: loss {evaluation.losses[at]:.4f} on the held-out examples: {evaluation.best}")
    return RunResult(out, result, steps, losses, interrupted, evaluation.best, evaluation.losses)


def save(model: Rwkv, config: TrainConfig, out: Path) -> Path:
    """Write the adapter folder, or for full tuning the model in its base's number formats."""
    if config.peft != "full":
        save_adapter(model, out / "adapter")
        return out / "adapter"
    base = read_tensors(config.model)
    tensors = base | dict(model.named_parameters())
    forms = {n: torch.empty_like(t, dtype=base.get(n, t).dtype, device="meta") for n, t in tensors.items()}
    stream_tensors(out / "model.pth", forms, (t.detach().cpu().to(forms[n].dtype) for n, t in tensors.items()))
    return out / "model.pth"


def tokenizer_for_data(config: TrainConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer of a run. Data that are tokens already need none, whatever the vocabulary is."""
    try:
        return tokenizer_for(config.tokenizer, vocab_size)
    except ConfigError:
        sources = [source for data in (config.data, list(config.eval_data)) for source, _ in shares_of(data)]
        if config.tokenizer == "auto" and config.mask not in ("qa", "se") and all(map(is_binidx, sources)):
            return Tokenizer.byte()  # which encodes nothing here
        raise


def form_of(config: TrainConfig) -> ChatForm:
    """How the run writes conversations."""
    source = str(getattr(find_template(config.template), "source", ""))
    return ChatForm(config.template, source, config.stop_token, config.special_tokens)


def evaluation_of(config: TrainConfig, model: Rwkv, held: Dataset | None, total: int) -> Evaluation | None:
    """What measures the loss while training, if anything does."""
    if held is None:
        return None
    assert config.micro_batch is not None
    sampler = Sampler(held, micro_batch=config.micro_batch, shuffle=False)
    every = config.eval_every or max(1, total // 10)
    return Evaluation(sampler, every, config.patience, keep=lambda: save(model, config, config.out / "best"))


def describe(
    config: TrainConfig, model: Rwkv, data: Dataset, held: Dataset | None, sampler: Sampler, total: int, idle: list[str]
) -> Iterator[str]:
    """What the run is about to do, for people."""
    s = model.sizes
    count = sum(map(math.prod, model.shapes().values()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    number = str(model.dtype).removeprefix("torch.")
    yield f"model  {model.source}: {model.title}, {s.layers} layers, width {s.width}, vocabulary {s.vocab_size}"
    stored = "" if model.quant == "none" else f", matrices in {model.quant}"
    where = f"{number}{stored} on {model.like.device}, op {model.op.name}"
    method = "full" if model.adapter_config is None else model.adapter_config.peft
    yield f"train  {method}: {trained:,} of {count:,} parameters; {where}"
    if model.quant == "fp8" and not has_fp8(model.like.device):
        yield "note   no products of fp8 here: matrices are unpacked for each, which takes time; nf4 needs less memory"
    yield from (f"note   {line}" for line in idle)
    yield f"data   {data.summary()}"
    yield from (f"note   {line}" for line in data.notes)
    if held is not None:
        yield f"eval   {held.summary()}"
    full = f", {sampler.fill():.1%} full" if config.sampling == "pack" else ""
    yield (
        f"steps  {total:,} of {config.micro_batch} × {config.grad_accum} rows; {config.sampling}: "
        f"{len(sampler.rows(0)):,} rows an epoch{full}"
    )


def check_out(out: Path) -> None:
    """Raise ConfigError unless `out` is new or empty, and can be made."""
    long = [part for part in out.parts if len(os.fsencode(part)) > LONGEST_NAME]
    if long:
        raise ConfigError(f"--out {long[0][:20]}…: a name of {len(long[0])} letters is too long; choose a shorter one")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; name a new folder")
    if out.is_dir() and any(out.iterdir()):
        what = "another run" if (out / "config.yaml").exists() else "files already"
        raise ConfigError(f"--out {out}: holds {what}; name a new folder, or move that one away")
    home = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise ConfigError(f"--out {out}: cannot be made in {home}; name a folder that you may write")


def check_space(out: Path, model: Rwkv) -> None:
    """Raise OutputError if what will be written at the end does not fit on the disk now."""
    need = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad) + 2**20  # and the metrics
    home = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(home).free
    if free < need:
        raise OutputError(f"--out {out}: the run writes about {need:,} bytes, the disk has {free:,} free; make room")


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Ctrl-C once asks to stop after the step, so that the adapter is saved; a second one stops at once."""
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield seen.is_set
        return

    def once(signum: int, frame: object) -> None:
        seen.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, once)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, before)
