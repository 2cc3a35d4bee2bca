"""Inputs of layers that are computed anew, in the CPU's memory between the forward and the backward pass.

`torch.utils.checkpoint` saves the tensors among its arguments as autograd saves any, by the hooks that are set around
the call; inside it sets its own. So hooks around it get the inputs and nothing else, and all that it does besides stays
as it is: early stop, random numbers, gradients of parameters. Axes: B rows, T tokens, D width.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..models.base import Keep
from ..plan.activations import pinned_block

AHEAD = 2  # tensors that may be on their way out while the next layer computes, and back: a layer keeps so many


class Offload(Keep):
    """Copies the inputs (B,T,D) of checkpoints to the CPU's memory, and back ahead of need.

    Copies are made on a stream of their own. The stream that computes waits for each one before it uses what arrives,
    or gives up what leaves; the CPU waits for none, so a CUDA graph can hold them. Pinned memory is made where there is
    too little, in the first pass of a shape, and used again by all later ones. On a CPU all this is a plain copy.
    """

    def __init__(self, device: torch.device, size: int = 0) -> None:
        """`size`: bytes of the largest tensor that is expected; where larger ones come, memory is made anew."""
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.buffers = Buffers(size, pinned=device.type == "cuda")
        self.leaving: deque[Parked] = deque()
        self.arriving: set[Parked] = set()
        self.newest: weakref.ref[Parked] | None = None
        self.last: torch.cuda.Event | None = None

    def around(self) -> AbstractContextManager[object]:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, x: Tensor) -> Tensor | Parked:
        """What autograd is to hold instead of x; states, which have no 3 axes, are small and stay."""
        if x.ndim != 3:
            return x
        parked = next((one for one in self.leaving if one.is_of(x)), None)  # both halves of a layer keep its input
        if parked is None:
            if len(self.leaving) == AHEAD:
                self.release(self.leaving.popleft())
            parked = Parked(x, self.buffers.take(x.nbytes), self.newest)
            weakref.finalize(parked, self.buffers.give, parked.buffer)
            parked.copied = self.copy(parked.far, x)
            self.newest = weakref.ref(parked)
            self.leaving.append(parked)
        parked.uses += 1
        return parked

    def unpack(self, held: Tensor | Parked) -> Tensor:
        """What was x, on the GPU again; those that the backward pass needs next begin to come back."""
        if isinstance(held, Tensor):
            return held
        self.fetch(held)
        following = held.previous
        for _ in range(AHEAD):
            parked = following() if following else None
            if parked is None:
                break
            if parked.uses > 0:
                self.fetch(parked)
            following = parked.previous
        assert held.near is not None
        x = held.near
        held.uses -= 1
        if held.uses <= 0:
            self.release(held)
        else:
            self.wait(held.copied)
        return x

    def fetch(self, parked: Parked) -> None:
        """Begin to copy it back, unless it is on the GPU."""
        if parked.near is None:
            parked.near = torch.empty(parked.far.shape, dtype=parked.far.dtype, device=self.device)
            parked.copied = self.copy(parked.near, parked.far)
            self.arriving.add(parked)

    def release(self, parked: Parked) -> None:
        """Give up what is on the GPU, once no copy needs it."""
        self.wait(parked.copied)
        self.arriving.discard(parked)
        parked.near = None

    def settle(self) -> None:
        """Wait for every copy, and give up all that is on the GPU."""
        self.wait(self.last)
        self.last = None
        for parked in (*self.leaving, *self.arriving):
            parked.near = None
        self.leaving.clear()
        self.arriving.clear()

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """On the other stream, after all that is to be computed until now; the event is its end."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            self.last = self.stream.record_event()
        return self.last

    def wait(self, copied: torch.cuda.Event | None) -> None:
        """Let the stream that computes wait for the end of a copy."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)


class Parked:
    """A tensor of which the CPU's memory has a copy. Whoever holds it keeps its memory from being used again."""

    def __init__(self, x: Tensor, buffer: Tensor, previous: weakref.ref[Parked] | None) -> None:
        self.near: Tensor | None = x.detach()
        """On the GPU, as long as it is needed there."""
        self.buffer = buffer
        self.far = buffer[: x.nbytes].view(x.dtype).view(x.shape)
        self.previous = previous
        """The one before it in the forward pass, which the backward pass needs after it."""
        self.copied: torch.cuda.Event | None = None
        """The end of the last copy from or to `near`."""
        self.uses = 0
        """Times that the backward pass will ask for it."""

    def is_of(self, x: Tensor) -> bool:
        """Whether it is a copy of x, which nothing has changed since."""
        near = self.near
        return near is not None and near.data_ptr() == x.data_ptr() and near.shape == x.shape


class Buffers:
    """Memory of the CPU in buffers of one size, which grows as it must. CUDA graphs know its addresses: it is kept."""

    def __init__(self, size: int, pinned: bool) -> None:
        self.size, self.pinned = size, pinned
        self.blocks: list[Tensor] = []
        self.free: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """A buffer of at least so many bytes."""
        if size > self.size:
            self.size, self.free = size, []
        if not self.free:
            block = torch.empty(pinned_block(self.size), dtype=torch.uint8, pin_memory=self.pinned)
            self.blocks.append(block)
            self.free += [part for part in block.split(self.size) if len(part) == self.size]  # type: ignore[no-untyped-call]
        return self.free.pop()

    def give(self, buffer: Tensor) -> None:
        """Take it back, unless larger ones are needed by now."""
        if len(buffer) == self.size:
            self.free.append(buffer)
