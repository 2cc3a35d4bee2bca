"""RWKV's own chat form: `System: S`, `User: Q`, `Assistant: A`, with an empty line between two turns.

An empty line therefore ends a turn: inside user and system text it is made a plain line break.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DataError

LABELS = {"system": "System:", "user": "User:", "assistant": "Assistant:"}
TURN_END = "\n\n"
EMPTY_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


@dataclass(frozen=True)
class Segment:
    """A stretch of text that is encoded by itself."""

    text: str
    target: bool
    """Whether the model is trained to predict it."""


def render_chat(messages: Sequence[tuple[str, str]]) -> list[Segment]:
    """Segments of a conversation given as (role, content): prompts up to `Assistant:`, and the answers as targets.

    An answer begins with the space after `Assistant:` and ends with the empty line before the next turn, if any.
    What follows the last answer trains nothing and is left out, and so is an empty system text.

    Raises:
        DataError: an unknown role, an empty answer, or no answer at all.
    """
    segments: list[Segment] = []
    prompt = ""
    for number, (role, content) in enumerate(messages, 1):
        turn = _turn(role, content)
        if role != "assistant":
            prompt += turn
            continue
        label = LABELS[role]
        answer = turn.removeprefix(label)
        if answer == TURN_END:
            raise DataError(f"message {number}: no answer tokens: the assistant's text is empty; fill it or remove it")
        segments += [Segment(prompt + label, False), Segment(answer, True)]
        prompt = ""
    if not segments:
        raise DataError("no answer tokens: no message is by the assistant; add its answer or remove the example")
    segments[-1] = Segment(segments[-1].text.removesuffix(TURN_END), True)
    return segments


def render_pair(prompt: str, response: str) -> list[Segment]:
    """Segments of one question and its answer. Raises `DataError` if the answer is empty."""
    return render_chat([("user", prompt), ("assistant", response)])


def render_prompt(messages: Sequence[tuple[str, str]]) -> str:
    """The text that a model continues with its answer: the conversation so far and `Assistant:`."""
    return "".join(_turn(role, content) for role, content in messages) + LABELS["assistant"]


def _turn(role: str, content: str) -> str:
    """One turn with its label and the empty line that ends it; nothing for an empty system text."""
    if role not in LABELS:
        raise DataError(f"role {role!r}: allowed are {', '.join(LABELS)}; rename or remove the message")
    text = content.strip()
    if role != "assistant":
        text = EMPTY_LINES.sub("\n", text.replace("\r\n", "\n"))
    if role == "system" and not text:
        return ""
    return LABELS[role] + (f" {text}" if text else "") + TURN_END
