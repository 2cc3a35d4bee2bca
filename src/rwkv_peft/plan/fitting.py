"""Settings with which a run fits: what to change first, and what last.

Every lever has a cost in percent of speed, roughly; where it costs accuracy instead, in what we would give for that.
All combinations are planned, and the cheapest that fit are proposed. Why this order: an embedding in the CPU's memory
and averages in 8 bits cost next to nothing; half a micro-batch costs little while it has some thousand tokens, and much
below (docs/performance.md: 1.5B takes 45,699 tokens/s with 16,384, 29,566 with 1,024); recomputing costs a third of a
step at most, and where what it starts from lies in the CPU's memory, copies beside it cost little more; fp8 costs no
speed but exactness, int8 and 4 bits take time to unpack; paging waits for the bus.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from statistics import fmean
from typing import Any

from ..adapters import SavedAdapter
from ..config import TrainConfig, flag_of
from ..errors import ConfigError
from .cards import Card
from .memory import Outline, Plan, gib, plan
from .weights import prepared

RECOMPUTING = {"none": 0.0, "operator": 4.0, "selective": 12.0, "block": 30.0}
QUANT = {"fp8": 6.0, "int8": 12.0, "nf4": 15.0}
SMALLER = {"none": ("fp8", "int8", "nf4"), "fp8": ("nf4",), "int8": ("nf4",)}  # forms that take less
HEAD, EIGHT_BIT, PAGED, HALF_MASTERS, EMBEDDING, OFFLOADING = 4.0, 2.0, 10.0, 5.0, 0.5, 1.0
FULL_ENOUGH = 4096  # tokens of a micro-batch that keep a card busy
HALVING = {True: 4.0, False: 15.0}  # whether the half is still full enough
MOST_HALVINGS = 4
MOST_PROPOSALS = 4

Changes = dict[str, Any]


@dataclass(frozen=True)
class Proposal:
    """Changes of settings with which the run fits."""

    changes: Changes
    cost: float
    planned: Plan

    @cached_property
    def flags(self) -> str:
        """As they are typed."""
        return " ".join(
            flag_of(name) if value is True else f"{flag_of(name)} {value}" for name, value in self.changes.items()
        )


def proposals(config: TrainConfig, outline: Outline, card: Card) -> list[Proposal]:
    """The cheapest ways to fit on the card, best first; none adds to a better one. Empty if there is none."""
    tried = every(config, outline, card)
    fitting = sorted((p for p in tried if p.planned.fits()), key=lambda p: (p.cost, len(p.changes), p.planned.process))
    best: list[Proposal] = []
    for one in fitting:
        if not any(other.changes.items() <= one.changes.items() for other in best):
            best.append(one)
        if len(best) == MOST_PROPOSALS:
            break
    return best


def least(config: TrainConfig, outline: Outline, card: Card) -> Proposal:
    """The way that needs the least."""
    return min(every(config, outline, card), key=lambda p: p.planned.needs)


def every(config: TrainConfig, outline: Outline, card: Card) -> Iterator[Proposal]:
    """Every combination of levers, with its plan."""
    for chosen in product(*levers(config, outline, card)):
        changes = {name: value for change, _ in chosen for name, value in change.items()}
        changed = replace(config, **changes)
        if not allowed(changed):
            continue
        planned = plan(changed, outline, card)
        cost = sum(cost for _, cost in chosen) + fmean(RECOMPUTING[mode] for mode in planned.modes)
        yield Proposal(changes, cost, planned)


def allowed(config: TrainConfig) -> bool:
    """Whether the settings can go together."""
    try:
        config.check_base()
        config.check_master_weights()
    except ConfigError:
        return False
    return True


def levers(config: TrainConfig, outline: Outline, card: Card) -> list[list[tuple[Changes, float]]]:
    """For each setting that could be changed: the ways to leave it or to change it, each with its cost."""
    keep: tuple[Changes, float] = ({}, 0.0)
    frozen = {c.sort for c in outline.counts if not c.trains}
    ways: list[list[tuple[Changes, float]]] = [[keep, *halvings(config)]]
    if config.grad_checkpoint not in ("auto", "block"):
        ways.append([keep, ({"grad_checkpoint": "auto"}, 0.0)])
    if not config.offload_checkpoints:
        ways.append([keep, ({"offload_checkpoints": True}, OFFLOADING)])
    if "embedding" in frozen and config.embedding == "gpu":
        ways.append([keep, ({"embedding": "cpu"}, EMBEDDING)])
    if "matrix" in frozen and outline.quant == "none":
        forms = [q for q in SMALLER.get(config.quant, ()) if q != "fp8" or card.fp8]
        ways.append([keep, *(({"quant": form}, QUANT[form]) for form in forms)])
        if "head" in frozen and not config.quant_head:
            ways.append([keep, ({"quant_head": True}, HEAD)])
    if config.optim == "adamw":
        paged = ({"optim": "paged-adamw8bit"}, EIGHT_BIT + PAGED)
        ways.append([keep, ({"optim": "adamw8bit"}, EIGHT_BIT), paged])
    if config.master_weights == "fp32":
        ways.append([keep, ({"master_weights": "bf16"}, HALF_MASTERS)])
    return ways


def halvings(config: TrainConfig) -> list[tuple[Changes, float]]:
    """Smaller micro-batches of which more are added up, so that a step has the same rows."""
    assert config.micro_batch is not None
    rows, accum, cost = config.micro_batch, config.grad_accum, 0.0
    found: list[tuple[Changes, float]] = []
    while rows % 2 == 0 and len(found) < MOST_HALVINGS:
        rows, accum = rows // 2, accum * 2
        cost += HALVING[rows * config.ctx_len >= FULL_ENOUGH]
        found.append(({"micro_batch": rows, "grad_accum": accum}, cost))
    return found


def beyond_settings(config: TrainConfig, outline: Outline, card: Card, saved: SavedAdapter | None = None) -> str:
    """What makes a run fit that no setting above does: shorter rows, a smaller rank, else a smaller model."""
    for name, lowest in (("ctx_len", 128), ("rank", 4)):
        number = getattr(config, name)
        while number // 2 >= lowest and not (name == "rank" and (saved or config.peft in ("state", "full"))):
            number //= 2
            changed = replace(config, **{name: number})
            try:
                smaller = outline if name == "ctx_len" else again(outline, changed)
            except ConfigError:  # bat takes no such rank
                break
            one = least(changed, smaller, card)
            if one.planned.fits():
                return f"{flag_of(name)} {number} {one.flags}".rstrip()
    return "a smaller model"


def again(outline: Outline, config: TrainConfig) -> Outline:
    """The same model with other adapters."""
    model = outline.model
    names = [name for name, _ in model.named_parameters()]
    other = prepared(type(model), model.sizes, names, config)
    return Outline(other, outline.file_bytes, outline.quant, outline.quant_head)


def advice(config: TrainConfig, outline: Outline, card: Card, saved: SavedAdapter | None = None) -> str:
    """The flags to try, for a message of one line."""
    found = proposals(config, outline, card)
    if found:
        return f"try {found[0].flags}" if found[0].changes else "try it again, with nothing else on the device"
    one = least(config, outline, card)
    return f"at least {gib(one.planned.needs)} are needed; try {beyond_settings(config, outline, card, saved)}"
