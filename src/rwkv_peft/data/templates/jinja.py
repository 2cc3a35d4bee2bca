"""Templates in Jinja files, written as the chat templates of Hugging Face are."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError
from ...packages import optional
from .base import Message, Segment, Template
from .sandbox import Budget, count_steps, environment_with

# Kinds of marks in rendered text, each written as the digits of its template and one of these
STOP, START, END = "012"
MOST_OF_A_MESSAGE = 300
Part = tuple[str, bool]  # rendered text, and whether it is an answer to be learnt


def read_jinja(path: str) -> JinjaTemplate:
    """The template in the file `path`. Raises `ConfigError` if it cannot be read or compiled."""
    try:
        if not Path(path).exists():
            raise ConfigError(f"--template {path}: no such file; give the path of a Jinja file, or a template's name")
        if not Path(path).is_file():
            raise ConfigError(f"--template {path}: is no file; give the path of a Jinja file")
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"--template {path}: cannot be read ({error.strerror}); give a file that can") from None
    try:
        return JinjaTemplate(path, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"--template {path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from None


class JinjaTemplate(Template):
    """A Jinja template that is given `messages`, `tools`, `add_generation_prompt`, `bos_token` (empty) and `eos_token`.

    `eos_token` stands for the stop token. What stands between `{% generation %}` and `{% endgeneration %}` is learnt;
    without these tags an answer is what its message adds to the text before it, up to its `eos_token` if it has one.
    If no answer has one, the stop token follows the last. The template decides where the stop token stands, so
    `every_turn` changes nothing.

    The places of all these are found by marks of random digits, made anew for each object, which no text can know.
    """

    any_role = True

    def __init__(self, name: str, source: str) -> None:
        """`name` is the path of the file for messages. Raises `ConfigError` if `source` cannot be compiled."""
        self.name, self.source = name, source
        self.digits = str(secrets.randbelow(9 * 10**39) + 10**39)
        self.marks = re.compile(f"{self.digits}([{STOP}{START}{END}])")
        self.template, self.has_tags = self._compile()

    def __reduce__(self) -> tuple[type[JinjaTemplate], tuple[str, str]]:
        return JinjaTemplate, (self.name, self.source)

    def render(
        self, messages: Sequence[Message], every_turn: bool = False, tools: Sequence[Any] | None = None
    ) -> list[Segment]:
        """The segments of a conversation whose assistant may call `tools`; see `Template.render`."""
        answers = [i for i, message in enumerate(messages) if message.role == "assistant" and message.learnt]
        if not answers:
            raise DataError("no answer tokens: no message is by the assistant; add its answer or remove the example")
        turns = messages[: answers[-1] + 1]
        for number, message in enumerate(turns, 1):
            if message.role == "assistant" and not message.content.strip() and not message.more.get("tool_calls"):
                place = message.place or f"message {number}"
                raise DataError(f"{place}: no answer tokens: the assistant's text is empty; fill it or remove it")
        segments = self._segments(self._tagged(turns, tools) if self.has_tags else self._differences(turns, tools))
        while segments and not segments[-1].target:
            segments.pop()
        if not any(segment.target and segment.text for segment in segments):
            raise DataError(f"no answer tokens: {self.name} writes nothing for the answers; mend the template")
        if not any(segment.target and segment.ends for segment in segments):
            segments[-1] = replace(segments[-1], ends=True)
        return segments

    def prompt_segments(self, messages: Sequence[Message], every_turn: bool = False) -> list[Segment]:
        return [replace(segment, target=False) for segment in self._segments(self._prompt_parts(messages))]

    def _prompt_parts(self, messages: Sequence[Message]) -> list[Part]:
        """Parts of a conversation and of the prompt behind it, its answers apart as in training."""
        if self.has_tags:
            return self._tagged(messages, None, add_generation_prompt=True)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        parts = self._differences(messages[: answers[-1] + 1] if answers else [], None)
        text, done = self._text(messages, True, None), "".join(part for part, _ in parts)
        if not text.startswith(done):
            return [(text, False)]
        return [*parts, (text[len(done) :], False)]

    def _tagged(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool = False
    ) -> list[Part]:
        """Parts of a conversation whose answers stand between generation tags."""
        text, *pieces = self.marks.split(self._text(messages, add_generation_prompt, tools))
        parts: list[Part] = []
        inside = False
        for kind, piece in [*zip(pieces[::2], pieces[1::2], strict=True), (START, "")]:
            if kind == STOP:
                text += self._mark(STOP) + piece
                continue
            if inside == (kind == START):
                raise DataError(
                    f"{self.name}: a generation tag inside another, or left by break or continue; close each first"
                )
            parts.append((text, inside))
            inside, text = not inside, piece
        learnt = [message.learnt for message in messages if message.role == "assistant"]
        if all(learnt):
            return parts
        if len(learnt) != len(parts) // 2:
            raise DataError(
                f"{self.name}: {len(parts) // 2} generation tags for {len(learnt)} answers, of which some belong to "
                "the prompt; write one around each"
            )
        return [(text, inside and learnt[i // 2]) for i, (text, inside) in enumerate(parts)]

    def _differences(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> list[Part]:
        """Parts of a conversation, where an answer is what its message adds to the prompt before it."""
        parts: list[Part] = []
        done = ""
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._text(messages[:i], True, tools)
            whole = self._text(messages[: i + 1], False, tools)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise DataError(
                    f"{message.place or f'message {i + 1}'}: {self.name} writes the text before this answer otherwise "
                    "than with it, so what is learnt cannot be told; put {% generation %} and {% endgeneration %} "
                    "around the answers"
                )
            parts += [(prompt[len(done) :], False), (whole[len(prompt) :], message.learnt)]
            done = whole
        return parts

    def _segments(self, parts: Iterable[Part]) -> list[Segment]:
        """Segments of parts, whose first is a prompt: what follows the stop token of an answer is not learnt."""
        segments: list[Segment] = []
        lead = ""
        for text, learnt in parts:
            *ended, rest = text.split(self._mark(STOP))
            if learnt and (lead or not segments):
                segments.append(Segment(lead, False))
                lead = ""
            for piece in ended:
                segments.append(Segment(lead + piece, learnt, ends=True))
                lead = ""
            if not learnt or ended:
                lead += rest
            elif rest:
                segments.append(Segment(rest, True))
        return [*segments, Segment(lead, False)] if lead or not segments else segments

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Any] | None) -> str:
        """What the template makes of the messages, with marks."""
        try:
            text: str = self.template.render(
                messages=[_fields(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token="",
                eos_token=self._mark(STOP),
                tools=tools,
                documents=None,
                **Budget().functions(),
            )
        except Exception as error:  # whatever the code of a template may raise
            raise DataError(f"{self._line_of(error)}: {_one_line(error)}; mend the template or the example") from None
        rest = self.marks.sub("", text)
        if self.digits[:20] in rest or self.digits[-20:] in rest:
            raise DataError(f"{self.name}: cuts its eos_token or a generation tag apart; write them whole")
        return text

    def _mark(self, kind: str) -> str:
        return self.digits + kind

    def _line_of(self, error: Exception) -> str:
        """The file and line of the template where an error arose."""
        line, trace = None, error.__traceback__
        while trace:
            if trace.tb_frame.f_code.co_filename == self.name:
                line = trace.tb_lineno
            trace = trace.tb_next
        return f"{self.name}:{line}" if line else self.name

    def _compile(self) -> tuple[Any, bool]:
        """The compiled template, and whether it has generation tags."""
        jinja2 = optional("jinja2", "--template")
        environment = environment_with(self._mark(START), self._mark(END))
        try:
            tree = environment.parse(self.source)
            has_tags = any(node.data == self._mark(START) for node in tree.find_all(jinja2.nodes.TemplateData))
            count_steps(tree)
            code = environment.compile(tree, filename=self.name)
            return jinja2.Template.from_code(environment, code, environment.make_globals(None)), has_tags
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"--template {self.name}:{error.lineno}: {_one_line(error)}; mend the template") from None
        except Exception as error:  # what its compiler does not foresee, such as brackets thousands deep
            raise ConfigError(f"--template {self.name}: {_one_line(error)}; mend the template") from None


def _fields(message: Message) -> dict[str, Any]:
    """A message as the template sees it."""
    reasoning = {"reasoning_content": message.reasoning} if message.reasoning else {}
    return {**message.more, "role": message.role, "content": message.content, **reasoning}


def _one_line(error: Exception) -> str:
    """The text of an error for a message of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text).rstrip(".;")
    return text[:MOST_OF_A_MESSAGE] + ("…" if len(text) > MOST_OF_A_MESSAGE else "")
