"""Examples laid out for the model. B rows of a batch, T tokens of a row, n targets, S documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .masking import Encoded


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows computed at once, on the CPU."""

    tokens: Tensor
    """(B,T) int64; (1,T) with `cu_seqlens`."""
    positions: Tensor
    """(n,) int64: indices into B·T of the tokens after which a target is predicted."""
    labels: Tensor
    """(n,) int64: the targets."""
    inputs: int
    """Tokens that are no padding."""
    cu_seqlens: Tensor | None = None
    """(S+1,) int32: where the documents of the one row begin and end; each starts from the initial state."""


def beside(rows: Sequence[Encoded]) -> Batch:
    """One row of all `rows` side by side, without any padding."""
    bounds = np.cumsum([0, *(row.inputs for row in rows)])
    return _batch(
        np.concatenate([row.ids[:-1] for row in rows])[None],
        np.concatenate([row.ids[1:] for row in rows])[None],
        np.concatenate([row.target[1:] for row in rows])[None],
        int(bounds[-1]),
        bounds if len(rows) > 1 else None,
    )


def padded(rows: Sequence[Encoded], side: str = "right") -> Batch:
    """One row each, as wide as the longest; the padding is token 0.

    On the right, it comes after all that counts. On the left, the model would read it first: there each stretch of
    padding is a document of its own, so that it changes no state either.
    """
    B, T = len(rows), max(row.inputs for row in rows)
    tokens, labels, target = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64), np.zeros((B, T), np.bool_)
    for i, row in enumerate(rows):
        place = np.s_[i, : row.inputs] if side == "right" else np.s_[i, T - row.inputs :]
        tokens[place], labels[place], target[place] = row.ids[:-1], row.ids[1:], row.target[1:]
    inputs = sum(row.inputs for row in rows)
    if side == "right" or inputs == B * T:
        return _batch(tokens, labels, target, inputs)
    begins = [bound for i, row in enumerate(rows) for bound in (i * T, (i + 1) * T - row.inputs)]
    bounds = np.unique([*begins, B * T])
    return _batch(tokens.reshape(1, -1), labels.reshape(1, -1), target.reshape(1, -1), inputs, bounds)


def _batch(
    tokens: npt.NDArray[np.integer],
    labels: npt.NDArray[np.integer],
    target: npt.NDArray[np.bool_],
    inputs: int,
    bounds: npt.NDArray[np.int64] | None = None,
) -> Batch:
    positions = np.flatnonzero(target)
    return Batch(
        torch.from_numpy(tokens.astype(np.int64, copy=False)),
        torch.from_numpy(positions),
        torch.from_numpy(labels.ravel()[positions].astype(np.int64)),
        inputs,
        None if bounds is None else torch.from_numpy(bounds.astype(np.int32)),
    )
