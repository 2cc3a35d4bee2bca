"""Which tokens of an example the model is trained to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .chat import Segment
from .tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids and which of them are targets. The model reads ids[:-1] and predicts ids[1:]."""

    ids: npt.NDArray[np.int32]
    """(n,)"""
    target: npt.NDArray[np.bool_]
    """(n,); the first is never a target, because nothing comes before it."""

    @property
    def inputs(self) -> int:
        """Tokens that the model reads."""
        return len(self.ids) - 1

    @property
    def targets(self) -> int:
        """Tokens that the model is trained to predict."""
        return int(self.target.sum())


def encode_example(segments: Sequence[Segment], tokenizer: Tokenizer) -> Encoded:
    """Encode each segment by itself, so that no token crosses from prompt to answer, and add the end token as a target.

    Raises:
        DataError: no answer tokens (without the origin, which the caller knows), or a lone surrogate.
    """
    ids: list[int] = []
    target: list[bool] = []
    for segment in segments:
        piece = tokenizer.encode(segment.text)
        ids += piece
        target += [segment.target] * len(piece)
    if not any(target):
        raise DataError("no answer tokens: nothing in the example is to be learnt; give it an answer")
    ids.append(tokenizer.end_token)
    target.append(True)
    target[0] = False
    return Encoded(np.array(ids, np.int32), np.array(target, np.bool_))
