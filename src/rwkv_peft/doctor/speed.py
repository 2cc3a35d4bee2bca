"""How fast this machine is, in a few seconds: each version's operator, matrix products, copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..ops import choose_backend
from .machine import Line
from .selftest import HEAD_SIZE, half_precision, in_one_line, name_of, random_inputs, wkv_of

SHAPES = {"cuda": (4, 2048, 32), "cpu": (1, 512, 4)}  # B, T, H
SIDES = {"cuda": 8192, "cpu": 1024}  # of the matrices that are multiplied
COPIED = {"cuda": 2**30, "cpu": 2**27}  # bytes


@dataclass(frozen=True)
class Measurement:
    """Something to be timed."""

    label: str
    prepare: Callable[[], Callable[[], object]]
    """Makes the call that is timed."""
    told: Callable[[float], str]
    """What to say of the seconds that a call took."""


def speeds(device: torch.device, versions: Sequence[int], seconds: float) -> Iterator[Line]:
    """A line for the operator of each of `versions`, and for what the device itself can do; `seconds` in all."""
    measurements = [*of_operators(device, versions), of_products(device), of_copies(device)]
    for measurement in measurements:
        try:
            took = seconds_per_call(measurement.prepare(), device, seconds / len(measurements))
        except Exception as error:  # memory mostly, but libraries have errors of their own
            yield measurement.label, in_one_line(error)
        else:
            yield measurement.label, measurement.told(took)


def of_operators(device: torch.device, versions: Sequence[int]) -> Iterator[Measurement]:
    """Forward and backward of one layer's operator, by the backend that `auto` takes."""
    dtype = usual_dtype(device)
    B, T, H = SHAPES[device.type]
    what = f"operator of one layer of width {H * HEAD_SIZE}, forward and backward, {name_of(dtype)}"
    auto = choose_backend("auto", device, HEAD_SIZE).name
    for version in versions:
        yield Measurement(
            f"RWKV-{version} {auto}",
            partial(operator, auto, version, B, T, H, dtype, device),
            lambda took: f"{B * T / took:,.0f} tokens/s ({what})",
        )


def of_products(device: torch.device) -> Measurement:
    """The product of two large matrices."""
    side, dtype = SIDES[device.type], usual_dtype(device)

    def prepare() -> Callable[[], object]:
        a, b = torch.randn(2, side, side, device=device, dtype=dtype)
        return lambda: a @ b

    def told(took: float) -> str:
        return f"{2 * side**3 / took / 1e12:,.2f} TFLOP/s ({name_of(dtype)}, {side} × {side})"

    return Measurement("matrix products", prepare, told)


def of_copies(device: torch.device) -> Measurement:
    """A copy within the device's memory."""
    size = COPIED[device.type]

    def prepare() -> Callable[[], object]:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return Measurement("copies", prepare, lambda took: f"{2 * size / took / 1e9:,.0f} GB/s (read and written)")


def operator(
    name: str, version: int, B: int, T: int, H: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """A call of the operator on random inputs, forward and backward."""
    inputs = [x.to(dtype).requires_grad_() for x in random_inputs(version, B, T, H, HEAD_SIZE, device)]
    dy = torch.randn_like(inputs[0])
    wkv = wkv_of(name, version)

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(wkv(*inputs)[0], inputs, dy)

    return call


def seconds_per_call(call: Callable[[], object], device: torch.device, budget: float) -> float:
    """The mean over about `budget` seconds, after a call that may compile."""
    call()
    synchronise(device)
    began, calls, more = time.perf_counter(), 0, 1
    while (spent := time.perf_counter() - began) < budget or not calls:
        for _ in range(more):
            call()
        synchronise(device)
        calls += more
        more = min(2 * more, 64)
    return spent / calls


def usual_dtype(device: torch.device) -> torch.dtype:
    """What models train in here."""
    return half_precision(device) if device.type == "cuda" else torch.float32


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
