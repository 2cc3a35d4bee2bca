"""How many parameters there are, of which sort, and how many bytes each takes: itself, its gradient, its averages.

All counts are of a model on the meta device, whose adapters and learned states are where training puts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..adapters import SavedAdapter, attach_saved
from ..adapters.attach import ADAPTERS, find_targets, wrap
from ..adapters.trainable import add_parts, freeze, make_trainable, part_names
from ..config import FOREIGN, TrainConfig
from ..loading import without_values
from ..models import STATES, Rwkv, Sizes
from ..ops.adam import SMALL

MATRICES = ("matrix", "head", "embedding", "adapter")  # sorts that can be kept in bf16 while they train


class Count(NamedTuple):
    """Parameters of one sort in one tensor."""

    numel: int
    rows: int
    """Of a matrix; 0 of anything else."""
    sort: str
    """matrix (of att or ffn), head, embedding, adapter, state, or other."""
    trains: bool


def prepared(
    kind: type[Rwkv], sizes: Sizes, names: Iterable[str], config: TrainConfig, saved: SavedAdapter | None = None
) -> Rwkv:
    """The model without values in which trains what `config` lets train; `names` are those of the file's tensors.

    `saved` is the adapter to go on with. PEFT's own methods are left out. Raises ConfigError as attaching does.
    """
    model = without_values(kind, sizes, names)
    model.like = torch.empty(0, device="meta")
    parts = config.parts()
    if config.peft == "full":
        add_parts(model, parts)
        make_trainable(model, [name for name, _ in model.named_parameters()])
        return model
    freeze(model)
    if saved is not None and saved.config is not None and saved.config.peft.startswith(FOREIGN):
        pass  # PEFT would need values
    elif saved is not None and config.adapter is not None:
        attach_saved(model, saved, config.adapter)
    elif config.peft in ADAPTERS:
        adapter = config.adapter_config()
        wrap(model, adapter, find_targets(model, adapter.targets))
    if config.peft == "state":
        parts = ("state", *parts)
    add_parts(model, parts)
    make_trainable(model, [name for part in parts for name in part_names(model, part)])
    return model


def counts(model: Rwkv) -> list[Count]:
    """Every parameter of a prepared model, and what adapters hold beside."""
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if name.split(".")[-2:-1] in (["att"], ["ffn"]) and hasattr(module, "in_features")
    }
    own = {name for name, _ in model.named_parameters() if name.count(".") > 4 or name.endswith("_block")}
    own |= {name for name, _ in model.named_parameters() if name.endswith("lora_magnitude_vector")}
    found = []
    for name, p in model.named_parameters():
        sort = (
            "matrix" if name in matrices else "adapter" if name in own else "state" if name.endswith(STATES) else
            {"head.weight": "head", "emb.weight": "embedding"}.get(name, "other")
        )  # fmt: skip
        found.append(Count(p.numel(), len(p) if p.ndim == 2 else 0, sort, p.requires_grad))
    frozen = (b for name, b in model.named_buffers() if name != "like")
    return found + [Count(b.numel(), len(b), "other", False) for b in frozen]


def is_foreign(config: TrainConfig) -> bool:
    """Whether the method is one of PEFT's, of which nobody but PEFT knows what it adds."""
    return config.peft.startswith(FOREIGN)


def trained_bytes(count: Count, master_weights: str) -> float:
    """Of a parameter that trains, and as many of its gradient."""
    is_large = count.sort in MATRICES and count.rows and count.numel > SMALL
    is_half = master_weights == "bf16" and is_large
    return count.numel * (2.0 if is_half else 4.0)


def optimiser_bytes(count: Count, optim: str) -> float:
    """Of the averages that an optimiser keeps of a parameter that trains."""
    match optim.removeprefix("paged-"):
        case "adamw8bit":
            return count.numel * (2 + 8 / 256 if count.numel >= SMALL else 8.0)
        case "adafactor":
            return 4.0 * (2 * count.rows if count.rows else count.numel)  # a row's and a column's mean; nearly nothing
        case "muon":
            return count.numel * (4.0 if count.rows and count.sort in ("matrix", "adapter") else 8.0)
        case _:
            return count.numel * 8.0


def learning_bytes(model: Rwkv, config: TrainConfig) -> float:
    """Of the gradients and the averages of a model in which trains what is to train; paged averages are elsewhere."""
    trained = [c for c in counts(model) if c.trains]
    averages = 0.0 if config.optim.startswith("paged-") else sum(optimiser_bytes(c, config.optim) for c in trained)
    return averages + sum(trained_bytes(c, config.master_weights) for c in trained)


def largest(found: Iterable[Count], sort: str) -> int:
    """Values of the largest frozen tensor of a sort."""
    return max((c.numel for c in found if c.sort == sort and not c.trains), default=0)
