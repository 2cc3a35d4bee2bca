"""The shapes that an example may have, and what is learnt of each."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ..errors import DataError
from .templates import Message, Segment, Template
from .templates.jinja import JinjaTemplate
from .tokenizer import utf8

# Field of a conversation → its keys for role and content, and the names of the roles
CONVERSATIONS: Mapping[str, tuple[str, str, dict[str, str]]] = MappingProxyType(
    {
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
)
ALPACA = ("instruction", "output")  # before `text`, since there are files in which that is both of them in a form
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("prompt", "completions"))
SHAPES = (("messages",), ("conversations",), ALPACA, ("text",), *PAIRS)
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHT = "weight"
JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true/false",
    type(None): "null",
    int: "a number",
    float: "a number",
}
MOST_NAMES = 12


def segments_of(
    value: dict[str, Any] | str, fields: tuple[str, str] | None, template: Template, every_turn: bool = False
) -> list[list[Segment]]:
    """The examples in `value`, each as segments: one, but for `completions`, which has one for each answer.

    A string is a text that is learnt as it is, as is the field `text`. Else, first found first used: the two
    `fields` (prompt, response) if they are given; `messages` (role, content); `conversations` (from, value);
    `instruction`, perhaps with `input`, and `output`; `text`; `prompt` and `response`, `completion` or `completions`.
    Where a prompt or a completion is a list of messages, only the completion's answers are learnt, and of no answer
    those whose `weight` is 0. A `system` text beside a conversation or a pair comes first, and `tools` beside them are
    for Jinja files. `every_turn` says that the stop token is the user's own and ends every answer.

    Raises:
        DataError: `value` cannot be used; without the origin, which the caller knows.
    """
    if isinstance(value, str):
        examples = [_document(value, "the text")]
    elif not fields and _shape(value) == ("text",):
        examples = [_document(_text(value, "text"), "field 'text'")]
    else:
        conversations = _conversations(value, fields, template)
        tools = None if fields else _tools(value, template)
        examples = [_render(messages, template, every_turn, tools) for messages in conversations]
    for segments in examples:
        for segment in segments:
            utf8(segment.text)
    return examples


def _render(messages: list[Message], template: Template, every_turn: bool, tools: list[Any] | None) -> list[Segment]:
    """The segments of a conversation, in which `tools` can be called."""
    answers = [message.learnt for message in messages if message.role == "assistant"]
    if answers and not any(answers):
        raise DataError(
            "no answer tokens: no answer is to be learnt, since all are of the prompt or have the 'weight' 0; give one "
            "the weight 1, or remove the example"
        )
    if tools and isinstance(template, JinjaTemplate):
        return template.render(messages, every_turn, tools)
    return template.render(messages, every_turn)


def _tools(value: dict[str, Any], template: Template) -> list[Any] | None:
    """The tools that a conversation may call."""
    tools = value.get("tools")
    if not isinstance(tools, list | None):
        raise DataError(f"field 'tools': got {_type(tools)}, must be a list; write it as JSON, or remove it")
    if tools and not isinstance(template, JinjaTemplate):
        raise DataError(
            f"field 'tools': the template {template.name} cannot write it; give --template a Jinja file that can, or "
            "remove it"
        )
    return tools or None


def _document(text: str, place: str) -> list[Segment]:
    if not text.strip():
        raise DataError(f"no answer tokens: {place} is empty; fill it or remove the line")
    return [Segment(text, target=True, ends=True)]


def _shape(value: dict[str, Any]) -> tuple[str, ...]:
    """The fields that make the shape of an example: those that are not null, or at least there."""
    for is_there in (lambda name: value.get(name) is not None, value.__contains__):
        for shape in SHAPES:
            if all(map(is_there, shape)):
                return shape
    pairs = ", ".join(f"{first!r} with {second!r}" for first, second in (*PAIRS, ALPACA))
    raise DataError(
        f"none of the fields 'messages', 'conversations', 'text', {pairs}: the line has {_names(value)}; say which two "
        "are prompt and response with --fields PROMPT RESPONSE"
    )


def _conversations(value: dict[str, Any], fields: tuple[str, str] | None, template: Template) -> list[list[Message]]:
    """The conversations of an example that is no plain text."""
    if fields:
        return [[*_prompt(value, fields[0], template), *_completion(value, fields[1], template)]]
    shape = _shape(value)
    system = _system(value)
    if shape[0] in CONVERSATIONS:
        found = [_messages(value[shape[0]], shape[0], template)]
    elif shape == ALPACA:
        found = [[Message("user", _instruction(value)), *_completion(value, "output", template)]]
    elif shape == ("prompt", "completions"):
        prompt = _prompt(value, "prompt", template)
        found = [[*prompt, *answer] for answer in _completions(value["completions"], template)]
    else:
        found = [[*_prompt(value, shape[0], template), *_completion(value, shape[1], template)]]
    return [_with_system(system, messages) for messages in found]


def _system(value: dict[str, Any]) -> Message | None:
    """The system text beside a conversation, if there is one."""
    text = _text(value, "system") if value.get("system") is not None else ""
    return Message("system", text, place="field 'system'") if text.strip() else None


def _with_system(system: Message | None, messages: list[Message]) -> list[Message]:
    """The messages with the system text beside them in front, unless they have the same one."""
    own = [message.content.strip() for message in messages if message.role == "system"]
    if system and any(text != system.content.strip() for text in own):
        raise DataError("has two system texts, in the field 'system' and as a message; remove one")
    return [system, *messages] if system and not own else messages


def _instruction(value: dict[str, Any]) -> str:
    """The question of an instruction with its input."""
    if value.get("history"):
        raise DataError("field 'history': is not read; write all turns in the field 'messages'")
    question = _text(value, "instruction")
    material = _text(value, "input") if value.get("input") is not None else ""
    return f"{question}\n{material}" if material else question


def _prompt(value: dict[str, Any], name: str, template: Template) -> list[Message]:
    """The messages of a prompt, a string or a list of them; an answer among them is not learnt."""
    if isinstance(value.get(name), list):
        messages = _messages(value[name], name, template, f"field {name!r}: ")
        return [replace(message, learnt=False) for message in messages]
    return [Message("user", _text(value, name), place=f"field {name!r}")]


def _completion(value: dict[str, Any], name: str, template: Template) -> list[Message]:
    """The answer to a prompt; the field `completion` may also be a list of messages."""
    if name == "completion" and isinstance(value.get(name), list):
        return _messages(value[name], name, template, f"field {name!r}: ")
    return [_answer(_text(value, name), f"field {name!r}")]


def _completions(found: Any, template: Template) -> list[list[Message]]:
    """The answers of which each makes an example with the prompt."""
    if not isinstance(found, list):
        raise DataError(f"field 'completions': got {_type(found)}, must be a list of answers; write [...] around them")
    if not found:
        raise DataError("field 'completions': got an empty list, must hold an answer; remove the line")
    completions = []
    for number, answer in enumerate(found, 1):
        place = f"completion {number}"
        if isinstance(answer, list):
            completions.append(_messages(answer, "completions", template, f"{place}: "))
        elif isinstance(answer, str):
            completions.append([_answer(answer, place)])
        else:
            raise DataError(f"{place}: got {_type(answer)}, must be a string or a list of messages; write it as text")
    return completions


def _answer(text: str, place: str) -> Message:
    """An answer, which is trained on and so must not be empty."""
    if not text.strip():
        raise DataError(f"no answer tokens: {place} is empty; fill it or remove the line")
    return Message("assistant", text, place=place)


def _text(value: dict[str, Any], name: str) -> str:
    """The string in field `name`."""
    if name not in value:
        raise DataError(
            f"no field {name!r}: the line has {_names(value)}; name two of them with --fields PROMPT RESPONSE"
        )
    if not isinstance(value[name], str):
        raise DataError(f"field {name!r}: got {_type(value[name])}, must be a string; write it as text")
    return str(value[name])


def _messages(found: Any, name: str, template: Template, where: str = "") -> list[Message]:
    """The messages in field `name`; `where` begins the place of each."""
    if not isinstance(found, list):
        raise DataError(f"field {name!r}: got {_type(found)}, must be a list of messages; write [...] around them")
    if not found:
        raise DataError(
            f"field {name!r}: got an empty list, must hold a user's and an assistant's message; remove the line"
        )
    role_key, content_key, roles = CONVERSATIONS.get(name, CONVERSATIONS["messages"])
    messages = []
    for number, message in enumerate(found, 1):
        place = f"{where}message {number}"
        if not isinstance(message, dict):
            raise DataError(
                f"{place}: got {_type(message)}, must be an object; write its {role_key!r} and {content_key!r}"
            )
        for key in (role_key, content_key):
            if key not in message and not (key == content_key and message.get("tool_calls")):
                raise DataError(f"{place}: no field {key!r}: it has {_names(message)}; rename or add the field")
        role = message[role_key]
        if not isinstance(role, str) or not (role in roles or template.any_role):
            got = repr(role) if isinstance(role, str) else _type(role)
            raise DataError(f"{place}: field {role_key!r}: got {got}, allowed are {_names(roles)}; rename or remove it")
        try:
            content = _content(message.get(content_key), bool(message.get("tool_calls")))
        except DataError as error:
            raise DataError(f"{place}: field {content_key!r}: {error}") from None
        role = roles.get(role, role)
        own = (role_key, content_key, WEIGHT)
        more = {key: field for key, field in message.items() if field is not None and key not in own}
        learnt = _is_learnt(message, role, place)
        messages.append(Message(role, content, _reasoning(message, place), learnt, more, place))
    return messages


def _is_learnt(message: dict[str, Any], role: str, place: str) -> bool:
    """Whether the weight of a message, as OpenAI's files have it, says that it is learnt, if it is an answer."""
    weight = message.get(WEIGHT)
    if weight is None:
        return True
    if type(weight) not in (int, float) or weight not in (0, 1):  # not true, which is 1 to Python
        got = reprlib.repr(weight) if type(weight) in (int, float) else _type(weight)
        raise DataError(f"{place}: field {WEIGHT!r}: got {got}, must be 0 or 1; correct or remove it")
    if weight and role != "assistant":
        raise DataError(f"{place}: field {WEIGHT!r}: got 1, but only an assistant's message is learnt; remove it")
    return bool(weight)


def _content(value: Any, may_lack: bool) -> str:
    """The text of a message: a string, or a list of text parts that belong together."""
    if isinstance(value, str):
        return value
    if value is None and may_lack:
        return ""
    if not isinstance(value, list):
        raise DataError(f"got {_type(value)}, must be a string or a list of text parts; write it as text")
    for part in value:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            got = reprlib.repr(part)
            raise DataError(f"got the part {got}, must be {{'type': 'text', 'text': '…'}}; remove what is not text")
    return "".join(part["text"] for part in value)


def _reasoning(message: dict[str, Any], place: str) -> str:
    """What a message says of its reasoning, in one of several fields."""
    found = {name: message[name] for name in REASONING if message.get(name) is not None}
    for name, text in found.items():
        if not isinstance(text, str):
            raise DataError(f"{place}: field {name!r}: got {_type(text)}, must be a string; write it as text")
    texts = {text for text in found.values() if text.strip()}
    if len(texts) > 1:
        raise DataError(f"{place}: the fields {_names(found)} differ; remove all but one")
    return texts.pop() if texts else ""


def _type(value: Any) -> str:
    """The JSON type of a value, or its Python type, for a message."""
    return JSON_TYPES.get(type(value), type(value).__name__)


def _names(names: Iterable[str]) -> str:
    """Names of fields or roles for a message; `repr` keeps odd ones on its line."""
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:MOST_NAMES]) + (", …" if len(quoted) > MOST_NAMES else "") if quoted else "none"
