"""Which tokens of an example the model is trained to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..config import DataConfig, Mask
from ..errors import DataError
from .templates import Segment, Template
from .tokenizer import Tokenizer

Ids = npt.NDArray[np.integer]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids and which of them are targets. The model reads ids[:-1] and predicts ids[1:]."""

    ids: Ids
    """(n,)"""
    target: Flags
    """(n,); the first of a document is never a target, because nothing comes before it."""
    more: bool = False
    """Whether it is a part of a document with which the next one goes on."""

    @property
    def inputs(self) -> int:
        """Tokens that the model reads."""
        return len(self.ids) - 1

    @property
    def targets(self) -> int:
        """Tokens that the model is trained to predict."""
        return int(self.target.sum())


class Encoder:
    """Segments of an example to its tokens and targets, as the settings say. It counts what one should be told."""

    def __init__(self, tokenizer: Tokenizer, mask: Mask, stop: int, marks: tuple[str, str] = ("", "")) -> None:
        self.tokenizer, self.mask, self.stop = tokenizer, mask, stop
        self.vocab_size = tokenizer.vocab_size
        """Of the model: every id is below it."""
        self.marks = marks
        self._mark_ids = [np.array(tokenizer.encode(mark), np.int64) for mark in marks]
        self._waiting: list[Ids] = []
        self.unmarked = 0
        """Examples without the mark of what is trained on, which are trained on whole, as in the original."""
        self.stops_inside = 0
        """Pieces of text, prompts or answers, that hold the stop token."""

    def encode(self, segments: Sequence[Segment]) -> Encoded:
        """Encode each segment by itself, so that no token crosses from prompt to answer.

        Where a segment says so, the stop token follows it; an example of one segment is plain text, which ends with
        token 0. Raises DataError (without the origin, which the caller knows) if nothing is to be learnt.
        """
        is_text = len(segments) == 1
        if is_text:
            self._check_text()
        stop = self.tokenizer.end_token if is_text else self.stop
        learnt = [segment.target for segment in segments]
        if self.mask == "last":
            last = max((i for i, target in enumerate(learnt) if target), default=-1)
            learnt = [i == last for i in range(len(learnt))]
        ids: list[int] = []
        target: list[bool] = []
        written = 0
        for segment, is_learnt in zip(segments, learnt, strict=True):
            piece = self.tokenizer.encode(segment.text)
            written += len(piece) * is_learnt
            self.stops_inside += stop in piece
            piece += [stop] * segment.ends
            ids += piece
            target += [is_learnt] * len(piece)
        if not written:
            raise DataError("no answer tokens: nothing in the example is to be learnt; give it an answer")
        array = np.array(ids, np.int32)
        return Encoded(array, self.targets(array, np.array(target, np.bool_)))

    def encode_part(self, text: str, continues: bool, more: bool) -> list[Encoded]:
        """Encode a part of a plain text, where it `continues` the one before, and where there is `more` of it.

        What can only be told of the whole comes with its last part, and for the others there is nothing. Raises
        DataError as `encode` does.
        """
        self._check_text()
        ids = np.array(self.tokenizer.encode(text) + [self.tokenizer.end_token] * (not more), np.int32)
        if self.mask not in ("qa", "se"):
            target = np.ones(len(ids), np.bool_)
            target[0] = continues
            return [Encoded(ids, target, more)]
        self._waiting.append(ids)
        if more:
            return []
        ids = np.concatenate(self._waiting)
        self._waiting.clear()
        return [Encoded(ids, self.targets(ids, np.zeros(len(ids), np.bool_)))]

    def _check_text(self) -> None:
        if self.mask in ("answers", "last"):
            raise DataError(f"plain text has no answers: not with --mask {self.mask}; choose auto or all")

    def notes(self) -> list[str]:
        """What should be told of what was encoded."""
        notes = []
        if self.unmarked:
            notes.append(f"{self.unmarked:,} examples without {self.marks[1]!r}: trained on whole")
        if self.stops_inside:
            notes.append(f"{self.stops_inside:,} texts hold the stop token, where the model learns to stop")
        return notes

    def targets(self, ids: Ids, answers: Flags) -> Flags:
        """(n,) which of `ids` (n,) are targets, where `answers` are those that the example itself says."""
        if self.mask in ("all", "pad"):
            answers = np.ones(len(ids), np.bool_)
        elif self.mask in ("qa", "se"):
            answers = between(ids, *self._mark_ids)
            if not answers.any():
                self.unmarked += 1
                answers[:] = True
        answers[0] = False
        return answers


def between(ids: Ids, masked: Ids, trained: Ids) -> Flags:
    """(n,) True from each place where `trained` stands in `ids`, that included, up to the next where `masked` does.

    Source: `create_mask` and `generate_mask` of RWKV-PEFT's dataset.py, whose marks are token ids as well.
    """
    event = np.full(len(ids) + 1, -1, np.int64)  # the first is the state before any mark: masked
    event[0] = 0
    for value, mark in ((1, trained), (0, masked)):
        event[1:][starts_of(ids, mark)] = value
    at = np.where(event >= 0, np.arange(len(event)), 0)
    inside: Flags = event[np.maximum.accumulate(at)][1:] == 1
    return inside


def starts_of(ids: Ids, mark: Ids) -> Flags:
    """(n,) where the ids `mark` begin inside `ids`."""
    found = np.zeros(len(ids), np.bool_)
    places = len(ids) - len(mark) + 1
    if places > 0 and len(mark):
        found[:places] = np.logical_and.reduce([ids[i : places + i] == token for i, token in enumerate(mark)])
    return found


def encoder_for(config: DataConfig, tokenizer: Tokenizer, template: Template, vocab_size: int | None = None) -> Encoder:
    """The encoder that the settings ask for, for a model of `vocab_size` ids, or one made for the tokenizer.

    Raises ConfigError if the stop token is none of the vocabulary.
    """
    stop = config.stop_token if config.stop_token is not None else template.stop
    stop_id = tokenizer.end_token if stop is None else tokenizer.stop_id(stop)
    encoder = Encoder(tokenizer, config.mask, stop_id, config.marks())
    encoder.vocab_size = vocab_size or tokenizer.vocab_size
    return encoder
