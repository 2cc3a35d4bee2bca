"""int8, NF4 and FP4 in blocks of weights, to the bit as bitsandbytes stores them.

A block of consecutive weights is divided by its largest magnitude; each quotient becomes the index of the nearest of
256 or of 16 numbers. With 4 bits the magnitudes, less their mean, are stored likewise (double quantisation).
Sources: arXiv 2110.02861 (the 256 numbers), QLoRA arXiv 2305.14314 (NF4, double quantisation).
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import triton
from ..matrix import QuantizedLinear

EIGHT, FOUR = 256, 64  # weights in a block of 8 and of 4 bits; magnitudes are in blocks of 256 too
PART = 2**22  # weights that are quantised at a time, so that this takes little memory
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = tuple(sign * x / 12 for sign, x in product((1, -1), (0, 0.0625, 8, 12, 4, 6, 2, 3)))
MAPS = {"nf4": NF4, "fp4": FP4}
STATE = "weight.quant_state.bitsandbytes__"  # before the format's name: the numbers that are no tensor, as JSON


class BlockLinear(QuantizedLinear):
    """What the formats in blocks share."""

    weight: Tensor
    """uint8: (O,I), or two weights in a byte (O·I/2,1), the first in its high half."""
    absmax: Tensor
    """The largest magnitude of each block."""
    block: ClassVar[int]

    def numbers(self) -> Tensor:
        """(256,) or (16,): what an index stands for."""
        return quant_map(self.quant, self.weight.device)

    def magnitudes(self, blocks: slice = slice(None)) -> Tensor:
        """(blocks,) float32."""
        return self.absmax[blocks]

    def quotients(self, weights: slice) -> Tensor:
        """What the indices of consecutive weights stand for, float32."""
        return pick(self.numbers(), self.weight.view(-1)[weights])

    def dense(self, dtype: torch.dtype | None = None, rows: slice = slice(None)) -> Tensor:
        first, last, _ = rows.indices(self.out_features)
        out = torch.empty(last - first, self.in_features, dtype=dtype or self.dtype, device=self.weight.device)
        start = first * self.in_features
        if start % self.block:
            return self.dense(dtype)[rows]
        if self.weight.is_cuda and out.dtype != torch.float64 and triton.is_installed():
            self.fill_by_kernel(out, start)
        else:
            self.fill(out.view(-1), start)
        return out

    def fill(self, out: Tensor, start: int) -> None:
        """Fill `out` with the weights from `start` on, which is at the beginning of a block."""
        for part in parts(len(out)):
            weights = slice(start + part.start, start + part.stop)
            blocks = slice(weights.start // self.block, -(-weights.stop // self.block))
            values = _whole_blocks(self.quotients(weights), self.block)
            out[part] = (values * self.magnitudes(blocks)[:, None]).view(-1)[: part.stop - part.start]

    @abstractmethod
    def fill_by_kernel(self, out: Tensor, start: int) -> None:
        """The same on a GPU."""

    def settings(self) -> dict[str, Any]:
        """The numbers that are no tensor, as bitsandbytes calls them."""
        dtype = str(self.dtype).removeprefix("torch.")
        shape = [self.out_features, self.in_features]
        return {"quant_type": self.quant, "blocksize": self.block, "dtype": dtype, "shape": shape}

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        if settings["blocksize"] != cls.block:
            raise ValueError(f"blocksize {settings['blocksize']}, must be {cls.block}")
        numbers = tensors["weight.quant_map"]
        if not torch.equal(numbers.cpu(), quant_map(cls.quant, torch.device("cpu"))):
            raise ValueError("another quant_map")
        return {"weight": tensors["weight"], "absmax": tensors["weight.absmax"]}

    def to_file(self) -> dict[str, Tensor]:
        settings = torch.tensor(list(json.dumps(self.settings()).encode()), dtype=torch.uint8)
        tensors = {"weight": self.weight, "weight.absmax": self.absmax, "weight.quant_map": self.numbers().clone()}
        return {**tensors, STATE + self.quant: settings}


class Int8Linear(BlockLinear):
    """One byte a weight, in blocks of 256; magnitudes in float32."""

    quant = "int8"
    block = EIGHT

    @classmethod
    def stored(cls, weight: Tensor) -> dict[str, Tensor]:
        index, absmax = to_8_bits(weight)
        return {"weight": index.view(weight.shape), "absmax": absmax}

    @staticmethod
    def layout(rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        blocks = -(-rows * columns // EIGHT)
        return {"weight": ((rows, columns), torch.uint8), "absmax": ((blocks,), torch.float32)}

    def fill_by_kernel(self, out: Tensor, start: int) -> None:
        triton.dense_of_8_bits(self.weight, self.absmax, self.numbers(), out, start)


class FourBitLinear(BlockLinear):
    """Half a byte a weight, in blocks of 64; magnitudes less their mean in 8 bits."""

    block = FOUR
    nested_absmax: Tensor
    offset: Tensor
    """(1,) float32: the mean of the magnitudes."""

    @classmethod
    def stored(cls, weight: Tensor) -> dict[str, Tensor]:
        index, absmax = to_4_bits(weight, cls.quant)
        # on the CPU, so that the mean is the same wherever the weight lies
        absmax = absmax.cpu()
        offset = absmax.mean()
        nested, nested_absmax = to_8_bits(absmax - offset)
        found = {"absmax": nested, "nested_absmax": nested_absmax, "offset": offset.view(1)}
        return {"weight": index[:, None], **{name: tensor.to(weight.device) for name, tensor in found.items()}}

    @staticmethod
    def layout(rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        blocks = -(-rows * columns // FOUR)
        return {
            "weight": ((-(-rows * columns // 2), 1), torch.uint8), "absmax": ((blocks,), torch.uint8),
            "nested_absmax": ((-(-blocks // EIGHT),), torch.float32), "offset": ((1,), torch.float32),
        }  # fmt: skip

    @classmethod
    def blank(cls, weight: Tensor) -> dict[str, Tensor]:
        absmax = [_quotients(weight.reshape(-1)[part], FOUR)[1] for part in parts(weight.numel())]
        return super().blank(weight) | {"offset": torch.cat(absmax).cpu().mean().view(1)}

    def magnitudes(self, blocks: slice = slice(None)) -> Tensor:
        first, last, _ = blocks.indices(len(self.absmax))
        nested = self.nested_absmax[first // EIGHT : -(-last // EIGHT)].repeat_interleave(EIGHT)
        numbers = pick(quant_map("int8", self.absmax.device), self.absmax[first:last])
        return numbers * nested[first % EIGHT :][: last - first] + self.offset

    def fill_by_kernel(self, out: Tensor, start: int) -> None:
        map8 = quant_map("int8", self.weight.device)
        magnitudes = (self.absmax, self.nested_absmax, self.offset)
        triton.dense_of_4_bits(self.weight, *magnitudes, self.numbers(), map8, out, start)

    def quotients(self, weights: slice) -> Tensor:
        pairs = self.weight.view(-1)[weights.start // 2 : -(-weights.stop // 2)]
        numbers = pick(pair_map(self.quant, self.weight.device), pairs).view(torch.float32)
        return numbers[: weights.stop - weights.start]

    def settings(self) -> dict[str, Any]:
        nested = {"nested_blocksize": EIGHT, "nested_dtype": "float32", "nested_offset": self.offset.item()}
        return super().settings() | nested

    def to_file(self) -> dict[str, Tensor]:
        nested_map = quant_map("int8", self.weight.device).clone()
        nested = {"weight.nested_absmax": self.nested_absmax, "weight.nested_quant_map": nested_map}
        return super().to_file() | nested

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        if settings["nested_blocksize"] != EIGHT:
            raise ValueError(f"nested_blocksize {settings['nested_blocksize']}, must be {EIGHT}")
        offset = torch.tensor([float(settings["nested_offset"])])
        nested = {"nested_absmax": tensors["weight.nested_absmax"], "offset": offset}
        return super().from_file(tensors, settings) | nested


class Nf4Linear(FourBitLinear):
    """16 numbers at the quantiles of a normal distribution."""

    quant = "nf4"


class Fp4Linear(FourBitLinear):
    """16 floating-point numbers: a sign, two bits of exponent, one of fraction."""

    quant = "fp4"


def to_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (n,) uint8 of the numbers of x, and magnitudes (n/256,) float32.

    bitsandbytes rounds a quotient to a grid of 2^16 steps before it takes the nearest number, and so does this.
    """
    nearest = _nearest_on_grid(x.device)
    index = torch.empty(x.numel(), dtype=torch.uint8, device=x.device)
    found = []
    for part in parts(x.numel()):
        quotients, absmax = _quotients(x.reshape(-1)[part], EIGHT)
        steps = ((quotients + 1) * 32767.5 + 0.5).int().clamp_(0, 65535)
        steps.view(-1, EIGHT).masked_fill_(absmax[:, None] == 0, 0)
        index[part] = pick(nearest, steps[: part.stop - part.start])
        found.append(absmax)
    return index, torch.cat(found)


def to_4_bits(x: Tensor, quant: str) -> tuple[Tensor, Tensor]:
    """Indices of the numbers of x, two in a byte (n/2,) uint8, and magnitudes (n/64,) float32."""
    numbers, order = quant_map(quant, x.device).sort(stable=True)
    bounds = (numbers[:-1] + numbers[1:]) / 2
    n = x.numel()
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=x.device)
    found = []
    for part in parts(n):
        quotients, absmax = _quotients(x.reshape(-1)[part], FOUR)
        index = pick(order, torch.bucketize(quotients, bounds, out_int32=True)).to(torch.uint8).view(-1, 2)
        size = -(-(part.stop - part.start) // 2)
        packed[part.start // 2 :][:size] = (index[:, 0] << 4 | index[:, 1])[:size]
        found.append(absmax)
    return packed, torch.cat(found)


def parts(n: int, size: int | None = None) -> Iterator[slice]:
    """n things in parts of `size`; if None, weights in parts of whole blocks."""
    size = size or PART
    return (slice(i, min(n, i + size)) for i in range(0, n, size))


def pick(table: Tensor, index: Tensor) -> Tensor:
    """table[index] of flat tensors; on a CPU ten times as fast as that."""
    return torch.index_select(table, 0, index.int())


def _quotients(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x (n,) divided by the magnitude of its block, with zeros to fill the last block; and the magnitudes."""
    blocks = _whole_blocks(x.float(), block)
    absmax = blocks.abs().amax(1)
    return (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1).view(-1), absmax


def _whole_blocks(x: Tensor, block: int) -> Tensor:
    """x (n,) as (blocks,block), with zeros to fill the last."""
    return torch.nn.functional.pad(x, (0, -len(x) % block)).view(-1, block)


@cache
def quant_map(quant: str, device: torch.device) -> Tensor:
    """The numbers that the indices of a format stand for, float32, in the order of the indices."""
    numbers = torch.tensor(MAPS[quant], dtype=torch.float32) if quant in MAPS else dynamic_map(signed=True)
    return numbers.to(device)


@cache
def pair_map(quant: str, device: torch.device) -> Tensor:
    """(256,) int64: for each byte, the two float32 numbers that its halves stand for, side by side."""
    numbers = quant_map(quant, device)
    return torch.stack((numbers.repeat_interleave(16), numbers.repeat(16)), 1).view(torch.int64).view(-1)


def dynamic_map(signed: bool) -> Tensor:
    """The 256 numbers from -1 (or 0) to 1 that 8 bits stand for, rising; float32.

    0 and 1, and in each of the seven decades below 1 twice as many as in the one before, evenly spread.
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6))
    positive = torch.cat(decades)
    negative = -positive if signed else positive[:0]
    return torch.cat((negative, torch.tensor([0.0, 1.0]), positive)).sort().values


@cache
def _nearest_on_grid(device: torch.device) -> Tensor:
    """(65536,) uint8: for each step of the grid from -1 to 1 the index of the nearest of the 256 numbers."""
    numbers = quant_map("int8", torch.device("cpu")).double()
    grid = torch.arange(65536, dtype=torch.float64) * (2 / 65535) - 1
    return torch.bucketize(grid, (numbers[:-1] + numbers[1:]) / 2).to(device, torch.uint8)
