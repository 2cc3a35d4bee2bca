"""AdamW's step in little memory: averages in 8 bits, and parameters in bf16 that are rounded at random.

These formulas define it, on any device; `triton/adam.py` is the same for all tensors of a model in few launches.
Axes: n values of a parameter, in blocks of 256, the last perhaps shorter.

Sources: AdamW arXiv 1711.05101; averages in 8 bits 2110.02861; stochastic rounding 2010.06192.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .quant.blocks import dynamic_map

BLOCK = 256  # values that share a scale
SMALL = 4096  # tensors of fewer values keep their averages in float32
TINY = torch.finfo(torch.float32).tiny
WORD = 0xFFFFFFFF  # 32 bits
Number = TypeVar("Number", int, Tensor)
Averages = dict[str, Tensor]  # m and v, like the parameter; in 8 bits also the scales of their blocks, m_max and v_max


class Rates(NamedTuple):
    """What a step is for every value alike, with all that does not depend on the value reckoned already."""

    keep: float
    """What weight decay leaves of a parameter."""
    size: float
    """The learning rate over the first average's correction for its start at 0."""
    root: float
    """The root of the second average's correction."""
    new_m: float
    """Share of the gradient in its new average."""
    new_v: float
    """Likewise of its square."""
    eps: float
    key: int
    """What the random numbers of this step are made from; 31 bits."""

    @staticmethod
    def of(lr: float, weight_decay: float, betas: tuple[float, float], eps: float, step: int, seed: int) -> Rates:
        """Of step number `step`, from 1."""
        correct_m, correct_v = (1 - beta**step for beta in betas)
        new_m, new_v = (1 - beta for beta in betas)
        key = mixed((seed + step * 0x9E3779B9) & WORD) >> 1  # as if drawn anew for every step
        return Rates(1 - lr * weight_decay, lr / correct_m, math.sqrt(correct_v), new_m, new_v, eps, key)


def averages_of(p: Tensor, bits: int, paged: bool) -> Averages:
    """Zeros for a parameter, on its device; of one that is not small in 8 bits, and if `paged` in the CPU's memory."""
    is_small = p.numel() < SMALL
    kind = torch.uint8 if bits == 8 and not is_small else torch.float32
    device = "cpu" if paged and not is_small else p.device
    averages = {
        name: torch.zeros(p.shape, dtype=kind, device=device, pin_memory=paged and not is_small) for name in "mv"
    }
    if kind == torch.uint8:
        scales = torch.zeros(-(-p.numel() // BLOCK), dtype=torch.float32, device=p.device)
        averages |= {"m_max": scales, "v_max": scales.clone()}
    return averages


def adamw(p: Tensor, g: Tensor, averages: Averages, rates: Rates, maps: Tensor, first: int) -> None:
    """Change a parameter p (float32 or bf16) and its averages in place by its gradient g.

    `maps` as `quantisers` makes them. `first` is the number of p's first value among those of all parameters: no two
    values are rounded by one random number.
    """
    x, g = p.float().flatten(), g.float().flatten()
    m, v = averages["m"].flatten(), averages["v"].flatten()
    is_short = m.dtype == torch.uint8
    if is_short:
        m = dequantised(m, averages["m_max"], maps[0])
        v = dequantised(v, averages["v_max"], maps[2])
    m = m.lerp(g, rates.new_m)
    v = v.lerp(g * g, rates.new_v)
    x = x * rates.keep - rates.size * (m / (v.sqrt() / rates.root + rates.eps))
    if p.dtype == torch.bfloat16:
        x = rounded(x, first, rates.key)
    if is_short:
        m, averages["m_max"][:] = quantised(m, maps[1])
        v, averages["v_max"][:] = quantised(v, maps[3])
    for kept, new in (p, x), (averages["m"], m), (averages["v"], v):
        kept.copy_(new.view(kept.shape))


def quantisers(device: torch.device) -> Tensor:
    """(4,256) float32: the signed map and its bounds, the unsigned one and its bounds.

    A value has the index of the nearest number of the map: the count of bounds below it. But nothing above 0 is taken
    for 0 by the unsigned map: the root of the second average is divided by.
    """
    rows = []
    for signed in (True, False):
        numbers = dynamic_map(signed)
        bounds = (numbers[:-1] + numbers[1:]) / 2
        if not signed:
            bounds[0] = 0
        rows += [numbers, F.pad(bounds, (0, 1), value=math.inf)]
    return torch.stack(rows).to(device)


def quantised(x: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """x (n) in 8 bits, (n) uint8, and the largest value of each block, float32."""
    blocks = F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    scaled = blocks / largest.clamp(min=TINY)[:, None]
    return torch.bucketize(scaled, bounds).flatten()[: len(x)].to(torch.uint8), largest


def dequantised(x: Tensor, largest: Tensor, numbers: Tensor) -> Tensor:
    """What `quantised` made 8 bits of, as (n) float32."""
    return numbers[x.int()] * largest.repeat_interleave(BLOCK)[: len(x)]


def rounded(x: Tensor, first: int, key: int) -> Tensor:
    """x (n) float32, each value rounded to one of its two neighbours in bf16, to the nearer one more often.

    Its mean is x. A bf16 is the upper half of a float32, so a random number below 2**16 is added, and the lower half
    dropped. The random numbers are functions of the place and the key alone.
    """
    places = torch.arange(first, first + len(x), device=x.device) & WORD
    draws = mixed(places ^ key) >> 16
    return ((x.view(torch.int32) + draws.int()) & -0x10000).view(torch.float32)


def mixed(x: Number) -> Number:
    """Numbers of 32 bits (a tensor's are int64) scattered as if at random, no two to the same.

    It is how MurmurHash3 ends.
    """
    x = (x ^ (x >> 16)) * 0x85EBCA6B & WORD
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & WORD
    return x ^ (x >> 16)
