"""Documents cut into chunks of C tokens: where each chunk lies, for kernels that take one chunk a program.

Axes: B rows, T tokens, S documents, G chunks of all documents together.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Table(NamedTuple):
    """Chunks in the order of their tokens; int32."""

    start: Tensor  # (G,) first token, in the B*T tokens of all rows
    length: Tensor  # (G,) tokens, 1 to C; 0 in entries to spare
    first: Tensor  # (S,) a document's first chunk
    counts: Tensor  # (S,) chunks of a document; 0 if it is empty

    @property
    def chunks(self) -> int:
        """G."""
        return len(self.start)

    @property
    def documents(self) -> int:
        """S."""
        return len(self.first)


def table(cu_seqlens: Tensor | None, B: int, T: int, C: int, device: torch.device) -> Table:
    """The chunks of B rows of T tokens, or of the documents that one row holds.

    Offsets that lie on a GPU are not waited for: the table then has entries to spare.
    """
    if cu_seqlens is not None and cu_seqlens.device.type != "cpu":
        # every layer of a model asks for it; but offsets may change in place, and a CUDA graph must make its own
        version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
        key = C, T, version, cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()
        made: dict[object, Table] = cu_seqlens.__dict__.setdefault("chunks", {})
        if key not in made:
            made.clear()
            made[key] = _on_device(cu_seqlens, T, C)
        return made[key]
    bounds = tuple(range(0, (B + 1) * T, T)) if cu_seqlens is None else tuple(cu_seqlens.tolist())
    return _known(bounds, C, device)


@lru_cache(maxsize=16)  # every layer of a model asks for the same
def _known(bounds: tuple[int, ...], C: int, device: torch.device) -> Table:
    start: list[int] = []
    length: list[int] = []
    first: list[int] = []
    count: list[int] = []
    for begin, end in pairwise(bounds):
        first.append(len(start))
        starts = range(begin, end, C)
        count.append(len(starts))
        start += starts
        length += [min(C, end - s) for s in starts]
    parts = [torch.tensor(part, dtype=torch.int32) for part in (start, length, first, count)]
    room = [-(-len(part) // 4) * 4 for part in parts]  # each at 16 bytes, so that kernels are compiled only once
    numbers = torch.cat([F.pad(part, (0, n - len(part))) for part, n in zip(parts, room, strict=True)])
    if device.type == "cuda":
        numbers = numbers.pin_memory()  # so that nothing waits for the copy
    numbers = numbers.to(device, non_blocking=True)
    return Table(*(x[: len(part)] for x, part in zip(torch.split(numbers, room), parts, strict=True)))


def _on_device(cu_seqlens: Tensor, T: int, C: int) -> Table:
    bounds = cu_seqlens.int()
    sizes = bounds[1:] - bounds[:-1]
    count = (sizes + (C - 1)) // C
    after = count.cumsum(0, dtype=torch.int32)
    first = after - count
    most = T // C + len(sizes)  # every document may end in a chunk that is not full
    chunk = torch.arange(most, dtype=torch.int32, device=bounds.device)
    document = torch.searchsorted(after, chunk, right=True).clamp(max=len(sizes) - 1)
    within = (chunk - first[document]) * C
    length = (sizes[document] - within).clamp(0, C)
    return Table(bounds[:-1][document] + within, length.int(), first, count)
