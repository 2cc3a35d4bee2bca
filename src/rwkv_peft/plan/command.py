"""The command `plan`: a table of what a run needs, whether it fits, and with which settings it would."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..adapters import SavedAdapter, read_adapter
from ..config import PlanConfig, TrainConfig
from ..errors import ConfigError
from .cards import GIB, Card, find_card, size_in_bytes
from .contradictions import check_device
from .fitting import beyond_settings, least, proposals
from .memory import Outline, Plan, gib, plan
from .weights import is_foreign

WHAT = {
    "weights": "frozen, as they are",
    "quantised": "frozen, in 8 or 4 bits",
    "embedding": "frozen",
    "trained": "adapters, and what trains beside them",
    "workspace": "of the libraries, and matrices unpacked",
    "gradients": "beyond the place of activations that are gone",
    "optimiser": "its averages",
    "activations": "kept for the backward pass",
    "loss or layer": "logits of a chunk, or one layer backward",
}


def run_plan(config: PlanConfig) -> bool:
    """Print the plan, and return whether the run fits. Raises ConfigError or CheckpointError."""
    config.check()
    on_gpu = planned_device(config.device)
    for flag, value in (("--fit", config.fit), ("--card", config.card)):
        if value and not on_gpu:
            raise ConfigError(f"{flag} {value}: is for a GPU's memory; leave out --device cpu")
    card = find_card(config.card, torch.device(config.device if on_gpu and torch.cuda.is_available() else "cpu"))
    if config.fit:
        card = replace(card, free=size_in_bytes("--fit", config.fit), has_context=False)
    saved = None if config.adapter is None else read_adapter(config.adapter, pissa_init=config.pissa_init)
    settings = method_of(config, saved).resolved()
    check_device(settings, on_gpu)
    if is_foreign(settings):
        raise ConfigError(f"--peft {settings.peft}: what PEFT's own methods need is not planned; plan --peft lora")
    outline = Outline.of_file(config.model, settings, saved)
    if config.fit:
        return print_fitting(settings, outline, card, saved)
    print(heading(settings, outline))
    planned = plan(settings, outline, card, on_gpu)
    print("\n".join((*table(planned), *verdict(planned))))
    return planned.fits()


def planned_device(device: str) -> bool:
    """Whether it is a GPU, which need not be here. Raises ConfigError if no device is called so."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError(f"--device {device}: unknown; allowed are cuda, cuda:N, cpu")
    if re.fullmatch(r"cuda:\d+", device) and 0 < torch.cuda.device_count() <= int(device[5:]):
        raise ConfigError(f"--device {device}: torch sees {torch.cuda.device_count()} GPUs; choose --device cuda")
    return device != "cpu"


def method_of(config: TrainConfig, saved: SavedAdapter | None) -> TrainConfig:
    """With the method of the adapter to go on with, if there is one."""
    if saved is None or config.peft != TrainConfig.peft:
        return config
    return replace(config, peft=saved.config.peft if saved.config else "state")


def print_fitting(config: TrainConfig, outline: Outline, card: Card, saved: SavedAdapter | None) -> bool:
    """The cheapest settings that fit, with their plan, and others; or the least that is needed."""
    found = proposals(config, outline, card)
    assert card.free is not None
    if not found:
        one = least(config, outline, card)
        print("\n".join((heading(replace(config, **one.changes), outline), *table(one.planned))))
        needs = f"needs at least {gib(one.planned.needs)}, with {one.flags or 'these settings'}"
        print(f"does not fit {gib(card.free)}: {needs}")
        print(f"would fit with {beyond_settings(config, outline, card, saved)}")
        return False
    best, *others = found
    print("\n".join((heading(replace(config, **best.changes), outline), *table(best.planned))))
    print(f"fits {gib(card.free)}" + (f" with {best.flags}" if best.changes else " with these settings"))
    for other in others if best.changes else ():
        print(f"or         with {other.flags}: {gib(other.planned.needs)}")
    return True


def heading(config: TrainConfig, outline: Outline) -> str:
    """The model and the run in a line."""
    s, title = outline.sizes, outline.model.title
    rows = f"{config.micro_batch} × {config.grad_accum} rows of {config.ctx_len} tokens"
    return f"{config.model.name}: {title}, {s.layers} layers, width {s.width}; {config.peft}, {rows}"


def table(planned: Plan) -> Iterator[str]:
    """The parts, their sum, and what is needed elsewhere."""
    where = "GPU" if planned.on_gpu else "RAM"
    yield f"{'':14} {'GiB':>7}  where"
    for name, size in planned.parts.items():
        if size:
            yield f"{name:14} {size / GIB:7.2f}  {where}  {WHAT[name]}"
    yield f"{'total':14} {planned.total / GIB:7.2f}  {where}  what torch allocates at most"
    yield f"{'process':14} {planned.process / GIB:7.2f}  {where}  with what torch does not count"
    if planned.on_gpu:
        ram = f"at most, without the data; {planned.ram / GIB:.2f} while training"
        yield f"{'RAM':14} {planned.ram_peak / GIB:7.2f}  RAM  {ram}"
    yield f"{'written':14} {planned.disk / GIB:7.2f}  disk"
    yield f"trains {planned.trained:,} parameters; --grad-checkpoint of layers: {planned.checkpointing()}"
    yield time_line(planned)
    yield from (f"note   {note}" for note in planned.notes)


def time_line(planned: Plan) -> str:
    """How fast it would be, where that was measured."""
    card = "this run on this card" if planned.card.name else "this card"
    return f"time   {planned.time() or f'no benchmark known for {card}'}"


def verdict(planned: Plan) -> Iterator[str]:
    """Whether it fits, where a size is known."""
    free = planned.card.free
    if not planned.on_gpu:
        return
    if free is None:
        yield "no GPU is here: --card 24GiB says whether it fits, --fit 24GiB proposes settings that do"
    elif planned.fits():
        yield f"fits {gib(free)}"
    else:
        size = f"{free / GIB:.2f}".rstrip("0").rstrip(".") + "GiB"
        yield f"does not fit: needs {gib(planned.needs)}, {gib(free)} are free; --fit {size} proposes settings"
