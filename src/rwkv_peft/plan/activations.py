"""What a model's layers keep for the backward pass, and how much of it is to be computed anew.

The one table of it, for the plan and for the run. It is of the fused kernels of a GPU, and was read from what their
autograd functions save; a test counts the tensors that autograd really keeps. A layer is two halves, time-mix and
channel-mix. Unit: numbers a token and channel, so 1 is a tensor (B,T,D). Axes: D width, F inner width, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import nn

from ..adapters.disha import BatLinear, BoneLinear
from ..adapters.lora import LoraLinear, PissaLinear
from ..models import Rwkv
from ..models.base import Block
from ..ops.loss import MOST_LOGITS, MOST_WEIGHTS

MODES = ("block", "selective", "operator", "none")  # from the least memory to the most
LOSS_UNITS = 5.0  # embedding, its norm, the last norm, what the head sees, and its gradient


class Version(NamedTuple):
    """Of a recurrence: what a layer keeps, whatever trains."""

    time: float
    """x, what the operator reads, gate; and for RWKV-6 the mixes that depend on the token."""
    operator: float
    """Of the time-mix besides, what `operator` computes anew: y and tiles of RWKV-7, the states of 5 and 6."""
    channel: float
    """Without the F inner ones."""
    mixes: float
    """Inputs of the layer's own low-rank matrices, where these train."""
    back_time: float
    """What is there besides while the time-mix is computed backward."""
    back_channel: float
    """Without 2 F, the gradients before and behind the squared ReLU."""


VERSIONS = {
    # x; r k v w_low a_low v_low gate | y, inverse, transfer, reader, states | x after the time-mix | xw xa xg
    7: Version(time=8, operator=5, channel=1, mixes=3, back_time=12.5, back_channel=2),
    # x, n, more 5, w in float32 2, r k v, y, gate | states | x, r, v | xx, xw
    6: Version(time=14, operator=1, channel=3, mixes=2, back_time=16, back_channel=3),
    # x, r k v, y, gate | states | x, r, v
    5: Version(time=6, operator=1, channel=3, mixes=0, back_time=10, back_channel=3),
}
INPUTS = {"selective": 1, "block": 2}  # tensors (B,T,D) that are kept of what is computed anew
IN_FLIGHT = 4  # such tensors on the GPU at once, if they lie in the CPU's memory: in use, and on their way back
# The formulas of a CPU, `--op torch`, keep so many times as much: RWKV-7 1.7, RWKV-6 1.3, RWKV-5 1.4
PLAIN = 1.6
# and have so many units more at once in a layer; measured by what a process takes: 72 to 190
PLAIN_AT_ONCE = 150


@dataclass(frozen=True)
class Layer:
    """Bytes that a layer keeps of a micro-batch."""

    unit: float
    """Of a tensor (B,T,D)."""
    time: float
    operator: float
    """Of `time`, what the mode `operator` does not keep."""
    channel: float
    back_time: float
    back_channel: float
    offloads: bool = False
    """Whether the inputs of what is computed anew lie in the CPU's memory."""

    def kept(self, mode: str) -> float:
        """For the backward pass."""
        inputs = 0.0 if self.offloads else INPUTS.get(mode, 0) * self.unit
        return {
            "none": self.time + self.channel,
            "operator": self.time - self.operator + self.channel,
            "selective": inputs + self.channel,
            "block": inputs,
        }[mode]

    def passing(self, mode: str) -> float:
        """What is there besides while this layer, the last, is computed backward: the larger of its halves."""
        again_time = {"none": 0.0, "operator": self.operator, "selective": self.time, "block": self.time}[mode]
        again_channel = self.channel if mode == "block" else 0.0
        freed = 0.0 if mode == "block" else self.channel
        return max(again_channel + self.back_channel, again_time + self.back_time - freed)


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch."""

    layers: tuple[Layer, ...]
    loss: float
    """What the loss needs at once, before any layer is computed backward."""
    around: float
    """What is kept before the first layer and behind the last."""
    formulas: float = 0.0
    """What plain PyTorch has at once besides."""

    @staticmethod
    def of(
        model: Rwkv,
        tokens: int,
        bytes_each: int,
        fused: bool = True,
        dense_head: bool = True,
        offloads: bool = False,
    ) -> Activations:
        """Of a model, with or without values, whose adapters are in place and in which trains what is to train.

        `bytes_each` of a number; `fused`: whether our kernels run; `dense_head`: whether the loss knows its matrix;
        `offloads`: whether the inputs of what is computed anew lie in the CPU's memory.
        """
        s = model.sizes
        layers = tuple(layer_of(block, model, tokens, bytes_each, fused, offloads) for block in model.layers())
        logits = float(min(tokens * s.vocab_size, max(MOST_LOGITS, s.vocab_size)) * bytes_each)
        if not dense_head:  # a part of it is dense at a time, and the gradient behind it is summed in float32
            chunk = min(tokens, max(1, MOST_LOGITS // s.vocab_size))
            logits += min(MOST_WEIGHTS, s.vocab_size * s.width) * bytes_each + 4 * chunk * s.width
        elif model.head.weight.requires_grad:
            logits += s.vocab_size * s.width * bytes_each  # the head in the activations' dtype
        unit = float(tokens * s.width * bytes_each)
        around = (LOSS_UNITS + (model.wkv == 7)) * unit
        return Activations(layers, logits, around, 0.0 if fused else PLAIN_AT_ONCE * unit)

    def kept(self, modes: tuple[str, ...]) -> float:
        """By all layers, for the backward pass."""
        return self.around + sum(layer.kept(mode) for layer, mode in zip(self.layers, modes, strict=True))

    def at_once(self, modes: tuple[str, ...]) -> float:
        """What is there besides at most: the loss's logits, or one layer that is computed backward."""
        passing = (layer.passing(mode) for layer, mode in zip(self.layers, modes, strict=True))
        return max(self.loss, *passing) + self.in_flight(modes) + self.formulas

    def in_flight(self, modes: Sequence[str]) -> float:
        """What is on the GPU at once of inputs that lie in the CPU's memory."""
        first = self.layers[0]
        return IN_FLIGHT * first.unit if first.offloads and any(mode in INPUTS for mode in modes) else 0.0

    def in_ram(self, modes: Sequence[str]) -> float:
        """Bytes of pinned memory for these; the first layer's input is one thing before its norm, and one after."""
        first = self.layers[0]
        count = sum(INPUTS.get(mode, 0) for mode in modes) + (modes[0] == "block")
        if not first.offloads or not count:
            return 0.0
        block = pinned_block(int(first.unit))
        return float(math.ceil(count / (block // int(first.unit))) * block)

    def choose(self, wkv: int, room: float) -> tuple[str, ...]:
        """For each layer the least to compute anew with which `kept` and `at_once` are at most `room` bytes.

        A layer's channel-mix is worth keeping before its time-mix: it saves more time a byte. Only RWKV-7's operator
        keeps much.
        """
        modes = ["block"] * len(self.layers)
        best = tuple(modes)
        kept, passing = self.kept(best), [layer.passing("block") for layer in self.layers]
        for before, mode in pairwise(mode for mode in MODES if mode != "operator" or wkv == 7):
            for i, layer in enumerate(self.layers):
                kept += layer.kept(mode) - layer.kept(before)
                passing[i] = layer.passing(mode)
                modes[i] = mode
                if kept + max(self.loss, *passing) + self.in_flight(modes) <= room:
                    best = tuple(modes)
        return best


def pinned_block(size: int) -> int:
    """Bytes of a piece of pinned memory for at least eight tensors of `size` bytes.

    Torch takes pinned memory in powers of two: for many tensors at once little of it is left unused.
    """
    return 1 << (8 * size - 1).bit_length()


def layer_of(block: Block, model: Rwkv, tokens: int, bytes_each: int, fused: bool, offloads: bool = False) -> Layer:
    """What one layer keeps, by what trains in it."""
    s, version = model.sizes, VERSIONS[model.wkv]
    F = s.ffn / s.width
    time = version.time + version.operator + _ranks(block.att) / s.width
    if any(p.requires_grad for name, p in block.att.named_parameters(recurse=False) if p.ndim > 1 and _is_low(name)):
        time += version.mixes
    time += sum(_adapted(module, False) for module in block.att.children()) / s.width
    channel = version.channel + F + _deep_embedding(block, model) / s.width
    channel += sum(_adapted(m, name == "value") for name, m in block.ffn.named_children()) / s.width
    unit, more = float(tokens * s.width * bytes_each), 1.0 if fused else PLAIN
    return Layer(
        unit=unit,
        time=more * time * unit + _copies(block.att, bytes_each),
        operator=more * version.operator * unit,
        channel=more * channel * unit + _copies(block.ffn, bytes_each),
        back_time=more * version.back_time * unit,
        back_channel=more * (version.back_channel + 2 * F) * unit,
        offloads=offloads,
    )


def _adapted(module: nn.Module, is_kept: bool) -> float:
    """Numbers a token that a matrix keeps; `is_kept`: its input is kept in any case."""
    if not hasattr(module, "in_features"):
        return 0.0
    inputs = 0.0 if is_kept else float(module.in_features)  # type: ignore[arg-type]
    match module:
        case LoraLinear():
            inner = module.config.rank * (2 if isinstance(module, PissaLinear) else 1)
            product = module.out_features if module.config.dora else 0
            masks = 1.5 * module.in_features if module.config.dropout else 0.0
            return inputs + inner + product + masks
        case BatLinear():
            return inputs
        case BoneLinear():
            return float(module.config.rank)
        case _:
            return inputs if any(p.requires_grad for p in module.parameters()) else 0.0


def _is_low(name: str) -> bool:
    """Whether a time-mix's own parameter is the first of a pair of low-rank matrices."""
    return name.endswith("1")


def _ranks(att: nn.Module) -> float:
    """Numbers a token that low-rank functions keep in between; those of a bare product only where it trains."""
    own = dict(att.named_parameters(recurse=False))
    has_function = {"w1", "g1", "time_maa_w1", "time_decay_w1"}
    return float(
        sum(p.shape[1] for name, p in own.items() if _is_low(name) and (name in has_function or p.requires_grad))
    )


def _deep_embedding(block: Block, model: Rwkv) -> float:
    """RWKV-7a: the scale (F), the scaled input of `value` (F), and the token's small matrix (R,R)."""
    s1 = getattr(block.ffn, "s1", None)
    if s1 is None:
        return 0.0
    return float(2 * model.sizes.ffn + s1.shape[1] ** 2 + 2 * s1.shape[1])


def _copies(half: nn.Module, bytes_each: int) -> float:
    """Bytes of what trains as the products take it, which is kept until they are computed backward."""
    if bytes_each == 4:
        return 0.0
    twice = {id(p) for m in half.modules() if isinstance(m, PissaLinear) for p in m.trained().values()}
    trained = (p for p in half.parameters() if p.requires_grad and p.ndim >= 2)
    return float(sum(p.numel() * bytes_each * (2 if id(p) in twice else 1) for p in trained))
