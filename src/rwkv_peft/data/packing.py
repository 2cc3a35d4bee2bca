"""Which documents share a row."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


def best_fit(lengths: Integers, capacity: int) -> tuple[Integers, int]:
    """The row of each document (n,), and the number of rows, by best fit of the longest first.

    `lengths` (n,) are from 1 to `capacity`. Each document goes to the fullest row that still has room for it. Rows of
    the same room are filled together, so the time depends on the number of different lengths, hardly on n. How many
    rows there are depends on the lengths alone, not on their order.
    """
    order = np.argsort(-lengths, kind="stable")
    values, first = np.unique(-lengths[order], return_index=True)
    row_of = np.empty(len(lengths), np.int64)
    free: dict[int, list[Integers]] = {}  # rows by the room that they have left
    rooms: list[int] = []  # the rooms that some row has, rising
    count = 0

    def put_back(room: int, rows: Integers) -> None:
        if room and len(rows):
            if room not in free:
                insort(rooms, room)
            free.setdefault(room, []).append(rows)

    for length, documents in zip((-values).tolist(), np.split(order, first[1:]), strict=True):
        left = documents
        while len(left):
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms.pop(at)
                rows = np.concatenate(free.pop(room))
            else:
                room, new = capacity, -(-len(left) // (capacity // length))
                rows = np.arange(count, count + new)
                count += new
            each = room // length
            now, left = np.split(left, [each * len(rows)])
            row_of[now] = np.repeat(rows, each)[: len(now)]
            full, rest = divmod(len(now), each)
            put_back(room - each * length, rows[:full])
            put_back(room - rest * length, rows[full : full + 1])
            put_back(room, rows[full + 1 :])
    return row_of, count
