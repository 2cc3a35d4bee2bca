"""The optimiser: which parameters learn at which rate, which ones decay, and by which rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..errors import ConfigError
from ..models import STATES
from ..models.base import ChannelMix, TimeMix
from ..ops.adam import SMALL
from ..packages import optional
from ..plan.contradictions import check_device
from .adamw import LeanAdamW
from .schedule import learning_rate, weight_decay

DECAYS = ("att.w0", "att.time_decay")  # and of the decays: RWKV-7; RWKV-5 and 6
# bits of each of AdamW's averages, and whether they are in the CPU's memory
ADAMW = {"adamw": (32, False), "adamw8bit": (8, False), "paged-adamw": (32, True), "paged-adamw8bit": (8, True)}
# Of Adafactor. The first, squared, is the floor of the second moment; torch's own, 1e-7, is above many gradients. The
# second is the size that small tensors are taken to have: with 1, --lr means what it means to AdamW.
ADAFACTOR_EPS = (1e-16, 1.0)

Group = dict[str, Any]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that `config.optim` names, over everything that trains, in the groups of `parameter_groups`.

    Raises ConfigError if it cannot run with this torch, on this device, on these parameters.
    """
    groups = parameter_groups(model, config)
    check_optimizer(config, groups[0]["params"][0].device)
    adam: dict[str, Any] = {"betas": config.betas, "eps": config.adam_eps}
    if config.optim == "adafactor":
        return torch.optim.Adafactor(groups, eps=ADAFACTOR_EPS)
    if config.optim == "muon":
        return MuonAdamW(groups, **adam)
    if is_lean(config):
        bits, paged = ADAMW[config.optim]
        return LeanAdamW(groups, **adam, bits=bits, paged=paged)
    return torch.optim.AdamW(groups, fused=True, **adam)


def is_lean(config: TrainConfig) -> bool:
    """Whether it takes our own AdamW."""
    return config.optim in ADAMW and (config.optim != "adamw" or config.master_weights == "bf16")


def check_optimizer(config: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError if the optimiser cannot run on `device`, or what trains there cannot be kept as asked."""
    optim = config.optim
    if optim not in (*ADAMW, "adafactor", "muon"):
        raise ConfigError(f"--optim {optim}: unknown; allowed are {' '.join((*ADAMW, 'adafactor', 'muon'))}")
    check_device(config, device.type == "cuda")
    if device.type == "cuda" and is_lean(config):
        optional("triton", f"--optim {optim}" if config.master_weights == "fp32" else "--master-weights bf16")


def keep_in_bf16(model: nn.Module) -> None:
    """Store matrices that train, and are not small, in bf16.

    Vectors, a mix's own low-rank matrices and learned states stay in float32: they are a few percent of the parameters,
    and rounding hurts them most.
    """
    vectors = vectors_of(model)
    for p in model.parameters():
        if p.requires_grad and p.numel() > SMALL and is_matrix(p, vectors):
            p.data = p.data.bfloat16()


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[Group]:
    """What trains, in groups of the same `lr_scale`, `decays` and `muon`.

    `lr_scale` is the group's learning rate divided by the plain one. `decays`: whether weight decay is for it, as it is
    for matrices. `muon`: whether Muon takes it, which takes matrices but not embeddings and the head. The low-rank
    matrices that a mix holds itself (RWKV-7's `w1`) count as vectors, as in the original (BlinkDL/RWKV-LM).
    """
    vectors = vectors_of(model)
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[tuple[float, bool, bool], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = is_matrix(p, vectors)
            muon = config.optim == "muon" and decays and p.ndim == 2 and p not in tables and name != "head.weight"
            found.setdefault((lr_scale(name, config), decays, muon), []).append(p)
    assert config.lr is not None
    return [
        {
            "params": params, "lr": config.lr * scale, "weight_decay": config.weight_decay if decays else 0.0,
            "lr_scale": scale, "decays": decays, "muon": muon,
        }
        for (scale, decays, muon), params in found.items()
    ]  # fmt: skip


def vectors_of(model: nn.Module) -> set[Tensor]:
    """The parameters that mixes hold themselves, whatever their shape."""
    return {p for m in model.modules() if isinstance(m, TimeMix | ChannelMix) for p in m.parameters(recurse=False)}


def is_matrix(p: Tensor, vectors: set[Tensor]) -> bool:
    """Whether a parameter is none of `vectors`, and has more than one row and column."""
    return p not in vectors and p.ndim >= 2 and min(p.shape[-2:]) > 1


def lr_scale(name: str, config: TrainConfig) -> float:
    """A parameter's learning rate, divided by the plain one; the original's, but for learned states."""
    if name.endswith(STATES):
        assert config.lr is not None and config.lr_state is not None
        return config.lr_state / config.lr
    return 2.0 if config.layerwise_lr and name.endswith(DECAYS) else 1.0


def set_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, total: int) -> float:
    """Give each group its learning rate and weight decay at step `step` (from 0) of `total`; returns the plain rate."""
    lr, decay = learning_rate(config, step, total), weight_decay(config, step, total)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = decay if group["decays"] else 0.0
    return lr


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the groups marked `muon`, AdamW on the others: one optimiser with one list of groups and one state.

    Muon (Jordan et al. 2024) steps along the nearest orthogonal matrix. Its steps are scaled to the size of AdamW's
    (arXiv 2502.16982), so that the same learning rate serves both. Raises ConfigError if torch has no Muon, or no group
    is marked.
    """

    def __init__(self, groups: list[Group], betas: tuple[float, float], eps: float) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(f"--optim muon: needs torch 2.9 or newer, this is {torch.__version__}; use --optim adamw")
        matrices, others = ([group for group in groups if group["muon"] is muon] for muon in (True, False))
        if not matrices:
            raise ConfigError("--optim muon: nothing that trains is a matrix; use --optim adamw")
        self.parts: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")]
        if others:
            self.parts.append(torch.optim.AdamW(others, betas=betas, eps=eps, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimiser's groups and state."""
        for part in self.parts:
            muon = isinstance(part, torch.optim.Muon)
            part.param_groups = [group for group in self.param_groups if group["muon"] is muon]
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the parameters."""
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
