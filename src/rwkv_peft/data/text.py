"""JSONL files to training examples, with the file and line of everything that is wrong."""

from __future__ import annotations

import codecs
import json
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import OnBadLine
from ..errors import DataError
from .chat import Segment, render_chat, render_pair
from .tokenizer import utf8

Origin = tuple[Path, int]

# Field of the conversation → its keys for role and content, and the names of the roles.
CHAT_FORMS = {
    "messages": ("role", "content", {"system": "system", "user": "user", "assistant": "assistant"}),
    "conversations": (
        "from",
        "value",
        {
            "system": "system",
            "human": "user",
            "user": "user",
            "gpt": "assistant",
            "assistant": "assistant",
            "bot": "assistant",
        },
    ),
}
JSON_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
MOST_NAMES = 12


@dataclass
class Examples:
    """What was read: one list of segments an example."""

    items: list[list[Segment]] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    """File and line of each item; lines count from 1."""
    skipped: int = 0
    """Lines that could not be used."""


def read_examples(paths: Sequence[Path], fields: tuple[str, str] | None, on_bad_line: OnBadLine) -> Examples:
    """Read one example a line; blank lines are ignored.

    A line is a JSON object that holds, first found first used: the two `fields` (prompt, response) if they are given;
    `messages` (role, content); `conversations` (from, value); `text`, trained on as it is; `prompt` and `response`.

    Raises:
        DataError: a file that cannot be read or holds nothing; a line that cannot be used, unless `on_bad_line` is
            "skip"; no line that can be used.
    """
    examples = Examples()
    first_problem = ""
    for path in paths:
        for number, line in _lines(path):
            try:
                segments = _example(line, fields)
            except DataError as error:
                problem = f"{path}:{number}: {error}"
                if on_bad_line == "stop":
                    raise DataError(problem) from None
                first_problem = first_problem or problem
                examples.skipped += 1
            else:
                examples.items.append(segments)
                examples.origins.append((path, number))
    if not examples.items:
        raise DataError(f"{first_problem} (the first of {examples.skipped} skipped lines; no line is left)")
    return examples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line of a file that is not blank. Raises `DataError` if there is none."""
    empty = True
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.removeprefix(codecs.BOM_UTF8).rstrip() if number == 1 else raw.rstrip()
                if line:
                    empty = False
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give --data the path of a JSONL file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a directory; give --data the JSONL files in it") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give --data a file that can") from None
    if empty:
        raise DataError(f"{path}: has no lines that are not blank; write one JSON object a line")


def _example(line: bytes, fields: tuple[str, str] | None) -> list[Segment]:
    """Segments of one line. Raises `DataError` without the origin, which the caller knows."""
    item = _parse(line)
    chat_form = next((form for form in CHAT_FORMS if form in item), None)
    if fields:
        segments = _pair(item, *fields)
    elif chat_form:
        segments = render_chat(_messages(item, chat_form))
    elif "text" in item:
        segments = [Segment(_filled(item, "text"), True)]
    elif "prompt" in item and "response" in item:
        segments = _pair(item, "prompt", "response")
    else:
        raise DataError(
            f"none of the fields {_names([*CHAT_FORMS, 'text'])}: the line has {_names(item)}; say which two are "
            "prompt and response with --fields PROMPT RESPONSE"
        )
    for segment in segments:
        utf8(segment.text)
    return segments


def _parse(line: bytes) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        item = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"broken JSON at column {error.pos + 1}: {error.msg}; each line must be one whole JSON object"
        ) from None
    except (ValueError, RecursionError) as error:  # A number of more than 4300 digits; brackets thousands deep.
        raise DataError(f"broken JSON: {error}; each line must be one whole JSON object") from None
    if not isinstance(item, dict):
        raise DataError(
            f"got {_type(item)}, must be a JSON object; write one object a line, without a list around them"
        )
    return item


def _pair(item: dict[str, Any], prompt: str, response: str) -> list[Segment]:
    return render_pair(_text(item, prompt), _filled(item, response))


def _filled(item: dict[str, Any], name: str) -> str:
    """The string in field `name`, which is trained on and so must not be empty."""
    text = _text(item, name)
    if not text.strip():
        raise DataError(f"no answer tokens: field {name!r} is empty; fill it or remove the line")
    return text


def _text(item: dict[str, Any], name: str) -> str:
    """The string in field `name`."""
    if name not in item:
        raise DataError(
            f"no field {name!r}: the line has {_names(item)}; name two of them with --fields PROMPT RESPONSE"
        )
    if not isinstance(item[name], str):
        raise DataError(f"field {name!r}: got {_type(item[name])}, must be a string; write it as text")
    return str(item[name])


def _messages(item: dict[str, Any], form: str) -> list[tuple[str, str]]:
    """(role, content) of each message in field `form`, the roles as `render_chat` knows them."""
    role_key, content_key, roles = CHAT_FORMS[form]
    if not isinstance(item[form], list):
        raise DataError(f"field {form!r}: got {_type(item[form])}, must be a list of messages; write [...] around them")
    if not item[form]:
        raise DataError(
            f"field {form!r}: got an empty list, must hold a user's and an assistant's message; remove the line"
        )
    messages = []
    for number, message in enumerate(item[form], 1):
        if not isinstance(message, dict):
            raise DataError(
                f"message {number}: got {_type(message)}, must be an object; write its {role_key!r} and {content_key!r}"
            )
        for key in (role_key, content_key):
            if key not in message:
                raise DataError(
                    f"message {number}: no field {key!r}: it has {_names(message)}; rename or add the field"
                )
        role = message[role_key]
        if not isinstance(role, str) or role not in roles:
            got = repr(role) if isinstance(role, str) else _type(role)
            raise DataError(
                f"message {number}: field {role_key!r}: got {got}, allowed are {_names(roles)}; rename or remove it"
            )
        try:
            messages.append((roles[role], _content(message[content_key])))
        except DataError as error:
            raise DataError(f"message {number}: field {content_key!r}: {error}") from None
    return messages


def _content(value: Any) -> str:
    """The text of a message: a string, or a list of text parts that belong together."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"got {_type(value)}, must be a string or a list of text parts; write it as text")
    for part in value:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            got = reprlib.repr(part)
            raise DataError(f"got the part {got}, must be {{'type': 'text', 'text': '…'}}; remove what is not text")
    return "".join(part["text"] for part in value)


def _type(value: Any) -> str:
    """The JSON type of a value, for a message."""
    return JSON_TYPES.get(type(value), "a number")


def _names(names: Iterable[str]) -> str:
    """Names of fields or roles for a message; `repr` keeps odd ones on its line."""
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:MOST_NAMES]) + (", …" if len(quoted) > MOST_NAMES else "") if quoted else "none"
