"""The templates that have a name."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ...errors import DataError
from .base import Message, Segment, Template

LABELS = {"system": "System:", "user": "User:", "assistant": "Assistant:"}
TURN_END = "\n\n"
EMPTY_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
THINK, THOUGHT = "<think>", "</think>"


class NamedTemplate(Template):
    """A template whose turns are system, user and assistant; subclasses say how each is written."""

    gap = ""
    """What stands between an answer and the next turn."""

    def render(self, messages: Sequence[Message], every_turn: bool = False) -> list[Segment]:
        messages = self.checked(messages)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant" and message.learnt]
        if not answers:
            raise DataError("no answer tokens: no message is by the assistant; add its answer or remove the example")
        turns = messages[: answers[-1] + 1]
        self.check_conversation(turns)
        segments, _, _ = self._walk(turns, every_turn)
        last = segments[-1]
        segments[-1] = replace(last, text=last.text if every_turn else last.text.removesuffix(self.gap), ends=True)
        return segments

    def prompt_segments(self, messages: Sequence[Message], every_turn: bool = False) -> list[Segment]:
        segments, lead, before = self._walk(self.checked(messages), every_turn)
        return [
            *(replace(segment, target=False) for segment in segments),
            Segment(lead + self.opening(before, None), False),
        ]

    def _walk(self, messages: Sequence[Message], every_turn: bool) -> tuple[list[Segment], str, list[Message]]:
        """Two segments an answer; and what the prompt after them begins with, as text and as messages.

        The gap behind an answer is learnt as its end, unless every answer ends with the stop token.
        """
        segments: list[Segment] = []
        lead, before = "", []
        for message in messages:
            if message.role != "assistant":
                before.append(message)
                continue
            answer = self.answer(message) + ("" if every_turn else self.gap)
            segments.append(Segment(lead + self.opening(before, message), False))
            segments.append(Segment(answer, message.learnt, every_turn))
            lead, before = self.gap if every_turn else "", []
        return segments, lead, before

    def checked(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, prepared for writing. Raises `DataError` where one cannot be written."""
        return [
            self.check_message(message, message.place or f"message {number}")
            for number, message in enumerate(messages, 1)
        ]

    def check_message(self, message: Message, place: str) -> Message:
        """One message, prepared for writing."""
        if message.role not in LABELS:
            raise DataError(
                f"{place}: role {message.role!r}: allowed are {', '.join(LABELS)}; rename or remove the message"
            )
        if message.more.get("tool_calls"):
            raise DataError(
                f"{place}: has 'tool_calls', which the template {self.name} cannot write; give --template a Jinja file "
                "that can, or remove the example"
            )
        if message.role != "assistant" and message.reasoning:
            raise DataError(f"{place}: has reasoning, but is the {message.role}'s; move it to the assistant's")
        if message.role == "assistant" and not message.content.strip():
            raise DataError(f"{place}: no answer tokens: the assistant's text is empty; fill it or remove it")
        return self.check_reasoning(message, place)

    def check_reasoning(self, message: Message, place: str) -> Message:
        """Refuse reasoning, which this template has no place for."""
        if message.reasoning:
            raise DataError(
                f"{place}: has reasoning, which the template {self.name} has no place for; use --template g1-think, or "
                "remove it"
            )
        return message

    def check_conversation(self, messages: Sequence[Message]) -> None:
        """Refuse a conversation, up to its last answer, that this template has no form for."""

    @abstractmethod
    def opening(self, before: Sequence[Message], answer: Message | None) -> str:
        """The text between the last answer and this one; None is the one that a model will give."""

    @abstractmethod
    def answer(self, message: Message) -> str:
        """The text of an answer."""


class ChatTemplate(NamedTemplate):
    """RWKV's own chat form: `System: S`, `User: Q`, `Assistant: A`, with an empty line between two turns.

    An empty line therefore ends a turn: inside user and system text it is made a plain line break. An answer begins
    with the space after `Assistant:`. An empty system text is left out.
    """

    gap = TURN_END

    def __init__(self, name: str) -> None:
        self.name = name

    def opening(self, before: Sequence[Message], answer: Message | None) -> str:
        return "".join(map(_turn, before)) + LABELS["assistant"]

    def answer(self, message: Message) -> str:
        return " " + message.content.strip()


class ThinkTemplate(ChatTemplate):
    """The chat form of RWKV's G1 models with thinking: the prompt ends in `Assistant: <think`, without the `>`.

    `request` stands behind the question: " think", " think a bit" or " think a lot". A turn without reasoning in a
    conversation where others have some is written as the chat form does. Source: the model card of BlinkDL's rwkv7-g1.
    """

    def __init__(self, name: str, request: str = "") -> None:
        super().__init__(name)
        self.request = request

    def check_reasoning(self, message: Message, place: str) -> Message:
        return _thinking_apart(message, place)

    def check_conversation(self, messages: Sequence[Message]) -> None:
        if not any(message.reasoning for message in messages):
            raise DataError(
                f"no reasoning, which the template {self.name} teaches: give an answer the field 'reasoning_content', "
                "or use --template rwkv"
            )

    def opening(self, before: Sequence[Message], answer: Message | None) -> str:
        if answer and not answer.reasoning:
            return super().opening(before, answer)
        asked = max((i for i, message in enumerate(before) if message.role == "user"), default=None)
        if self.request and asked is None:
            place = answer.place if answer and answer.place else "an answer with reasoning"
            raise DataError(
                f"{place}: no user's message before it, behind which {self.request!r} would stand; add one, or use "
                "--template g1-think"
            )
        turns = (_turn(message, self.request if i == asked else "") for i, message in enumerate(before))
        return "".join(turns) + LABELS["assistant"] + " " + THINK.removesuffix(">")

    def answer(self, message: Message) -> str:
        if not message.reasoning:
            return super().answer(message)
        return f">\n{_one_paragraph(message.reasoning)}\n{THOUGHT}\n{message.content.strip()}"

    def reply(self, text: str) -> Message:
        thinking, end, answer = text.removeprefix(">").partition(THOUGHT)
        return Message("assistant", answer, thinking.strip()) if end else Message("assistant", thinking)


class FakeThinkTemplate(ChatTemplate):
    """The chat form of RWKV's G1 models with empty thinking: the prompt ends in `</think`, without the `>`."""

    def check_reasoning(self, message: Message, place: str) -> Message:
        return super().check_reasoning(_thinking_apart(message, place), place)

    def opening(self, before: Sequence[Message], answer: Message | None) -> str:
        return f"{super().opening(before, answer)} {THINK}\n{THOUGHT.removesuffix('>')}"

    def answer(self, message: Message) -> str:
        return f">\n{message.content.strip()}"

    def reply(self, text: str) -> Message:
        return Message("assistant", text.removeprefix(">"))


class InstructionTemplate(NamedTemplate):
    """The prompt of the original's instruction tuning: one question, one answer, both as they are."""

    name = "instruction"
    stop = "\x17"
    single_turn = True
    form = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{}\n\n### Response:"
    )

    def checked(self, messages: Sequence[Message]) -> list[Message]:
        return [message for message in super().checked(messages) if message.role != "system" or message.content.strip()]

    def check_conversation(self, messages: Sequence[Message]) -> None:
        roles = [message.role for message in messages]
        if roles != ["user", "assistant"]:
            raise DataError(
                f"template {self.name}: got messages of {', '.join(roles)}; must be one of the user and one of the "
                "assistant; use --template rwkv"
            )

    def prompt_segments(self, messages: Sequence[Message], every_turn: bool = False) -> list[Segment]:
        self.check_conversation([*self.checked(messages), Message("assistant", "")])
        return super().prompt_segments(messages, every_turn)

    def opening(self, before: Sequence[Message], answer: Message | None) -> str:
        return self.form.format("".join(message.content for message in before))

    def answer(self, message: Message) -> str:
        return message.content + "\n"


class RawTemplate(NamedTemplate):
    """Prompts and answers one behind the other, nothing added and nothing taken away."""

    name = "raw"

    def opening(self, before: Sequence[Message], answer: Message | None) -> str:
        return "".join(message.content for message in before)

    def answer(self, message: Message) -> str:
        return message.content


TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        "rwkv": ChatTemplate("rwkv"),
        "g1": ChatTemplate("g1"),
        "g1-think": ThinkTemplate("g1-think"),
        "g1-think-word": ThinkTemplate("g1-think-word", " think"),
        "g1-think-bit": ThinkTemplate("g1-think-bit", " think a bit"),
        "g1-think-lot": ThinkTemplate("g1-think-lot", " think a lot"),
        "g1-fake-think": FakeThinkTemplate("g1-fake-think"),
        "instruction": InstructionTemplate(),
        "raw": RawTemplate(),
    }
)


def _turn(message: Message, request: str = "") -> str:
    """A system's or user's turn with its label and the empty line that ends it; nothing for an empty system text."""
    text = _one_paragraph(message.content)
    if message.role == "system" and not text:
        return ""
    return LABELS[message.role] + (f" {text}" if text else "") + request + TURN_END


def _one_paragraph(text: str) -> str:
    """`text` without empty lines, which would end the turn."""
    return EMPTY_LINES.sub("\n", text.strip().replace("\r\n", "\n"))


def _thinking_apart(message: Message, place: str) -> Message:
    """The message with the `<think>…</think>` that its content begins with as its reasoning."""
    content = message.content.lstrip()
    if message.role != "assistant" or not content.startswith(THINK):
        return message
    thinking, end, content = content.removeprefix(THINK).partition(THOUGHT)
    if not end:
        raise DataError(f"{place}: {THINK} without {THOUGHT}; write where the thinking ends")
    if message.reasoning:
        raise DataError(f"{place}: has reasoning twice, in a field and as {THINK} in its content; remove one")
    if not content.strip():
        raise DataError(f"{place}: no answer tokens: nothing follows {THOUGHT}; write the answer or remove it")
    return replace(message, content=content, reasoning=thinking.strip())
