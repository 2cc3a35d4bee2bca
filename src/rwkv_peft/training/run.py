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
    SavedAdapter,
    attach_adapter,
    attach_saved,
    draws_random_numbers,
    follow,
    read_adapter,
    save_adapter,
)
from ..adapters.attach import adapted, check_apart, ends_in
from ..adapters.trainable import add_parts, make_trainable, part_names
from ..checkpoint import read_tensors, stream_tensors
from ..config import LR, LR_STATE, MEANT_FOR, AdapterConfig, ChatForm, TrainConfig, flag_of, shares_of
from ..data.binidx import is_binidx
from ..data.dataset import Dataset, load_for_training
from ..data.sampling import Sampler
from ..data.templates import find_template
from ..data.tokenizer import Tokenizer, tokenizer_for
from ..errors import ConfigError, OutputError, TrainingError
from ..loading import EMBEDDING, find_device, load_model, read_sizes
from ..models import STATES, Rwkv
from ..ops.quant.fp8 import has_fp8
from ..yaml_config import to_yaml
from .checkpointing import choose_checkpoint, free_memory
from .engine import SingleProcess, lean_memory
from .evaluation import Evaluation
from .loop import train_loop
from .memory import Forecast
from .metrics import Metrics
from .offload import Offload, check_offload
from .optim import build_optimizer, check_optimizer, keep_in_bf16

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
    check_offload(config, find_device(config.device))
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


def load_base(config: TrainConfig, saved: SavedAdapter | None) -> Rwkv:
    """The model to train, kept as `config` says. Raises ConfigError and CheckpointError."""
    trains = config.peft == "full" or "emb" in config.parts() or (saved is not None and EMBEDDING in saved.parts)
    on_gpu = find_device(config.device).type == "cuda"
    embedding = config.embedding
    if embedding == "auto":
        embedding = "cpu" if on_gpu and not trains else "gpu"
    elif trains and embedding == "cpu":
        raise ConfigError(f"--embedding cpu: {config.adapter} trains the embedding; leave it out")
    elif embedding == "gpu" and not on_gpu:
        raise ConfigError("--embedding gpu: the run is on the CPU; leave it out")
    how = (config.precision, config.device, config.op, config.quant, config.quant_head, embedding)
    return load_model(config.model, *how)


def saved_adapter(config: TrainConfig) -> SavedAdapter | None:
    """The adapter to go on with; a folder holds its own alpha. Raises CheckpointError."""
    if config.adapter is None:
        return None
    return read_adapter(config.adapter, config.alpha if config.adapter.is_file() else None, config.pissa_init)


def going_on(config: TrainConfig, saved: SavedAdapter | None) -> TrainConfig:
    """With the method of the adapter to go on with, its form of conversations, and the rates that suit it."""
    if saved is None:
        return config
    form = saved.form
    if ChatForm(config.template, "", config.stop_token, config.special_tokens) == ChatForm():
        config = replace(config, template=form.template, stop_token=form.stop_token, special_tokens=form.special_tokens)
    if config.peft == TrainConfig.peft:
        config = replace(config, peft=saved.config.peft if saved.config else "state")
    if config.lr is None and not all(name.endswith(STATES) for name in (*saved.tensors, *saved.parts)):
        config = replace(config, lr=LR, lr_state=config.lr_state or LR_STATE)
    return config


def prepare(model: Rwkv, config: TrainConfig, saved: SavedAdapter | None = None) -> None:
    """Attach a new adapter, or the `saved` one to go on with, and let what is to train, train."""
    torch.manual_seed(config.seed)
    parts = config.parts()
    if config.peft == "full":
        add_parts(model, parts)
        make_trainable(model, [name for name, _ in model.named_parameters()])
    elif saved is None or config.adapter is None:
        attach_adapter(model, config.adapter_config(), parts)
    else:
        attach_saved(model, saved, config.adapter)
        check_continued(config, model)
        add_parts(model, parts)
        names = [name for part in parts for name in part_names(model, part)]
        check_apart({f"{name}.weight" for name, _ in adapted(model)}, names)
        make_trainable(model, names)
    if config.master_weights == "bf16":
        keep_in_bf16(model)
    model.draws = draws_random_numbers(model)
    if model.like.is_cuda:
        torch.cuda.empty_cache()  # of what was there on the way to here
    model.grad_checkpoint = checkpoint_of(model, config)
    if config.offload_checkpoints:
        assert config.micro_batch is not None
        numbers = config.micro_batch * config.ctx_len * model.sizes.width
        model.keep = Offload(model.like.device, numbers * model.like.element_size())
    model.train()


def checkpoint_of(model: Rwkv, config: TrainConfig) -> str | tuple[str, ...]:
    """What the layers compute anew; `auto` is decided for each of them."""
    if config.grad_checkpoint != "auto":
        return config.grad_checkpoint
    if model.like.device.type != "cuda":
        return "none"
    assert config.micro_batch is not None
    return choose_checkpoint(model, config.micro_batch * config.ctx_len, free_memory(model.like.device), config)


def check_continued(config: TrainConfig, model: Rwkv) -> None:
    """Raise ConfigError if a setting was given that contradicts the adapter to go on with."""
    saved, asked, plain = model.adapter_config, config.adapter_config(), AdapterConfig()
    assert saved is not None
    for name in ("peft", "rank", "alpha", "rank_stabilised", "dora"):
        got, want = getattr(asked, name), getattr(saved, name)
        if got not in (getattr(plain, name), want):
            shown = want if saved.peft in MEANT_FOR.get(name, (saved.peft,)) else f"none, as {saved.peft}"
            raise ConfigError(f"{flag_of(name)} {got}: {config.adapter} has {shown}; leave it out")
    chosen = {target for target in saved.targets if ends_in(target, asked.targets)}
    if asked.targets and saved.targets and chosen != set(saved.targets):
        raise ConfigError(f"--targets {' '.join(asked.targets)}: {config.adapter} has its own; leave it out")
    saved.dropout = config.dropout or saved.dropout


def save(model: Rwkv, config: TrainConfig, out: Path) -> Path:
    """Write the adapter folder, or for full tuning the model in its base's number formats."""
    if config.peft != "full":
        save_adapter(model, out / "adapter")
        return out / "adapter"
    base = read_tensors(config.model)
    tensors = base | dict(model.named_parameters())
    forms = {n: torch.empty_like(t, dtype=base.get(n, t).dtype, device="meta") for n, t in tensors.items()}
    stream_tensors(out / "model.pth", forms, (t.detach().to(forms[n].dtype) for n, t in tensors.items()))
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
