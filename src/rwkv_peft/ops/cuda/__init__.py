"""Operators in CUDA C++ for NVIDIA cards. The kernels (`*.cu`) are compiled on first use; nothing is at import.

They run the recurrences token by token, exact in float32. Those with inputs of 16 bits and heads of 64 go by chunks on
tensor cores instead, where the card has them.

Axes: B batch, T tokens, H heads, N head size, S documents, P blocks that share a head in the backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ..raw import Raw, Saved, recurrence
from . import chunked6, chunked7
from .build import find_nvcc
from .chunked7 import aligned
from .library import DTYPES, NO_NVCC, Call, backward_parts, load, run

HEAD_SIZES = (64, 128)
SEGMENT = 32  # tokens from one kept state to the next, as in common.cuh
CHUNKED: dict[int, Callable[..., tuple[Tensor, Tensor]]] = {5: chunked6.wkv5, 6: chunked6.wkv6, 7: chunked7.wkv7}
INPUTS = {5: ("r", "w", "k", "v", "u"), 6: ("r", "w", "k", "v", "u"), 7: ("r", "w", "k", "v", "kk", "iclr")}


def supports(device: torch.device, head_size: int) -> str | None:
    """None, or the reason why the kernels cannot run there. Compiles nothing."""
    if device.type != "cuda":
        return f"needs a GPU, and the model is on {device.type}"
    if torch.version.cuda is None or sys.platform == "win32":
        return "needs a card from NVIDIA and Linux"
    if head_size not in HEAD_SIZES:
        return f"knows heads of 64 and 128, not of {head_size}"
    return NO_NVCC if find_nvcc() is None else None


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    iclr: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `reference.wkv7`: arguments, shapes and results are described there."""
    return _wkv(7, (r, w, k, v, kk, iclr), initial_state, cu_seqlens)


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `reference.wkv6`: arguments, shapes and results are described there."""
    return _wkv(6, (r, w, k, v, u), initial_state, cu_seqlens)


def wkv5(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `reference.wkv5`: arguments, shapes and results are described there."""
    return _wkv(5, (r, w, k, v, u), initial_state, cu_seqlens)


def _wkv(
    version: int, inputs: tuple[Tensor, ...], initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    r = inputs[0]
    for name, x in zip(INPUTS[version], inputs, strict=True):
        shape = r.shape[2:] if name == "u" or (name == "w" and version == 5) else r.shape
        if x.dtype not in DTYPES or x.shape != shape:
            raise ValueError(
                f"wkv{version} of --op cuda: {name} is {x.dtype} {tuple(x.shape)}; "
                f"must be float32, bfloat16 or float16 {tuple(shape)}; --op torch takes other dtypes"
            )
    offsets = None if cu_seqlens is None else _offsets(cu_seqlens, r.device)
    documents, (_, _, H, N) = len(r) if offsets is None else len(offsets) - 1, r.shape
    if initial_state is not None and initial_state.shape != (documents, H, N, N):
        raise ValueError(
            f"wkv{version}: initial_state is {tuple(initial_state.shape)}; must be {(documents, H, N, N)} (S,H,N,N)"
        )
    if _on_tensor_cores(version, inputs):
        return CHUNKED[version](*inputs, initial_state, cu_seqlens)
    raw = Raw(partial(_forward, version), partial(_backward, version))
    return recurrence(raw, [aligned(x) for x in inputs], initial_state, offsets)


def _on_tensor_cores(version: int, inputs: tuple[Tensor, ...]) -> bool:
    """Whether `chunked6` or `chunked7` is for these; a single token is quicker without them."""
    r, w, k, v, *others = inputs
    same = (k, v, *others) if version == 7 else (k, v)  # w and u of the other versions may be of any dtype
    if r.shape[1] == 1 or r.dtype not in chunked7.DTYPES or any(x.dtype != r.dtype for x in same):
        return False
    if version == 7 and w.dtype not in chunked7.DTYPES:
        return False
    return has_tensor_cores(r.device, r.shape[3])


@cache  # asked for at every call
def has_tensor_cores(device: torch.device, head_size: int) -> bool:
    """Whether `chunked6` and `chunked7` know the heads, and the card has what they need."""
    return head_size == chunked7.HEAD_SIZE and torch.cuda.get_device_capability(device) >= (8, 0)


def is_fastest(device: torch.device, head_size: int) -> bool:
    """Whether these kernels were measured to be faster than Triton's, and can be had: the first call compiles them."""
    if supports(device, head_size) is not None or not has_tensor_cores(device, head_size):
        return False
    try:
        load(device)
    except ConfigError:
        return False
    return True


def _offsets(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """(S+1) int32 on the device; nothing is waited for."""
    if cu_seqlens.device.type != "cpu":
        return cu_seqlens.to(torch.int32).contiguous()
    return _moved(tuple(cu_seqlens.tolist()), device)


@lru_cache(maxsize=8)  # every layer of a model asks for the same
def _moved(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32).pin_memory().to(device, non_blocking=True)


def _forward(version: int, *args: Any) -> tuple[Tensor, Tensor, Saved | None]:
    """As `Raw.forward`; keeps one state in float32 for every 32 tokens."""
    *inputs, initial_state, offsets, keep = args
    named = _named(version, inputs)
    r = named["r"]
    B, T, H, N = r.shape
    call = _call(version, named, offsets)
    y, final = torch.empty_like(r), r.new_empty(call.documents, H, N, N, dtype=torch.float32)
    initial = None if initial_state is None else aligned(initial_state.float())
    kept = removed = None
    if keep:
        kept = r.new_empty(B * T // SEGMENT + call.documents, H, N, N, dtype=torch.float32)
        removed = torch.empty_like(r, dtype=torch.float32) if version == 7 else None
    call.give(y=y, initial=initial, final=final, kept=kept, removed=removed)
    run(f"wkv{max(version, 6)}_forward", call, N, r.device)
    return y, final, None if kept is None else Saved((kept, *([] if removed is None else [removed])), offsets)


def _backward(version: int, saved: Saved, *args: Any) -> tuple[Tensor, ...]:
    """As `Raw.backward`."""
    *inputs, dy, d_final = args
    (kept, *removed), offsets = saved
    named, name = _named(version, inputs), f"wkv{max(version, 6)}_backward"
    r, dy = named["r"], aligned(dy)
    N = r.shape[3]
    call = _call(version, named, offsets)
    P = call.parts = backward_parts(name, call, N, r.device)
    gradients = {n: _gradient(n, x, P, call.documents) for n, x in named.items()}
    d_final = None if d_final is None else aligned(d_final)
    d_initial = torch.empty_like(kept[: call.documents])
    call.give(**{f"d{n}": x for n, x in gradients.items()}, dy=dy, kept=kept, removed=removed[0] if removed else None)
    call.give(d_initial=d_initial, d_final=d_final)
    run(name, call, N, r.device)
    summed = (_sum_to(gradients[n], x.ndim) for n, x in named.items())
    return *(x.to(given.dtype) for x, given in zip(summed, inputs, strict=True)), d_initial


def _named(version: int, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """By their names; u is float32 for the kernels."""
    return {n: aligned(x.float()) if n == "u" else x for n, x in zip(INPUTS[version], inputs, strict=True)}


def _call(version: int, named: dict[str, Tensor], offsets: Tensor | None) -> Call:
    """The arguments that both directions share."""
    B, T, H, _ = named["r"].shape
    call = Call(tokens=T, heads=H, documents=B if offsets is None else len(offsets) - 1, parts=1)
    call.one_decay = version == 5
    call.give(**named, offsets=offsets)
    return call


def _gradient(name: str, x: Tensor, P: int, documents: int) -> Tensor:
    """Room for what the kernel writes: in x's own form, or with axes before it that are to be summed over."""
    if x.ndim == 2:  # u, and version 5's w
        return x.new_empty(P, documents, *x.shape, dtype=torch.float32)
    return torch.empty_like(x) if P == 1 or name == "v" else x.new_empty(P, *x.shape, dtype=torch.float32)


def _sum_to(x: Tensor, axes: int) -> Tensor:
    return x if x.ndim == axes else x.sum(tuple(range(x.ndim - axes)))
