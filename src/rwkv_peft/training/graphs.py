"""Micro-batches as CUDA graphs: thousands of small kernels launched at once, so that the GPU need not wait for Python.

A graph is bound to shapes and addresses. So a micro-batch is padded to one of few shapes and copied to where the graph
reads: the padding is a document of its own, after all others, and its targets count nothing. A shape is run plainly the
first time, captured the second time, and replayed from then on; all of that in one memory, since what a graph has used
stays its own for good.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..adapters import draws_random_numbers, is_foreign
from ..data.batches import Batch
from ..models import Rwkv
from ..models.layers import Documents
from ..ops import triton

MOST_SHAPES = 16  # further ones are run plainly; each graph holds its launches
NO_TARGET = -100


class Shape(NamedTuple):
    """What a graph is made for: one row of T tokens that holds S documents, n targets; padding included."""

    tokens: int
    documents: int
    targets: int

    @property
    def sizes(self) -> list[int]:
        """Of the parts of the numbers that a graph reads: tokens, starts, ends, positions, labels, offsets."""
        return [self.tokens] * 3 + [self.targets] * 2 + [self.documents + 1]

    @staticmethod
    def of(batch: Batch) -> Shape:
        """The smallest that holds the batch: sizes have three leading bits, the number of documents has one."""
        tokens = _rounded(batch.tokens.numel())
        documents = len(batch.tokens) if batch.cu_seqlens is None else len(batch.cu_seqlens) - 1
        needed = documents + (tokens > batch.tokens.numel())
        return Shape(tokens, 1 << (needed - 1).bit_length(), _rounded(len(batch.labels)))


def why_not(model: Rwkv) -> str | None:
    """None if the model's micro-batches can be graphs, else the reason."""
    if model.op.name not in ("triton", "cuda") or not triton.is_installed():
        return f"with --op {model.op.name}"
    if is_foreign(model):
        return "with an adapter of Hugging Face PEFT"
    if draws_random_numbers(model):
        return "with --dropout"
    return None


class Graphs:
    """Calls `compute(documents, positions, labels, factor)`, which returns a scalar, as CUDA graphs.

    What it does to `.grad` is to add. Of the parameters `fresh` it is to replace: the first graph makes their
    gradients, with nothing to add to, and the others begin by making them 0.
    """

    def __init__(
        self,
        compute: Callable[[Documents, Tensor, Tensor, Tensor], Tensor],
        device: torch.device,
        fresh: Sequence[Tensor] = (),
    ) -> None:
        self.compute, self.fresh = compute, fresh
        self.inputs: dict[Shape, Tensor] = {}
        self.graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.factor = torch.ones((), device=device)
        self.gradients: list[Tensor | None] = [None] * len(fresh)  # of `fresh`, from the first graph on
        self.stream = stream_of(device)
        with torch.cuda.device(device):
            self.pool = torch.cuda.MemPool()  # the last one here, since torch wants the graphs to be gone before it

    def takes(self, batch: Batch) -> bool:
        """Whether there is room for a batch of this shape."""
        return len(self.inputs) < MOST_SHAPES or Shape.of(batch) in self.inputs

    def run(self, batch: Batch, factor: float) -> Tensor:
        """The scalar of this batch, which holds until the next call."""
        shape = Shape.of(batch)
        is_new = shape not in self.inputs
        numbers = flattened(batch, shape).pin_memory()
        if is_new:
            self.inputs[shape] = torch.empty_like(numbers, device=self.factor.device, pin_memory=False)
        self.inputs[shape].copy_(numbers, non_blocking=True)
        self.factor.fill_(factor)
        if is_new:
            with self.memory():
                return self._call(shape)
        if shape not in self.graphs:
            graph, pool = torch.cuda.CUDAGraph(), cast("Any", self.pool.id)
            with no_garbage_collection(), torch.cuda.graph(graph, pool=pool, stream=self.stream):
                result = self._call(shape)
            self.graphs[shape] = graph, result
            self.gradients = [p.grad for p in self.fresh]
        graph, result = self.graphs[shape]
        graph.replay()
        for p, gradient in zip(self.fresh, self.gradients, strict=True):
            p.grad = gradient
        return result

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Where other things can be computed in the memory of the graphs, on their stream.

        What is left there does not outlive the next replay.
        """
        main = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool, self.stream.device):
            yield
        main.wait_stream(self.stream)

    def renew(self) -> None:
        """Let the gradients of `fresh` be 0 where the graphs leave theirs, so that there is one set of them."""
        for p, gradient in zip(self.fresh, self.gradients, strict=True):
            p.grad = None if gradient is None else gradient.zero_()

    def _call(self, shape: Shape) -> Tensor:
        self.renew()
        tokens, starts, ends, positions, labels, offsets = self.inputs[shape].split(shape.sizes)  # type: ignore[no-untyped-call]
        documents = Documents.placed(tokens[None].long(), offsets.clone(), torch.stack((starts, ends)))
        return self.compute(documents, positions.long(), labels.long(), self.factor)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """What Python would find to be garbage meanwhile may be another graph, whose end would spoil one that is made."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@cache
def stream_of(device: torch.device) -> torch.cuda.Stream:
    """The one of all graphs, their capture and their plain runs: cuBLAS keeps memory for each stream that it meets."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def flattened(batch: Batch, shape: Shape) -> Tensor:
    """All numbers of a batch, padded to `shape`, as one int32 tensor; its parts have the `sizes` of the shape."""
    T, n = batch.tokens.numel(), len(batch.labels)
    width = batch.tokens.shape[1]
    bounds = torch.arange(0, T + 1, width) if batch.cu_seqlens is None else batch.cu_seqlens
    offsets = torch.full((shape.documents + 1,), shape.tokens, dtype=torch.int32)
    offsets[: len(bounds)] = bounds
    document = (offsets[1:] > offsets[:-1]).nonzero().squeeze(1)
    marks = torch.full((2, shape.tokens), -1, dtype=torch.int32)
    marks[0, offsets[document].long()] = marks[1, offsets[document + 1].long() - 1] = document.int()
    tokens = torch.zeros(shape.tokens, dtype=torch.int32)
    tokens[:T] = batch.tokens.flatten()
    targets = torch.zeros(2, shape.targets, dtype=torch.int32)
    targets[1] = NO_TARGET
    targets[0, :n], targets[1, :n] = batch.positions, batch.labels
    return torch.cat((tokens, marks.flatten(), targets.flatten(), offsets))


def _rounded(n: int) -> int:
    """n, at least 64, with all but its three leading bits rounded up."""
    unit = max(64, 1 << max(0, (n - 1).bit_length() - 3))
    return -(-n // unit) * unit
