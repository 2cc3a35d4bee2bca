"""The compiled kernels as Python functions: the arguments that they take, and calling them on torch's own stream."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...errors import ConfigError
from .build import build, find_nvcc

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ARRAYS = ("r", "w", "k", "v", "kk", "iclr", "y", "dy", "dr", "dw", "dk", "dv", "dkk", "diclr")
POINTERS = ("u", "du", "initial", "final", "d_initial", "d_final", "kept", "removed", "offsets")
NUMBERS = ("tokens", "heads", "documents", "parts", "one_decay")
NO_NVCC = "nvcc was not found; install the CUDA toolkit"


class Pointers(Structure):
    """The arguments of a launch; a field that holds a tensor has its address, or null."""

    def give(self, **tensors: Tensor | None) -> None:
        """Sets the fields of these names; the tensors must outlive the call."""
        for name, x in tensors.items():
            setattr(self, name, None if x is None else x.data_ptr())


class Array(Structure):
    """A tensor of any of `DTYPES`; null if there is none."""

    _fields_ = (("data", c_void_p), ("dtype", c_int))

    @staticmethod
    def of(x: Tensor | None) -> Array:
        return Array(None, 0) if x is None else Array(x.data_ptr(), DTYPES[x.dtype])


class Call(Structure):
    """`Call` of common.cuh, field by field; shapes are told there."""

    _fields_ = (
        *((name, Array) for name in ARRAYS),
        *((name, c_void_p) for name in POINTERS),
        *((name, c_int) for name in NUMBERS),
    )

    def give(self, **tensors: Tensor | None) -> None:
        """Sets the fields of these names; the tensors must outlive the call."""
        for name, x in tensors.items():
            setattr(self, name, Array.of(x) if name in ARRAYS else None if x is None else x.data_ptr())


def run(name: str, call: Structure, number: int, device: torch.device) -> None:
    """Launches kernels on `device`'s current stream and does not wait. Raises RuntimeError if one cannot start.

    `number` is the head size; of `chunked6` and `chunked7` it says which kernels.
    """
    if torch._C._cuda_getDevice() != device.index:
        with torch.cuda.device(device):
            return run(name, call, number, device)
    library, stream = load(device), torch._C._cuda_getCurrentRawStream(device.index)
    code = getattr(library, name)(byref(call), number, stream)
    if code:
        raise RuntimeError(
            f"--op cuda: {name} failed: {library.cuda_error(code).decode()}; choose --op triton or torch"
        )


def backward_parts(name: str, call: Call, head_size: int, device: torch.device) -> int:
    """How many blocks are to share a head in the backward `name` on this card."""
    library = load(device)
    with torch.cuda.device(device):
        return int(getattr(library, f"{name}_parts")(call, head_size))


@cache
def load(device: torch.device) -> ctypes.CDLL:
    """The kernels for this card, compiled if they are not in the cache. Raises ConfigError if that fails."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise ConfigError(f"--op cuda: {NO_NVCC}, or choose --op triton")
    return open_library(build(nvcc, "sm_{}{}".format(*torch.cuda.get_device_capability(device))))


def open_library(path: Path) -> ctypes.CDLL:
    """What `build` made, its functions declared."""
    library = ctypes.CDLL(str(path))
    for version in ("wkv6", "wkv7"):
        for direction in ("forward", "backward"):
            getattr(library, f"{version}_{direction}").argtypes = (POINTER(Call), c_int, c_void_p)
        getattr(library, f"{version}_backward_parts").argtypes = (POINTER(Call), c_int)
    for name in ("chunked6_forward", "chunked6_backward", "chunked7_forward", "chunked7_backward"):
        getattr(library, name).argtypes = (c_void_p, c_int, c_void_p)
    library.cuda_error.argtypes, library.cuda_error.restype = (c_int,), c_char_p
    assert library.call_size() == ctypes.sizeof(Call), "Call is not what common.cuh has"
    return library
