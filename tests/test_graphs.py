"""What is done around CUDA graphs, with graphs that are imagined: a replay runs again what was captured.

Real ones are in tests/test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rwkv_peft.data.batches import Batch
from rwkv_peft.models.layers import Documents
from rwkv_peft.training import graphs
from rwkv_peft.training.graphs import Graphs, Shape
from test_steps import BATCHES

CPU = torch.device("cpu")


class Imagined:
    """In the place of a CUDA graph."""

    replay: Callable[[], None]


@pytest.fixture
def imagined(monkeypatch: pytest.MonkeyPatch) -> None:
    making: list[Imagined] = []
    call = Graphs._call

    @contextmanager
    def capture(graph: Imagined, **_: Any) -> Iterator[None]:
        making.append(graph)
        yield
        making.pop()

    def watched(self: Graphs, shape: Shape) -> Tensor:
        """Of a capture, which computes nothing: what it would have changed is put back."""
        if not making:
            return call(self, shape)
        is_first = self.gradients == [None] * len(self.fresh)
        before = [None if p.grad is None else p.grad.clone() for p in parameters(self)]
        result = call(self, shape)
        made = [p.grad for p in self.fresh]
        for p, grad in zip(parameters(self), before, strict=True):
            if p.grad is not None:
                p.grad.copy_(torch.full_like(p, torch.nan) if grad is None else grad)

        def replay() -> None:
            there = self.gradients
            if is_first:
                self.gradients = [None] * len(self.fresh)
            result.copy_(call(self, shape))
            self.gradients = there
            for p, grad in zip(self.fresh, made, strict=True):
                assert p.grad is not None
                assert grad is not None
                grad.copy_(p.grad)

        making[-1].replay = replay
        return result

    stream = SimpleNamespace(device=CPU, wait_stream=lambda other: None)
    names = {"CUDAGraph": Imagined, "graph": capture, "MemPool": lambda: SimpleNamespace(id=(0, 1))}
    names |= {name: lambda *args: nullcontext() for name in ("device", "stream", "use_mem_pool")}
    for name, stand_in in (names | {"current_stream": lambda device: stream}).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(graphs, "stream_of", lambda device: stream)
    monkeypatch.setattr(Graphs, "_call", watched)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)


PARAMETERS = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor(3.0))]


def parameters(_: Graphs) -> list[nn.Parameter]:
    return PARAMETERS


def compute(documents: Documents, positions: Tensor, labels: Tensor, factor: Tensor) -> Tensor:
    """Something that depends on the batch; its padding counts nothing."""
    where = (labels >= 0).float()
    x = (documents.tokens.flatten()[positions] * where).sum() / 100
    loss = (PARAMETERS[0] * x).square().sum() * factor + PARAMETERS[1] * x * factor
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def wanted(batch: Batch, factor: float) -> list[Tensor]:
    """The loss and the gradients, plainly."""
    for p in PARAMETERS:
        p.grad = None
    documents = Documents(batch.tokens.long(), None)
    loss = compute(documents, batch.positions.long(), batch.labels.long(), torch.tensor(factor))
    return [loss, *(p.grad.clone() for p in PARAMETERS if p.grad is not None)]


ORDER = ["one row", "documents", "one row", "one row", "rows", "documents", "rows", "one row", "documents", "rows"]


def test_every_graph_leaves_the_gradients_of_its_batch_in_one_place(imagined: None) -> None:
    """Of lone micro-batches: nothing is left of those before, whether they were captured, replayed or run plainly."""
    want = {name: wanted(BATCHES[name], 0.5) for name in ORDER}
    made = Graphs(compute, CPU, PARAMETERS)
    places = set()
    for name in ORDER:
        loss = made.run(BATCHES[name], 0.5)
        for got, one in zip([loss, *(p.grad for p in PARAMETERS)], want[name], strict=True):
            torch.testing.assert_close(got, one)
        if made.graphs:
            places.add(tuple(p.grad.data_ptr() for p in PARAMETERS if p.grad is not None))
        for p in PARAMETERS:  # as an optimiser does
            p.grad = None
    assert len(made.graphs) == 3
    assert len(places) == 1


def test_gradients_are_added_up(imagined: None) -> None:
    want = [wanted(BATCHES[name], 0.5) for name in ORDER]
    made = Graphs(compute, CPU)
    for p in PARAMETERS:
        p.grad = torch.zeros_like(p)
    for name, (loss, *_) in zip(ORDER, want, strict=True):
        torch.testing.assert_close(made.run(BATCHES[name], 0.5), loss)
    for i, p in enumerate(PARAMETERS, 1):
        torch.testing.assert_close(p.grad, torch.stack([one[i] for one in want]).sum(0))
    assert len(made.graphs) == 3


def test_what_runs_besides_leaves_gradients_there_too(imagined: None) -> None:
    """As of shapes beyond the largest number."""
    made, batch = Graphs(compute, CPU, PARAMETERS), BATCHES["one row"]
    for _ in range(3):
        made.run(batch, 0.5)
    places = [p.grad for p in PARAMETERS]
    for p in PARAMETERS:
        p.grad = None
    with made.memory():
        made.renew()
    assert all(p.grad is place for p, place in zip(PARAMETERS, places, strict=True))
    assert all(not p.grad.any() for p in PARAMETERS if p.grad is not None)
