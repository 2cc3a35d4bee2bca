"""What a run will need: bytes by part, from the model's header and the settings. Nothing is loaded.

The total is what torch will have allocated at most; the process has the CUDA context besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from ..adapters import SavedAdapter
from ..config import TrainConfig
from ..loading import check_model
from ..models import Rwkv, Sizes
from ..ops.quant import QUANTS
from ..packed import Packed, read_model
from .activations import Activations
from .cards import GIB, Card, Measured, free_ram, measured
from .contradictions import check_settings
from .weights import (
    Count,
    counts,
    is_foreign,
    largest,
    optimiser_bytes,
    prepared,
    trained_bytes,
)

CONTEXT = 0.7 * GIB  # CUDA's own, the kernels that are loaded, and pages that are used in part; torch does not count it
CUBLAS = 9 * 2**20  # its workspace, as `lean_memory` sets it
PROCESS = {True: 2.0 * GIB, False: 0.4 * GIB}  # RAM of Python and torch, with CUDA's libraries and without
SPARE = 0.9  # share of the free memory that `auto` plans with, for what nobody counts
MARGIN = 1.08  # a run is refused only if the plan is so far above what is free


@dataclass(frozen=True)
class Plan:
    """Bytes."""

    parts: dict[str, float]
    """Of the memory of the device, at the moment when it holds most."""
    context: float
    """On a GPU, beside what torch allocates."""
    ram: float
    """Of the CPU's memory, once the model is loaded; the data are not counted."""
    ram_peak: float
    disk: float
    """What the run writes at its end."""
    modes: tuple[str, ...]
    """What each layer computes anew in the backward pass."""
    trained: int
    """Parameters."""
    card: Card
    on_gpu: bool
    tokens: int | None
    """Of the whole run, where --max-steps tells its length; what pads rows counts too."""
    measured: Measured | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def total(self) -> float:
        """What torch allocates at most."""
        return sum(self.parts.values())

    @property
    def process(self) -> float:
        """What the process takes of the GPU, or of the CPU's memory."""
        return self.total + self.context if self.on_gpu else self.ram_peak

    @property
    def needs(self) -> float:
        """What is to be compared with the card's free memory."""
        return self.process - (self.context if self.card.has_context else 0.0)

    def fits(self, margin: float = 1.0) -> bool:
        """Whether it fits, as far as is known; a `margin` above 1 lets it be so much too large."""
        return self.card.free is None or self.needs <= margin * self.card.free

    def summary(self) -> str:
        """The largest parts in one line, for the beginning of a run."""
        where = "on the GPU" if self.on_gpu else "in the CPU's memory"
        free = "" if self.card.free is None else f" of {gib(self.card.free)}"
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.parts.items() if size >= 0.05 * GIB)
        ram = f"; RAM about {gib(self.ram_peak)}" if self.on_gpu else "; a rough guess"
        return f"needs about {gib(self.needs)}{free} {where}: {parts or 'next to nothing'}{ram}"

    def time(self) -> str | None:
        """How fast the run is and how long it takes, where a run like it was measured."""
        if self.measured is None:
            return None
        speed, method, tokens = self.measured.speed, self.measured.method, self.measured.tokens
        length = "" if self.tokens is None else f"; {self.tokens:,} tokens in {self.tokens / speed / 60:.0f} min"
        return f"about {speed:,} tokens/s, measured on an H100 with {method}, {tokens:,} tokens at once{length}"

    def checkpointing(self) -> str:
        """How many layers compute what anew."""
        return ", ".join(f"{n} × {mode}" for mode, n in Counter(self.modes).items())


class Outline:
    """A model without values, in which trains what the settings let train; what a plan must know of it."""

    def __init__(self, model: Rwkv, file_bytes: float = 0.0, quant: str = "none", quant_head: bool = False) -> None:
        """`file_bytes`: of the tensors in the model's file; `quant`: its form there, which settings cannot change."""
        self.model, self.sizes, self.file_bytes = model, model.sizes, file_bytes
        self.quant, self.quant_head = quant, quant_head
        self.counts = Counter(counts(model))
        self.activations = cache(self._activations)

    @staticmethod
    def of(
        kind: type[Rwkv],
        sizes: Sizes,
        config: TrainConfig,
        names: Iterable[str] = (),
        saved: SavedAdapter | None = None,
    ) -> Outline:
        """Of a model of these sizes; `names` are those of its tensors, which tell whether it has a learned state."""
        return Outline(prepared(kind, sizes, names, config, saved))

    @staticmethod
    def of_file(path: Path, config: TrainConfig, saved: SavedAdapter | None = None) -> Outline:
        """Of the model in a file, of which only the header is read. Raises CheckpointError and ConfigError."""
        entries = read_model(path)
        kind, sizes = check_model(path, entries)
        check_settings(config, path, entries, saved)
        quant = next((entry.quant for entry in entries.values() if isinstance(entry, Packed)), "none")
        head = isinstance(entries["head.weight"], Packed)
        size = sum(entry.nbytes for entry in entries.values())
        return Outline(prepared(kind, sizes, entries, config, saved), size, quant, head)

    def as_kept(self, config: TrainConfig) -> TrainConfig:
        """The settings, where the file is quantised already with that."""
        if self.quant == "none":
            return config
        return replace(config, quant=self.quant, quant_head=self.quant_head or config.quant_head)  # type: ignore[arg-type]

    def _activations(self, tokens: int, bytes_each: int, fused: bool, dense_head: bool, offloads: bool) -> Activations:
        return Activations.of(self.model, tokens, bytes_each, fused, dense_head, offloads)

    def sum(self, of: Sequence[tuple[Count, float]]) -> float:
        """The sum of a number for each sort of parameter, times how many there are."""
        return sum(self.counts[count] * number for count, number in of)


def plan(config: TrainConfig, outline: Outline, card: Card, on_gpu: bool = True) -> Plan:
    """What a run by these settings, which are `resolved`, needs on this card, or on a CPU."""
    config = outline.as_kept(config)
    each = 2 if config.precision == "bf16" or (config.precision == "auto" and on_gpu) else 4
    trained = [(c, trained_bytes(c, config.master_weights)) for c in outline.counts if c.trains]
    averages = [(c, optimiser_bytes(c, config.optim)) for c, _ in trained]
    parts, in_ram = frozen_parts(config, outline, each, on_gpu)
    parts["trained"], gradients, optimiser = outline.sum(trained), outline.sum(trained), outline.sum(averages)
    if config.optim.startswith("paged-"):
        in_ram, optimiser = in_ram + optimiser, 0.0
    parts["workspace"] = workspace(config, outline, each, on_gpu)

    assert config.micro_batch is not None
    tokens, dense_head = config.micro_batch * config.ctx_len, not (config.quant_head and config.quant != "none")
    offloads = config.offload_checkpoints and on_gpu
    activations = outline.activations(tokens, each, on_gpu, dense_head, offloads)
    context = CONTEXT if on_gpu else 0.0
    modes = modes_of(config, outline, activations, card, on_gpu, sum(parts.values()), gradients + optimiser)
    kept, in_ram = activations.kept(modes), in_ram + activations.in_ram(modes)
    if is_fresh(config):
        # they are made as what was kept is freed; but the loss makes the head's before
        early = outline.sum([(c, size) for c, size in trained if c.sort == "head"])
        gradients = early + max(0.0, gradients - early - kept)
    parts |= {"gradients": gradients, "optimiser": optimiser, "activations": kept}
    parts["loss or layer"] = activations.at_once(modes)

    count = sum(c.numel * n for c, n in outline.counts.items() if c.trains)
    ram = PROCESS[on_gpu] + in_ram + (0.0 if on_gpu else sum(parts.values()))
    # one tensor while it is cast; at the end what is written lies here too
    peak = max(ram, PROCESS[on_gpu] + in_ram + 4 * max(c.numel for c in outline.counts)) + written(config, outline)
    is_dense = config.quant == "none"
    run = measured(card, outline.sizes, outline.model.wkv, config.peft, tokens) if is_dense else None
    disk = written(config, outline) * (2 if config.evaluates else 1)
    length = None if config.max_steps is None else tokens * config.grad_accum * config.max_steps
    return Plan(parts, context, ram, peak, disk, modes, count, card, on_gpu, length, run, notes_of(config, on_gpu))


def frozen_parts(config: TrainConfig, outline: Outline, each: int, on_gpu: bool) -> tuple[dict[str, float], float]:
    """Bytes of what does not train, by part; and those of the embedding if it lies in the CPU's memory beside a GPU."""
    parts = {"weights": 0.0, "quantised": 0.0, "embedding": 0.0}
    in_ram = 0.0
    for c, n in outline.counts.items():
        if c.trains:
            continue
        if config.quant != "none" and (c.sort == "matrix" or (c.sort == "head" and config.quant_head)):
            parts["quantised"] += n * QUANTS[config.quant].bytes_of(c.rows, c.numel // c.rows)
        elif c.sort != "embedding":
            parts["weights"] += n * c.numel * (4 if c.sort in ("adapter", "state") else each)
        elif on_gpu and config.embedding in ("auto", "cpu"):
            in_ram += n * c.numel * each
        else:
            parts["embedding"] += n * c.numel * each
    return parts, in_ram


def workspace(config: TrainConfig, outline: Outline, each: int, on_gpu: bool) -> float:
    """Bytes of the libraries' own, and of the largest quantised matrix in the activations' dtype; fp8 turns it over."""
    largest_matrix = 0 if config.quant == "none" else largest(outline.counts, "matrix")
    return (CUBLAS if on_gpu else 0.0) + (1 if config.quant == "fp8" else each) * largest_matrix


def modes_of(
    config: TrainConfig, outline: Outline, found: Activations, card: Card, on_gpu: bool, there: float, later: float
) -> tuple[str, ...]:
    """What each layer computes anew; `there` are bytes of model and workspace, `later` of gradients and averages."""
    mode = config.grad_checkpoint
    if mode == "auto" and on_gpu and card.free is not None:
        context = 0.0 if card.has_context else CONTEXT
        return found.choose(outline.model.wkv, SPARE * (card.free - context - there) - later)
    return ("none" if mode == "auto" else mode,) * outline.sizes.layers


def is_fresh(config: TrainConfig) -> bool:
    """Whether a step's gradients are made anew while the activations go, instead of being added to.

    Where rows differ from step to step there are several CUDA graphs, which leave theirs in one place that stays.
    """
    return config.grad_accum == 1 and (config.sampling == "get" or not config.graphs)


def written(config: TrainConfig, outline: Outline) -> float:
    """Bytes of the adapter folder, or of the whole model."""
    if config.peft == "full":
        return outline.file_bytes or 2.0 * sum(c.numel * n for c, n in outline.counts.items())
    twice = 2 if config.peft == "pissa" else 1  # it is written as a LoRA of twice the rank
    return sum(4.0 * c.numel * n * (twice if c.sort == "adapter" else 1) for c, n in outline.counts.items() if c.trains)


def notes_of(config: TrainConfig, on_gpu: bool) -> tuple[str, ...]:
    """What the plan does not know."""
    notes = []
    if is_foreign(config):
        notes.append(f"--peft {config.peft}: what PEFT itself adds is not counted")
    if not on_gpu:
        notes.append("on a CPU the activations are a rough guess")
    if on_gpu and config.op in ("torch", "reference", "fla"):
        notes.append(f"--op {config.op}: its activations are more than is counted")
    return tuple(notes)


def ram_warning(planned: Plan) -> str | None:
    """A line if the CPU's memory is too small as far as the system tells, else None."""
    free = free_ram()
    if free is None or planned.ram_peak <= free:
        return None
    return f"needs about {gib(planned.ram_peak)} of RAM, {gib(free)} are free: it may become slow, or be ended"


def gib(size: float) -> str:
    """Bytes for people."""
    if size < GIB / 10:
        return f"{size / 2**20:.0f} MiB"
    return f"{size / GIB:.{1 if size >= 10 * GIB else 2}f} GiB"
