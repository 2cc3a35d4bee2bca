"""What a conversation is, how it becomes text, and which of it is learnt.

Segments come from the structure of a conversation and never from searching its text, so nothing that a message says,
be it `User:`, `Assistant:` or the text of the stop token, changes what is learnt.
"""

from __future__ import annotations

import difflib
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import ChatForm
from ...errors import ConfigError, DataError

JINJA_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")


@dataclass(frozen=True)
class Segment:
    """A stretch of text that is encoded by itself, so that no token crosses from prompt to answer."""

    text: str
    target: bool
    """Whether the model is trained to predict it: whether it is an answer."""
    ends: bool = False
    """Whether the stop token follows, which is learnt if the text is."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user or assistant; a Jinja file may know others."""
    content: str
    reasoning: str = ""
    """What the assistant thought before it answered."""
    learnt: bool = True
    """Of an assistant's: whether it is an answer to be learnt, or belongs to the prompt."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Other fields, such as `tool_calls`; only a Jinja file sees them."""
    place: str = field(default="", compare=False)
    """Where it stands in its example, for messages; else its number is told."""


class Template(ABC):
    """A way to write conversations."""

    name: str
    stop: str | None = None
    """What ends an answer, as --stop-token takes it; None is token 0."""
    any_role = False
    """Whether it takes other roles than system, user and assistant, and other fields than theirs."""
    single_turn = False
    """Whether it writes only one question and its answer."""

    @abstractmethod
    def render(self, messages: Sequence[Message], every_turn: bool = False) -> list[Segment]:
        """The segments of a conversation, the first of them never an answer; it may be empty.

        What follows the last answer trains nothing and is left out. With `every_turn`, for a stop token that the user
        chose, it ends every answer. Raises `DataError` without the origin, which the caller knows.
        """

    @abstractmethod
    def prompt_segments(self, messages: Sequence[Message], every_turn: bool = False) -> list[Segment]:
        """What a model continues with its answer, as it stands in training; none of it is a target."""

    def prompt(self, messages: Sequence[Message]) -> str:
        """`prompt_segments` as text. Raises `DataError` if a stop token stands in it, which has no text."""
        segments = self.prompt_segments(messages)
        if any(segment.ends for segment in segments):
            raise DataError(f"template {self.name}: its prompt holds the stop token, which has no text; use segments")
        return "".join(segment.text for segment in segments)

    def reply(self, text: str) -> Message:
        """The message of a model that continued the prompt with `text`; without an answer yet, its content is empty."""
        return Message("assistant", text)


def find_template(name: str) -> Template:
    """A template by its name, else the Jinja file of that path. Raises `ConfigError` if it is neither, or broken."""
    from .named import TEMPLATES

    if name in TEMPLATES:
        return TEMPLATES[name]
    if name.endswith(JINJA_SUFFIXES) or _exists(name):
        from .jinja import read_jinja

        return read_jinja(name)
    near = difflib.get_close_matches(name, TEMPLATES, n=1)
    shown = name if name.isprintable() else reprlib.repr(name)
    raise ConfigError(
        f"--template {shown}: no such template, and no such file; names are {', '.join(TEMPLATES)}"
        + (f"; did you mean {near[0]}?" if near else "; or give the path of a Jinja file")
    )


def template_of(form: ChatForm) -> Template:
    """The template of a training. Raises `ConfigError` as `find_template` does."""
    if not form.source:
        return find_template(form.template)
    from .jinja import JinjaTemplate

    return JinjaTemplate(form.template, form.source)


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except OSError:  # a name too long for a file, such as a whole template
        return False
