"""The shapes that an example may have: what is learnt of each, and the message for everything that can be wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.data.examples import segments_of
from rwkv_peft.data.templates import Segment, find_template
from rwkv_peft.data.templates.jinja import JinjaTemplate
from rwkv_peft.data.templates.named import TEMPLATES
from rwkv_peft.errors import DataError

RWKV, RAW = find_template("rwkv"), find_template("raw")
LISTING = JinjaTemplate(
    "t.jinja",
    "{% for m in messages %}({{ m.role }}"
    "{% if m.tool_calls %}!{{ m.tool_calls[0] }}{% endif %}{% if m.name is defined %}={{ m.name }}{% endif %}:"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}){% endfor %}",
)


def marked(segments: list[Segment]) -> str:
    """The text of the segments, targets in brackets, ¶ for the stop token."""
    texts = [segment.text + "¶" * segment.ends for segment in segments]
    return "".join(f"[{x}]" if segment.target else x for x, segment in zip(texts, segments, strict=True))


def said(*turns: str, keys: tuple[str, str] = ("role", "content")) -> list[dict[str, Any]]:
    """Messages given as `role: content`."""
    return [dict(zip(keys, turn.split(": ", 1), strict=True)) for turn in turns]


PAIR = "User: Q\n\nAssistant:[ A¶]"
TWO = "User: Q\n\nAssistant:[ A\n\n]User: R\n\nAssistant:[ B¶]"
CHAT = said("user: Q", "assistant: A")
SHARED = said("human: Q", "gpt: A", keys=("from", "value"))


@pytest.mark.parametrize(
    ("value", "fields", "expected"),
    [
        (" T\n\nUser: U ", None, ["[ T\n\nUser: U ¶]"]),
        ({"text": " T\n\nU\x17 "}, None, ["[ T\n\nU\x17 ¶]"]),
        ("T", ("q", "a"), ["[T¶]"]),
        ({"messages": CHAT}, None, [PAIR]),
        ({"messages": said("system: S", "user: Q", "assistant: A")}, None, [f"System: S\n\n{PAIR}"]),
        ({"messages": [*CHAT, *said("user: R", "assistant: B", "user: left out")]}, None, [TWO]),
        ({"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": x} for x in "AB"]}]}, None,
         ["User: Q\n\nAssistant:[ AB¶]"]),
        ({"messages": [{**CHAT[0], "tool_calls": None, "name": "N"}, {**CHAT[1], "tool_calls": [], "reasoning": None}]},
         None, [PAIR]),
        ({"conversations": SHARED}, None, [PAIR]),
        ({"conversations": said("user: Q", "assistant: A", keys=("from", "value"))}, None, [PAIR]),
        ({"conversations": said("system: S", "human: Q", "bot: A", keys=("from", "value"))}, None,
         [f"System: S\n\n{PAIR}"]),
        ({"conversations": SHARED, "system": "S"}, None, [f"System: S\n\n{PAIR}"]),
        ({"conversations": SHARED, "system": None}, None, [PAIR]),
        ({"conversations": SHARED, "system": " "}, None, [PAIR]),
        ({"messages": said("system: S", "user: Q", "assistant: A"), "system": "S "}, None, [f"System: S\n\n{PAIR}"]),
        ({"prompt": "Q", "response": "A"}, None, [PAIR]),
        ({"prompt": "Q", "response": "A", "system": "S"}, None, [f"System: S\n\n{PAIR}"]),
        ({"prompt": "Q", "completion": "A"}, None, [PAIR]),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, None, [PAIR]),
        ({"prompt": CHAT[:1], "response": "A"}, None, [PAIR]),
        ({"prompt": "Q", "completion": [CHAT[1], *said("user: R", "assistant: B")]}, None, [TWO]),
        # an answer within the prompt is not learnt
        ({"prompt": [*CHAT, *said("user: R")], "completion": said("assistant: B")}, None,
         ["User: Q\n\nAssistant: A\n\nUser: R\n\nAssistant:[ B¶]"]),
        ({"prompt": "Q", "completions": ["A", "B", CHAT[1:]]}, None, [PAIR, PAIR.replace("A¶", "B¶"), PAIR]),
        ({"prompt": CHAT[:1], "completions": ["A"], "system": "S"}, None, [f"System: S\n\n{PAIR}"]),
        ({"instruction": "Q", "output": "A"}, None, [PAIR]),
        ({"instruction": "Q", "input": "", "output": "A", "history": []}, None, [PAIR]),
        ({"instruction": "Q", "input": None, "output": "A", "history": None}, None, [PAIR]),
        ({"instruction": "Q", "input": "I", "output": "A", "system": "S"}, None,
         ["System: S\n\nUser: Q\nI\n\nAssistant:[ A¶]"]),
        ({"question": "Q", "answer": "A"}, ("question", "answer"), [PAIR]),
        ({"question": CHAT[:1], "answer": "A"}, ("question", "answer"), [PAIR]),
        # the first found is used, and null is not found
        ({"text": "T", "messages": CHAT, "q": "Q", "a": "A"}, ("q", "a"), [PAIR]),
        ({"prompt": "P", "response": "R", "text": "T"}, None, ["[T¶]"]),
        ({"text": "T", "conversations": SHARED}, None, [PAIR]),
        ({"messages": CHAT, "conversations": said("human: R", "gpt: B", keys=("from", "value"))}, None, [PAIR]),
        ({"prompt": "Q", "completion": "A", "completions": ["B"]}, None, [PAIR]),
        ({"prompt": "P", "completion": "C", "instruction": "Q", "output": "A", "text": "T"}, None, [PAIR]),
        ({"instruction": "Q", "output": None, "text": "T"}, None, ["[T¶]"]),
        # an answer of weight 0 is not learnt
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 1}]}, None, [PAIR]),
        ({"messages": [{**CHAT[0], "weight": 0}, {**CHAT[1], "weight": None}]}, None, [PAIR]),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}, *said("user: R"), {**CHAT[1], "weight": 1.0}]}, None,
         ["User: Q\n\nAssistant: A\n\nUser: R\n\nAssistant:[ A¶]"]),
        ({"conversations": [*SHARED, *said("human: R", keys=("from", "value")), {**SHARED[1], "weight": 0.0}]}, None,
         [PAIR]),
        ({"prompt": [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[0]], "completion": "A"}, None,
         ["User: Q\n\nAssistant: A\n\nUser: Q\n\nAssistant:[ A¶]"]),
        ({"messages": CHAT, "tools": []}, None, [PAIR]),
        ({"messages": CHAT, "tools": None}, None, [PAIR]),
        ({"text": "T", "tools": [{"name": "f"}]}, None, ["[T¶]"]),
        ({"messages": None, "text": None, "prompt": "Q", "response": None, "completion": "A"}, None, [PAIR]),
    ],
)  # fmt: skip
def test_shapes(value: Any, fields: tuple[str, str] | None, expected: list[str]) -> None:
    assert [marked(segments) for segments in segments_of(value, fields, RWKV)] == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("instruction", {"instruction": "Q ", "input": " I", "output": " A"}, "\nQ \n I\n\n### Response:[ A\n¶]"),
        ("raw", {"prompt": " Q\n\n", "response": " A\n"}, " Q\n\n[ A\n¶]"),
        ("raw", {"messages": said("assistant: A")}, "[A¶]"),
        *(("g1-think", {"messages": [CHAT[0], {**CHAT[1], field: " r "}]}, "<think[>\nr\n</think>\nA¶]")
          for field in ("reasoning_content", "reasoning", "thinking")),
        ("g1-think", {"messages": [CHAT[0], {**CHAT[1], "reasoning": "r", "thinking": "r"}]}, "[>\nr\n</think>\nA¶]"),
        ("g1-think", {"prompt": "Q", "completion": "<think>r</think>A"}, "[>\nr\n</think>\nA¶]"),
        ("g1-think-bit", {"instruction": "Q", "output": "<think>r</think>A"}, "Q think a bit\n\nAssistant: <think["),
        ("g1-fake-think", {"messages": CHAT}, "</think[>\nA¶]"),
        ("rwkv", {"prompt": "Q", "completion": "<think>r</think>A"}, ":[ <think>r</think>A¶]"),
    ],
)  # fmt: skip
def test_shapes_in_other_templates(name: str, value: Any, expected: str) -> None:
    [segments] = segments_of(value, None, find_template(name))
    assert expected in marked(segments)
    assert not segments[0].target


def test_the_users_own_stop_token() -> None:
    value = {"prompt": [*CHAT, *said("user: R")], "completions": ["B", said("assistant: C", "user: T", "assistant: D")]}
    before = "User: Q\n\nAssistant: A¶\n\nUser: R\n\nAssistant:"
    assert [marked(segments) for segments in segments_of(value, None, RWKV, every_turn=True)] == [
        f"{before}[ B¶]",
        f"{before}[ C¶]\n\nUser: T\n\nAssistant:[ D¶]",
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"messages": [*said("developer: D", "tool: T"), {**CHAT[1], "name": "N", "id": None}]},
         "(developer:D)(tool:T)(assistant=N:[A¶]"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": ["f"]}, CHAT[1]]},
         "(user:Q)(assistant!f:)(assistant:[A¶]"),
        ({"messages": [CHAT[0], {"role": "assistant", "tool_calls": ["f"]}, CHAT[1]]},
         "(user:Q)(assistant!f:)(assistant:[A¶]"),
        ({"conversations": said("human: Q", "observation: O", "gpt: A", keys=("from", "value"))},
         "(user:Q)(observation:O)(assistant:[A¶]"),
    ],
)  # fmt: skip
def test_a_jinja_file_sees_every_role_and_field(value: Any, expected: str) -> None:
    [segments] = segments_of(value, None, LISTING)
    assert marked(segments) == expected


TOOLS = JinjaTemplate(
    "tools.jinja",
    "{% for tool in tools or [] %}<{{ tool.name }}>{% endfor %}{% for m in messages %}{{ m.role[0] }}:"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% if m.weight is defined %}seen{% endif %}{% endfor %}",
)


@pytest.mark.parametrize("shape", ["messages", "prompt and completion"])
def test_a_jinja_file_sees_tools_and_learns_by_weight(shape: str) -> None:
    turns = [CHAT[0], {**CHAT[1], "weight": 0}, *said("user: R", "assistant: B")]
    whole = {"messages": turns} if shape == "messages" else {"prompt": turns[:-1], "completion": turns[-1:]}
    [segments] = segments_of({**whole, "tools": [{"name": "f"}, {"name": "g"}]}, None, TOOLS)
    assert marked(segments) == "<f><g>u:Qa:Au:Ra:[B¶]"
    [segments] = segments_of(whole, None, TOOLS)
    assert marked(segments) == "u:Qa:Au:Ra:[B¶]"
    [segments] = segments_of(whole, None, LISTING)
    assert marked(segments) == "(user:Q)(assistant:A)(user:R)(assistant:[B¶]"


def messages(*roles: str) -> dict[str, object]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


NONE = (
    "none of the fields 'messages', 'conversations', 'text', 'prompt' with 'response', 'prompt' with 'completion', "
    "'prompt' with 'completions', 'instruction' with 'output': the line has {}; say which two are prompt and response "
    "with --fields PROMPT RESPONSE"
)
THINKING = [CHAT[0], {**CHAT[1], "reasoning": "r"}]
BAD: list[tuple[object, str]] = [
    ({"q": "Q", "ä": "A"}, NONE.format("'q', 'ä'")),
    ({}, NONE.format("none")),
    ({str(i): i for i in range(99)}, NONE.format("'0', '1', '2', '3', '4', '5', '6', '7', '8', '9', '10', '11', …")),
    ({"prompt": "Q", "chosen": "A"}, NONE.format("'prompt', 'chosen'")),
    ({"a\nb": 1}, NONE.format("'a\\nb'")),
    (" \n", "no answer tokens: the text is empty; fill it or remove the line"),
    ("a\ud800", "lone surrogate U+D800: "),
    ({"text": 1}, "field 'text': got a number, must be a string"),
    ({"text": b"x"}, "field 'text': got bytes, must be a string"),
    ({"text": None}, "field 'text': got null, must be a string"),
    ({"text": ""}, "no answer tokens: field 'text' is empty"),
    ({"text": "a\ud800"}, "lone surrogate U+D800: "),
    ({"prompt": "\udc00", "response": "A"}, "lone surrogate U+DC00: "),
    ({"prompt": "Q", "response": ["A"]}, "field 'response': got a list, must be a string"),
    ({"prompt": "Q", "response": " "}, "no answer tokens: field 'response' is empty"),
    ({"prompt": "Q", "response": None}, "field 'response': got null, must be a string"),
    ({"prompt": 1, "response": "A"}, "field 'prompt': got a number, must be a string"),
    ({"prompt": [], "response": "A"}, "field 'prompt': got an empty list, must hold"),
    ({"prompt": ["Q"], "response": "A"}, "field 'prompt': message 1: got a string, must be an object"),
    ({"prompt": said("tool: T"), "response": "A"}, "field 'prompt': message 1: field 'role': got 'tool', allowed are"),
    ({"prompt": "Q", "completion": ["A"]}, "field 'completion': message 1: got a string, must be an object"),
    ({"prompt": "Q", "completion": CHAT[:1]}, "no answer tokens: no message is by the assistant"),
    ({"prompt": CHAT, "completion": CHAT[:1]}, "no answer tokens: no answer is to be learnt, since all are of the"),
    ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}, "no answer tokens: no answer is to be learnt, since all are"),
    *(({"messages": [CHAT[0], {**CHAT[1], "weight": weight}]},
       f"message 2: field 'weight': got {got}, must be 0 or 1; correct or remove it")
      for weight, got in ((0.5, "0.5"), (2, "2"), (-1, "-1"), (float("nan"), "nan"), (True, "true/false"),
                          ("0", "a string"), ([], "a list"))),
    ({"messages": [{**CHAT[0], "weight": 1}, CHAT[1]]},
     "message 1: field 'weight': got 1, but only an assistant's message is learnt; remove it"),
    ({"messages": CHAT, "tools": [{"name": "f"}]},
     "field 'tools': the template rwkv cannot write it; give --template a Jinja file that can, or remove it"),
    ({"prompt": "Q", "response": "A", "tools": [{"name": "f"}]}, "field 'tools': the template rwkv cannot write it"),
    ({"messages": CHAT, "tools": "[]"}, "field 'tools': got a string, must be a list; write it as JSON, or remove it"),
    ({"prompt": "Q", "completion": said("assistant: ")}, "field 'completion': message 1: no answer tokens"),
    ({"prompt": "Q", "completions": "A"}, "field 'completions': got a string, must be a list of answers"),
    ({"prompt": "Q", "completions": []}, "field 'completions': got an empty list, must hold an answer"),
    ({"prompt": "Q", "completions": ["A", None]}, "completion 2: got null, must be a string or a list of messages"),
    ({"prompt": "Q", "completions": ["A", " "]}, "no answer tokens: completion 2 is empty"),
    ({"prompt": "Q", "completions": ["A", [{}]]}, "completion 2: message 1: no field 'role': it has none"),
    ({"instruction": "Q", "output": ""}, "no answer tokens: field 'output' is empty"),
    ({"instruction": "Q", "input": 3, "output": "A"}, "field 'input': got a number, must be a string"),
    ({"instruction": "Q", "output": "A", "history": [["q", "a"]]}, "field 'history': is not read; write all turns in"),
    ({"instruction": "Q", "output": "A", "system": ["S"]}, "field 'system': got a list, must be a string"),
    ({"messages": said("system: T", *("user: Q", "assistant: A")), "system": "S"},
     "has two system texts, in the field 'system' and as a message; remove one"),
    ({"messages": "Q"}, "field 'messages': got a string, must be a list of messages"),
    ({"messages": None}, "field 'messages': got null, must be a list of messages"),
    ({"messages": []}, "field 'messages': got an empty list"),
    ({"messages": ["Q"]}, "message 1: got a string, must be an object; write its 'role' and 'content'"),
    ({"messages": SHARED}, "message 1: no field 'role': it has 'from', 'value'"),
    ({"conversations": CHAT}, "message 1: no field 'from': it has 'role', 'content'"),
    ({"messages": [{"role": "user"}]}, "message 1: no field 'content': it has 'role'"),
    (messages("user", "tool"), "message 2: field 'role': got 'tool', allowed are 'system', 'user', 'assistant'"),
    ({"messages": [{"role": None, "content": "x"}]}, "message 1: field 'role': got null, allowed are"),
    ({"messages": [{"role": ["x"], "content": "x"}]}, "message 1: field 'role': got a list, allowed are"),
    ({"messages": [{"role": "user", "content": None}]}, "message 1: field 'content': got null, must be a string or a"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "message 1: field 'content': got the part {'type': 'image_url'}, must be {'type': 'text', 'text': '…'}"),
    ({"conversations": [{"from": "robot", "value": "x"}]},
     "message 1: field 'from': got 'robot', allowed are 'system', 'human', 'user', 'gpt', 'assistant', 'bot'"),
    (messages("system", "user"), "no answer tokens: no message is by the assistant"),
    ({"messages": said("user: Q", "assistant: ")}, "message 2: no answer tokens"),
    # the number is that of the list, whatever stands before it
    ({"conversations": said("human: Q", "gpt: ", keys=("from", "value")), "system": "S"}, "message 2: no answer"),
    ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [1]}]}, "message 2: has 'tool_calls', which the template rwkv"),
    ({"messages": THINKING, "system": "S"}, "message 2: has reasoning, which the template rwkv has no place for"),
    ({"messages": [THINKING[0], {**THINKING[1], "thinking": "s"}]},
     "message 2: the fields 'reasoning', 'thinking' differ; remove all but one"),
    ({"messages": [CHAT[0], {**CHAT[1], "reasoning": {"x": 1}}]},
     "message 2: field 'reasoning': got an object, must be a string"),
    ({"messages": [{**CHAT[0], "thinking": "r"}, CHAT[1]]}, "message 1: has reasoning, but is the user's"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), BAD)
def test_examples_that_cannot_be_used(value: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        segments_of(value, None, RWKV)
    assert str(error.value).startswith(message)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"q": "Q", "text": "T"}, "no field 'a': the line has 'q', 'text'; name two of them with --fields"),
        ({"a": "A"}, "no field 'q': the line has 'a'"),
        ({"q": 1, "a": "A"}, "field 'q': got a number, must be a string"),
        ({"q": "Q", "a": ""}, "no answer tokens: field 'a' is empty"),
        ({"q": "Q", "a": ["A"]}, "field 'a': got a list, must be a string"),
    ],
)
def test_examples_with_named_fields(value: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        segments_of(value, ("q", "a"), RWKV)
    assert str(error.value).startswith(message)


def test_a_named_completion_may_be_missing() -> None:
    with pytest.raises(DataError, match=r"^no field 'completion': the line has 'prompt'; "):
        segments_of({"prompt": "Q"}, ("prompt", "completion"), RWKV)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "assistant", "content": None}, "message 2: field 'content': got null, must be a string"),
        ({"role": None, "content": "x"}, "message 2: field 'role': got null, allowed are"),
        ({"role": "assistant", "content": ""}, "message 2: no answer tokens"),
    ],
)
def test_messages_that_no_jinja_file_sees(message: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError) as error:
        segments_of({"messages": [CHAT[0], message]}, None, LISTING)
    assert str(error.value).startswith(expected)


names = st.sampled_from(
    ["messages", "conversations", "text", "prompt", "response", "completion", "completions", "instruction", "output",
     "input", "system", "history", "role", "content", "from", "value", "reasoning", "thinking", "type", "tool_calls",
     "weight", "tools"]
)  # fmt: skip
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(
    ["user", "assistant", "system", "human", "gpt", "tool", "text", "A", "<think>r</think>A", "a\ud800"]))  # fmt: skip
message_like = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": leaves},
    optional={"reasoning": leaves, "tool_calls": leaves, "weight": leaves | st.just(0)},
)
values = st.recursive(
    leaves | st.lists(message_like, min_size=1, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(
    value=st.dictionaries(names, values, max_size=5),
    fields=st.none() | st.tuples(names, names),
    template=st.sampled_from([*TEMPLATES.values(), LISTING]),
    every_turn=st.booleans(),
)
def test_anything_gives_examples_or_one_line(value: Any, fields: Any, template: Any, every_turn: bool) -> None:
    try:
        examples = segments_of(value, fields, template, every_turn)
    except DataError as error:
        assert str(error).isprintable()
    else:
        assert examples
        for segments in examples:
            assert segments[-1].target and segments[-1].ends and "".join(segment.text for segment in segments).strip()
