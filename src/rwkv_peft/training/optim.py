"""The optimiser: which parameters learn at which rate, which ones decay, and by which rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..errors import ConfigError
from ..models import STATES
from ..models.base import ChannelMix, TimeMix
from ..packages import optional
from .schedule import learning_rate, weight_decay

DECAYS = ("att.w0", "att.time_decay")  # and of the decays: RWKV-7; RWKV-5 and 6
BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged-adamw": "PagedAdamW", "paged-adamw8bit": "PagedAdamW8bit"}
# Of Adafactor. The first, squared, is the floor of the second moment; torch's own, 1e-7, is above many gradients. The
# second is the size that small tensors are taken to have: with 1, --lr means what it means to AdamW.
ADAFACTOR_EPS = (1e-16, 1.0)

Group = dict[str, Any]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that `config.optim` names, over everything that trains, in the groups of `parameter_groups`.

    Raises ConfigError if its package is missing, or it cannot run with this torch, on this device, on these parameters.
    """
    groups = parameter_groups(model, config)
    device = groups[0]["params"][0].device
    adam: dict[str, Any] = {"betas": config.betas, "eps": config.adam_eps}
    if config.optim == "adamw":
        return torch.optim.AdamW(groups, fused=True, **adam)
    if config.optim == "adafactor":
        return torch.optim.Adafactor(groups, eps=ADAFACTOR_EPS)
    if config.optim == "muon":
        return MuonAdamW(groups, **adam)
    optimizer: torch.optim.Optimizer = from_bitsandbytes(config.optim, device)(groups, **adam)
    return optimizer


def check_optimizer(optim: str, device: torch.device) -> None:
    """Raise ConfigError if this optimiser's package is missing, or if it cannot run on `device`."""
    if optim in BITSANDBYTES:
        from_bitsandbytes(optim, device)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[Group]:
    """What trains, in groups of the same `lr_scale`, `decays` and `muon`.

    `lr_scale` is the group's learning rate divided by the plain one. `decays`: whether weight decay is for it, as it is
    for matrices. `muon`: whether Muon takes it, which takes matrices but not embeddings and the head. The low-rank
    matrices that a mix holds itself (RWKV-7's `w1`) count as vectors, as in the original (BlinkDL/RWKV-LM).
    """
    vectors = {p for m in model.modules() if isinstance(m, TimeMix | ChannelMix) for p in m.parameters(recurse=False)}
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[tuple[float, bool, bool], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p not in vectors and p.ndim >= 2 and min(p.shape[-2:]) > 1
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


def from_bitsandbytes(optim: str, device: torch.device) -> Any:
    """A class of the package bitsandbytes. Raises ConfigError if it is not there, or cannot run on this device."""
    if optim not in BITSANDBYTES:
        allowed = ("adamw", *BITSANDBYTES, "adafactor", "muon")
        raise ConfigError(f"--optim {optim}: unknown; allowed are {' '.join(allowed)}")
    plain = optim.removeprefix("paged-")
    if plain != optim and device.type != "cuda":
        raise ConfigError(f"--optim {optim}: needs a GPU, and the model is on {device.type}; use --optim {plain}")
    kind = getattr(optional("bitsandbytes.optim", f"--optim {optim}"), BITSANDBYTES[optim])
    return kind if plain == optim else paged(kind)


def paged(kind: Any) -> Any:
    """A class of bitsandbytes that pages its state after `load_state_dict` too, where its own leaves it on the GPU."""

    class Paged(kind):  # type: ignore[misc]
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict, move_to_device=False)
            for p, state in self.state.items():
                for name in ("state1", "state2"):
                    state[name] = self.get_state_buffer(p, state[name].dtype).copy_(state[name])
                for name in state.keys() & {"qmap1", "qmap2", "absmax1", "absmax2"}:
                    state[name] = state[name].to(p.device)

    return Paged


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
