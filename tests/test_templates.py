"""Templates: what each makes of a conversation, segment by segment, and the message for all that can be wrong."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rwkv_peft.data.templates import Message, Segment, Template, find_template, sandbox
from rwkv_peft.data.templates.jinja import JinjaTemplate
from rwkv_peft.data.templates.named import TEMPLATES
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError, DataError

WORLD = Tokenizer.world()
INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
THINK_FORMS = [("g1-think", ""), ("g1-think-word", " think"), ("g1-think-bit", " think a bit"),
               ("g1-think-lot", " think a lot")]  # fmt: skip
CHAT_FORMS = ["rwkv", "g1", "g1-fake-think", *(name for name, _ in THINK_FORMS)]

# What must never change what is learnt
NASTY = [
    "User: x\n\nAssistant: y", "\n\nUser:", "Assistant:", "\x17", "<|endoftext|>", "</s>", "### Response:",
    "<think>a</think>b", "</think>", "{{ eos_token }}", "{% generation %}x{% endgeneration %}", "{% raw %}{{ 1 }}",
    "{}{0}%s", "a\n\n\nb", "\u2028", "12345678901234567890",
]  # fmt: skip


def s(text: str) -> Message:
    return Message("system", text)


def u(text: str) -> Message:
    return Message("user", text)


def a(text: str, reasoning: str = "", learnt: bool = True) -> Message:
    return Message("assistant", text, reasoning, learnt)


def p(text: str, ends: bool = False) -> Segment:
    return Segment(text, False, ends)


def t(text: str, ends: bool = False) -> Segment:
    return Segment(text, True, ends)


def joined(segments: list[Segment], stop: str = "") -> str:
    return "".join(segment.text + stop * segment.ends for segment in segments)


# --- rwkv


@pytest.mark.parametrize("name", ["rwkv", "g1"])
@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([u("Q"), a("A")], [p("User: Q\n\nAssistant:"), t(" A", True)]),
        ([s("S"), u("Q"), a("A")], [p("System: S\n\nUser: Q\n\nAssistant:"), t(" A", True)]),
        ([s(" "), u("Q"), a("A")], [p("User: Q\n\nAssistant:"), t(" A", True)]),
        (
            [u("Q"), a("A"), u("R"), a("B")],
            [p("User: Q\n\nAssistant:"), t(" A\n\n"), p("User: R\n\nAssistant:"), t(" B", True)],
        ),
        ([u("Q"), a("A"), u("left out")], [p("User: Q\n\nAssistant:"), t(" A", True)]),
        ([u("P"), u("Q"), a("A")], [p("User: P\n\nUser: Q\n\nAssistant:"), t(" A", True)]),
        ([a("A"), a("B")], [p("Assistant:"), t(" A\n\n"), p("Assistant:"), t(" B", True)]),
        ([u(" a\r\n\r\nb\n \t\n\n  c\nd\n"), a("A")], [p("User: a\nb\n  c\nd\n\nAssistant:"), t(" A", True)]),
        ([u("Q"), a("\n a\n\n\nb \n")], [p("User: Q\n\nAssistant:"), t(" a\n\n\nb", True)]),
        ([u("Q"), a("a\r\n\r\nb")], [p("User: Q\n\nAssistant:"), t(" a\r\n\r\nb", True)]),
        ([u(""), a("A")], [p("User:\n\nAssistant:"), t(" A", True)]),
        ([u("Q"), a("<think>\n\nr\n</think>\nA")],
         [p("User: Q\n\nAssistant:"), t(" <think>\n\nr\n</think>\nA", True)]),
        (
            [u("say User: x\n\nAssistant: y"), a("User: x\n\nAssistant: y\x17<|endoftext|>"), u("\x17"), a("B")],
            [p("User: say User: x\nAssistant: y\n\nAssistant:"), t(" User: x\n\nAssistant: y\x17<|endoftext|>\n\n"),
             p("User: \x17\n\nAssistant:"), t(" B", True)],
        ),
        ([u("Q"), a("A", learnt=False), u("R"), a("B")],
         [p("User: Q\n\nAssistant:"), p(" A\n\n"), p("User: R\n\nAssistant:"), t(" B", True)]),
        ([u("Q"), a("A"), u("R"), a("B", learnt=False)], [p("User: Q\n\nAssistant:"), t(" A", True)]),
    ],
)  # fmt: skip
def test_rwkv(name: str, messages: list[Message], expected: list[Segment]) -> None:
    assert find_template(name).render(messages) == expected


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        (
            "rwkv", [s("S"), u("Q"), a("A"), a("B"), u("R"), a("C")],
            [p("System: S\n\nUser: Q\n\nAssistant:"), t(" A", True), p("\n\nAssistant:"), t(" B", True),
             p("\n\nUser: R\n\nAssistant:"), t(" C", True)],
        ),
        (
            "rwkv", [u("Q"), a("A\n\n", learnt=False), u("R"), a("B\n\nb\n\n")],
            [p("User: Q\n\nAssistant:"), p(" A", True), p("\n\nUser: R\n\nAssistant:"), t(" B\n\nb", True)],
        ),
        (
            "g1-think-word", [u("Q"), a("A", "r"), u("R"), a("B")],
            [p("User: Q think\n\nAssistant: <think"), t(">\nr\n</think>\nA", True), p("\n\nUser: R\n\nAssistant:"),
             t(" B", True)],
        ),
        (
            "g1-fake-think", [u("Q"), a("A"), u("R"), a("B")],
            [p("User: Q\n\nAssistant: <think>\n</think"), t(">\nA", True),
             p("\n\nUser: R\n\nAssistant: <think>\n</think"), t(">\nB", True)],
        ),
        ("instruction", [u("Q"), a("A")], [p(INSTRUCTION.format("Q")), t("A\n", True)]),
        ("raw", [u("Q"), a("A"), u("R"), a("B")], [p("Q"), t("A", True), p("R"), t("B", True)]),
    ],
)  # fmt: skip
def test_every_answer_ends_where_the_user_chose_the_stop_token(
    name: str, messages: list[Message], expected: list[Segment]
) -> None:
    assert find_template(name).render(messages, every_turn=True) == expected


# --- thinking


@pytest.mark.parametrize(("name", "request_text"), THINK_FORMS)
def test_thinking_over_several_turns(name: str, request_text: str) -> None:
    messages = [
        s("S\n\nS"),
        u("Q\n\nq"),
        a(" A\n\na ", " r\r\n\r\nr\n\n\nr "),
        u("plain"),
        a("B"),
        u("one"),
        u("two User: x\n\nAssistant: y"),
        a("<think>\nso\n\nthen\x17\n</think>\n\nC <think>kept</think>"),
        u("left out"),
    ]
    assert find_template(name).render(messages) == [
        p(f"System: S\nS\n\nUser: Q\nq{request_text}\n\nAssistant: <think"),
        t(">\nr\nr\nr\n</think>\nA\n\na\n\n"),
        p("User: plain\n\nAssistant:"),
        t(" B\n\n"),
        p(f"User: one\n\nUser: two User: x\nAssistant: y{request_text}\n\nAssistant: <think"),
        t(">\nso\nthen\x17\n</think>\nC <think>kept</think>", True),
    ]


def test_fake_thinking() -> None:
    assert find_template("g1-fake-think").render([s("S"), u("Q\n\nq"), a("A\n\na"), u("R"), a("</think> B")]) == [
        p("System: S\n\nUser: Q\nq\n\nAssistant: <think>\n</think"),
        t(">\nA\n\na\n\n"),
        p("User: R\n\nAssistant: <think>\n</think"),
        t(">\n</think> B", True),
    ]


def test_empty_thinking_is_none() -> None:
    empty = [u("Q"), a("<think>\n\n</think>\n\nA")]
    expected = [p("User: Q\n\nAssistant: <think>\n</think"), t(">\nA", True)]
    assert find_template("g1-fake-think").render(empty) == expected
    with pytest.raises(DataError, match=r"^no reasoning, which the template g1-think teaches: "):
        find_template("g1-think").render(empty)


def test_the_question_alone_asks_for_thinking() -> None:
    assert (
        find_template("g1-think-lot").render([u(""), a("A", "r")])[0].text == "User: think a lot\n\nAssistant: <think"
    )
    with pytest.raises(DataError, match=r"^an answer with reasoning: no user's message before it.* ' think' would"):
        find_template("g1-think-word").render([s("S"), a("A", "r")])
    assert find_template("g1-think").render([s("S"), a("A", "r")])[0].text == "System: S\n\nAssistant: <think"


# --- instruction and raw


@pytest.mark.parametrize("text", ["Q", " Q\n\n", "", "a\r\n\r\nb", "{} {0}", "### Response:", "\x17"])
def test_instruction_leaves_texts_as_they_are(text: str) -> None:
    template = find_template("instruction")
    assert (template.stop, template.single_turn) == ("\x17", True)
    expected = [p(INSTRUCTION.replace("{}", text)), t(f" {text}A\n\n\n", True)]
    assert template.render([s(""), u(text), a(f" {text}A\n\n"), u("left out")]) == expected
    assert template.prompt([u(text)]) == expected[0].text


def test_raw_over_several_turns() -> None:
    messages = [s("S\n\n"), u(" Q: {}"), a(" <think>r</think>A\n\n"), u("\x17User:"), u("R"), a("B \x17")]
    assert find_template("raw").render(messages) == [
        p("S\n\n Q: {}"),
        t(" <think>r</think>A\n\n"),
        p("\x17User:R"),
        t("B \x17", True),
    ]
    assert find_template("raw").render([a("A")]) == [p(""), t("A", True)]


# --- what holds for all of them

texts = st.one_of(st.sampled_from(NASTY), st.text(st.sampled_from(" \n\r\tUser:Assistant<think>/\x17{%é，")), st.text())
answers = texts.filter(lambda text: bool(text.strip()) and not text.strip().startswith("<think>"))


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None)
@given(turns=st.lists(st.tuples(texts, answers, texts.filter(str.strip)), min_size=1, max_size=3))
def test_no_content_changes_what_is_learnt(name: str, turns: list[tuple[str, str, str]]) -> None:
    template = TEMPLATES[name]
    turns = turns[:1] if name == "instruction" else turns
    thinks = name in dict(THINK_FORMS)
    messages = [m for q, answer, r in turns for m in (u(q), a(answer, r if thinks else ""))]
    segments = template.render(messages)
    assert [segment.target for segment in segments] == [False, True] * len(turns)
    assert [segment.ends for segment in segments] == [False] * (2 * len(turns) - 1) + [True]
    for segment, (_, answer, _) in zip(segments[1::2], turns, strict=True):
        assert segment.text.rstrip("\n").endswith(
            (answer if name in ("raw", "instruction") else answer.strip()).rstrip("\n")
        )
    assert template.prompt(messages[:-1]) == joined(segments[:-1])
    every = template.render(messages, every_turn=True)
    assert [segment.ends for segment in every] == [False, True] * len(turns)
    assert joined(every) == joined(segments)


@pytest.mark.parametrize("name", CHAT_FORMS)
@settings(deadline=None)
@given(questions=st.lists(texts, min_size=1, max_size=3), answer=answers)
def test_training_sees_the_ids_that_inference_will(name: str, questions: list[str], answer: str) -> None:
    template = TEMPLATES[name]
    reasoning = "r" if name in dict(THINK_FORMS) else ""
    messages = [turn for question in questions for turn in (u(question), a(answer, reasoning))]
    trained = [index for segment in template.render(messages)[:-1] for index in WORLD.encode(segment.text)]
    assert trained == WORLD.encode(template.prompt(messages[:-1]))


@pytest.mark.parametrize(
    ("name", "messages", "prompt"),
    [
        ("rwkv", [s("S"), u("Q\n\nQ")], "System: S\n\nUser: Q\nQ\n\nAssistant:"),
        ("rwkv", [], "Assistant:"),
        ("g1-think", [u("Q"), a("A", "r"), u("R")],
         "User: Q\n\nAssistant: <think>\nr\n</think>\nA\n\nUser: R\n\nAssistant: <think"),
        ("g1-think-bit", [u("Q"), a("A"), u("R")],
         "User: Q\n\nAssistant: A\n\nUser: R think a bit\n\nAssistant: <think"),
        ("g1-fake-think", [u("Q")], "User: Q\n\nAssistant: <think>\n</think"),
        ("instruction", [u("Q")], INSTRUCTION.format("Q")),
        ("raw", [u("Q "), a("A"), u(" R")], "Q A R"),
    ],
)  # fmt: skip
def test_prompts(name: str, messages: list[Message], prompt: str) -> None:
    assert find_template(name).prompt(messages) == prompt


@pytest.mark.parametrize("name", [*CHAT_FORMS, "raw"])
@given(question=texts, answer=answers)
@settings(deadline=None)
def test_a_reply_becomes_the_message_that_training_would_have(name: str, question: str, answer: str) -> None:
    template = TEMPLATES[name]
    messages = [u(question), a(answer, "r" if name in dict(THINK_FORMS) else "")]
    [prompt, target] = template.render(messages)
    assert template.prompt([u(question)]) == prompt.text
    assert template.render([u(question), template.reply(target.text)]) == [prompt, target]


def test_replies_without_an_answer() -> None:
    assert find_template("g1-think").reply(">\nr\n</think>\n") == a("\n", "r")
    assert find_template("g1-think").reply(">\ncut off") == a("\ncut off")


def test_a_prompt_with_stop_tokens_has_no_text() -> None:
    segments = find_template("rwkv").prompt_segments([u("Q"), a("A"), u("R")], every_turn=True)
    assert segments == [p("User: Q\n\nAssistant:"), p(" A", True), p("\n\nUser: R\n\nAssistant:")]


R = Message("user", "Q", "r")
CALL = Message("assistant", "A", more={"tool_calls": [{"name": "f"}]})
NO_ANSWER = "no answer tokens: no message is by the assistant; add its answer or remove the example"
NO_PLACE = "message 2: has reasoning, which the template {} has no place for; use --template g1-think, or remove it"


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        *((name, [u("Q")], NO_ANSWER) for name in TEMPLATES),
        *((name, [], NO_ANSWER) for name in TEMPLATES),
        *((name, [u("Q"), a("A", learnt=False)], NO_ANSWER) for name in TEMPLATES),
        *((name, [u("Q"), a(" \n", "r")], "message 2: no answer tokens: the assistant's text is")
          for name in TEMPLATES),
        *((name, [u("Q"), Message("tool", "T")], "message 2: role 'tool': allowed are system, user, assistant; rename")
          for name in TEMPLATES),
        *((name, [u("Q"), CALL], f"message 2: has 'tool_calls', which the template {name} cannot write; give")
          for name in TEMPLATES),
        *((name, [R, a("A")], "message 1: has reasoning, but is the user's; move it") for name in TEMPLATES),
        *((name, [u("Q"), a("A", "r")], NO_PLACE.format(name))
          for name in ("rwkv", "g1", "g1-fake-think", "instruction", "raw")),
        ("g1-fake-think", [u("Q"), a("<think>r</think>A")], NO_PLACE.format("g1-fake-think")),
        *((name, [u("Q"), a("A")], f"no reasoning, which the template {name} teaches: ") for name, _ in THINK_FORMS),
        ("g1-think", [u("Q"), a("<think>r")], "message 2: <think> without </think>; write where the thinking ends"),
        ("g1-think", [u("Q"), a("<think>r</think> \n")], "message 2: no answer tokens: nothing follows </think>;"),
        ("g1-think", [u("Q"), a("<think>r</think>A", "r")], "message 2: has reasoning twice, in a field and as"),
        ("instruction", [s("S"), u("Q"), a("A")], "template instruction: got messages of system, user, assistant; must "
         "be one of the user and one of the assistant; use --template rwkv"),
        ("instruction", [u("Q"), a("A"), u("R"), a("B")], "template instruction: got messages of user, assistant"),
        ("instruction", [a("A")], "template instruction: got messages of assistant; must"),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_written(name: str, messages: list[Message], message: str) -> None:
    with pytest.raises(DataError) as error:
        find_template(name).render(messages)
    assert str(error.value).startswith(message)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("messages", [[u("Q"), a("A"), u("R")], [s("S"), u("Q")], []])
def test_a_prompt_that_the_instruction_form_cannot_write(messages: list[Message]) -> None:
    with pytest.raises(DataError, match=r"^template instruction: got messages of "):
        find_template("instruction").prompt(messages)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("g1-thinc", "--template g1-thinc: no such template, and no such file; names are rwkv, g1, g1-think, "
         "g1-think-word, g1-think-bit, g1-think-lot, g1-fake-think, instruction, raw; did you mean g1-think?"),
        ("", "--template : no such template, and no such file; names are "),
        ("zzz", "--template zzz: no such template, and no such file; names are "),
        ("{{ x }}\n" * 400, "--template '{{ x }}\\n"),
        ("no\0", "--template 'no\\x00': no such"),
        ("gone.jinja", "--template gone.jinja: no such file; give the path of a Jinja file, or a template's name"),
        (".", "--template .: is no file; give the path of a Jinja file"),
    ],
)  # fmt: skip
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_template(name)
    assert str(error.value).startswith(message)
    assert str(error.value).isprintable()


# --- Jinja files

CHATML = """\
{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
TAGGED = """\
{{ bos_token }}{% for message in messages %}
{%- if message.role == "assistant" %}<bot>{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}|
{%- else %}<{{ message.role }}>{{ message.content }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<bot>{% endif %}
"""
PLAIN = """\
{% for m in messages %}{% if m.role == "assistant" %}A:{{ m.content }}
{% else %}Q:{{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"""


def jinja(source: str, name: str = "t.jinja") -> JinjaTemplate:
    return JinjaTemplate(name, source)


TURNS = [s("S"), u("Q"), a("A"), u("R"), a("B")]


@pytest.mark.parametrize(
    ("source", "messages", "expected"),
    [
        (
            CHATML, TURNS,
            [p("<|im_start|>system\nS", True), p("\n<|im_start|>user\nQ", True), p("\n<|im_start|>assistant\n"),
             t("A", True), p("\n<|im_start|>user\nR", True), p("\n<|im_start|>assistant\n"), t("B", True)],
        ),
        (TAGGED, TURNS, [p("<system>S<user>Q<bot>"), t("A", True), p("|<user>R<bot>"), t("B", True)]),
        (PLAIN, TURNS, [p("Q:S\nQ:Q\nA:"), t("A\n"), p("Q:R\nA:"), t("B\n", True)]),
        (PLAIN, [a("A"), a("B"), u("left out")], [p("A:"), t("A\n"), p("A:"), t("B\n", True)]),
        (PLAIN, [u("Q"), a("A", learnt=False), u("R"), a("B")], [p("Q:Q\nA:A\nQ:R\nA:"), t("B\n", True)]),
        (TAGGED, [u("Q"), a("A", learnt=False), u("R"), a("B")],
         [p("<user>Q<bot>A", True), p("|<user>R<bot>"), t("B", True)]),
        # the stop token outside the tags is not learnt, so that the last answer gets its own
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }};{% endfor %}",
         [a("A"), a("B")], [p(""), t("A"), p("", True), p(";"), t("B", True)]),
        # tags within a macro, a filter and a block of their own scope
        ("{% macro say(x) %}{% generation %}{{ x }}{% set y = 1 %}{% endgeneration %}{% endmacro %}"
         "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% continue %}{% endif %}"
         "{% filter upper %}{{ say(m.content) }}{% endfilter %}{{ eos_token }}{% break %}{% endfor %}",
         [u("q"), a("a"), a("never")], [p("q"), t("A", True)]),
        # several stop tokens in an answer, and two spans of one answer
        ("{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}!{{ eos_token }}?{% endgeneration %}"
         "-{% generation %}.{% endgeneration %}{% endfor %}", [a("A"), a("B")],
         [p(""), t("A", True), t("!", True), p("?-"), t("."), t("B", True), t("!", True), p("?-"), t(".")]),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", [u("ä<"), a("'b'")],
         [p('"ä<"'), t('"\'b\'"', True)]),
        # fields of messages, and those that are missing
        ("{% for m in messages %}{{ m.role }}{% if m.tool_calls %}{{ m.tool_calls[0].name }}{% endif %}"
         "{% if m.reasoning_content is defined %}({{ m.reasoning_content }}){% endif %}{{ m.content }}{% endfor %}"
         "{% if add_generation_prompt %}assistant{% endif %}",
         [Message("tool", "T"), a("A", "r"), Message("assistant", "", more={"tool_calls": [{"name": "f"}]})],
         [p("toolTassistant"), t("(r)A"), p("assistant"), t("f", True)]),
    ],
)  # fmt: skip
def test_jinja(source: str, messages: list[Message], expected: list[Segment]) -> None:
    template = jinja(source)
    assert template.render(messages) == expected
    assert pickle.loads(pickle.dumps(template)).render(messages) == expected


@pytest.mark.parametrize("source", [CHATML, TAGGED, PLAIN])
@settings(deadline=None)
@given(turns=st.lists(st.tuples(texts, answers), min_size=1, max_size=3))
def test_no_content_changes_what_a_jinja_file_learns(source: str, turns: list[tuple[str, str]]) -> None:
    template = jinja(source)
    messages = [m for q, answer in turns for m in (u(q), a(answer))]
    segments = template.render(messages)
    end = "\n" if source == PLAIN else ""
    assert [segment.text for segment in segments if segment.target] == [answer + end for _, answer in turns]
    assert all(not first.target or not second.target for first, second in pairwise(segments))
    assert segments[-1].target and segments[-1].ends
    assert joined(template.prompt_segments(messages[:-1]), "¶") == joined(segments[:-1], "¶")


def test_marks_cannot_be_known() -> None:
    first, second = jinja(CHATML), jinja(CHATML)
    assert first.digits != second.digits and first.digits not in repr(first.render(TURNS))
    forged = [u(second.digits + "0"), a(second.digits + "1")]
    assert [seg.text for seg in first.render(forged) if seg.target] == [forged[1].content]


def test_jinja_prompts() -> None:
    assert jinja(PLAIN).prompt([u("Q"), a("A"), u("R")]) == "Q:Q\nA:A\nQ:R\nA:"
    assert jinja(TAGGED).prompt([u("Q")]) == "<user>Q<bot>"
    assert jinja(CHATML).prompt_segments([u("Q")]) == [p("<|im_start|>user\nQ", True), p("\n<|im_start|>assistant\n")]
    with pytest.raises(DataError, match=r"^template t\.jinja: its prompt holds the stop token, which has no text; "):
        jinja(CHATML).prompt([u("Q")])


@pytest.mark.parametrize("source", [CHATML, TAGGED, PLAIN])
def test_text_and_spans_are_those_of_transformers(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [*TURNS, u("a\n\n<b>\x17"), a("c\n")]
    tags = "{% generation %}" in source
    [text], spans = render_jinja_template(
        [[{"role": m.role, "content": m.content} for m in messages]], chat_template=source, bos_token="",
        eos_token="¶", return_assistant_tokens_mask=tags,
    )  # fmt: skip
    segments = jinja(source).render(messages)
    ours = joined(segments, "¶")
    assert text.startswith(ours.removesuffix("¶") if source == PLAIN else ours)
    if tags:
        learnt = [seg.text + "¶" * seg.ends for seg in segments if seg.target]
        assert learnt == [text[start:end] for start, end in spans[0]]


LOOP = "{% for m in messages %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n{{ foo }}", "t.jinja:2: 'foo' is undefined; mend the template or the example"),
        ("\n\n{% if foo %}{% endif %}", "t.jinja:3: 'foo' is undefined;"),
        ("{{ messages[0].nam }}", "t.jinja:1: 'dict object' has no attribute 'nam';"),
        (LOOP + "\n{{ raise_exception('Roles must\n\talternate; ok?') }}{% endfor %}",
         "t.jinja:2: Roles must alternate; ok?; mend"),
        ("{{ raise_exception('') }}", "t.jinja:1: TemplateError; mend"),
        ("{{ ''.__class__.__mro__ }}", "t.jinja:1: access to attribute '__class__' of 'str' object is unsafe;"),
        ("{% if messages[0].__class__.__mro__ %}{% endif %}", "t.jinja:1: access to attribute '__class__' of 'dict'"),
        ("{{ messages.append(1) }}", "t.jinja:1: "),
        ("{% for i in range(999999999) %}{% endfor %}", "t.jinja:1: its ranges hold more than 1,000,000 numbers; mend"),
        ("\n{% for i in range(99999) %}\n{% for j in range(99999) %}{% endfor %}{% endfor %}",
         "t.jinja:3: its ranges hold more than 1,000,000 numbers; mend"),
        ("{% set r = range(99999) %}{% for i in r %}\n{% for j in r %}{% endfor %}{% endfor %}",
         "t.jinja:2: goes on for more than 1,000,000 steps of its loops and macros; mend"),
        ("{% set r = range(99999) %}{% for i in r | map('string') %}{% for j in r | map('string') %}{% endfor %}"
         "{% endfor %}", "t.jinja:1: goes on for more than 1,000,000 steps"),
        ("{% for i in 'a' * 9999 %}{% for j in 'a' * 9999 %}{% endfor %}{% endfor %}", "t.jinja:1: goes on for more"),
        ("{{ lipsum(1) }}", "t.jinja:1: 'lipsum' is undefined;"),
        ("{% for i in foo %}{% endfor %}", "t.jinja:1: 'foo' is undefined;"),
        ("{% for i in none %}{% endfor %}", "t.jinja:1: 'NoneType' object is not iterable;"),
        ("{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}", "t.jinja:1: maximum recursion depth exceeded"),
        ("{% include 'x' %}", "t.jinja:1: no loader for this environment specified;"),
        ("{{ 1 // 0 }}", "t.jinja:1: "),
        ("{{ 'a' + 1 }}", "t.jinja:1: can only concatenate str"),
        ("{{ messages[0].content | tojson(indent='x' * 3, separators=3) }}", "t.jinja:1: "),
        ("", "no answer tokens: t.jinja writes nothing for the answers; mend the template"),
        ("{% generation %}{% endgeneration %}x", "no answer tokens: t.jinja writes nothing for the answers;"),
        (LOOP + "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}{% endfor %}",
         "t.jinja: a generation tag inside another, or left by break or continue; close each first"),
        (LOOP + "{% generation %}{{ m.content }}{% continue %}{% endgeneration %}{% endfor %}",
         "t.jinja: a generation tag inside another, or left"),
        (LOOP + "{% generation %}{{ m.content }}{% break %}{% endgeneration %}{% endfor %}",
         "t.jinja: a generation tag inside another, or left"),
        ("{% set x %}{% generation %}A{% endgeneration %}{% endset %}{{ x[41:] }}", "t.jinja: a generation tag inside"),
        (LOOP + "{{ (m.content + eos_token)[:30] }}{% endfor %}", "t.jinja: cuts its eos_token or a generation tag"),
        ("{{ messages | length }}", "message 2: t.jinja writes the text before this answer otherwise than with it, so "
         "what is learnt cannot be told; put {% generation %} and {% endgeneration %} around the answers"),
        (LOOP + "{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}", "message 2: t.jinja writes the text"),
    ],
)  # fmt: skip
def test_jinja_files_that_fail(source: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        jinja(source).render(TURNS[1:])
    assert str(error.value).startswith(message)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in [1] recursive %}{{ loop([1, 1]) if loop.depth < 99 }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_what_calls_itself_comes_to_an_end(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MOST_STEPS", 9_000)
    with pytest.raises(
        DataError, match=r"^t\.jinja:1: goes on for more than 9,000 steps of its loops and macros; mend"
    ):
        jinja(source).render(TURNS[1:])


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(900) %}{% if loop.last %}{{ i }}|{{ loop.length }}{% endif %}{% endfor %}",
        "{{ range(1000000) | length }}",
        "{% for r in [range(500000), range(500000)] %}{{ r | sum }}|{% endfor %}",
        "{% macro f(n) %}{% for i in range(n) %}{{ i }}{% endfor %}{% endmacro %}{{ f(3) }}",
        "{% for m in messages | selectattr('role') %}{{ loop.length }}{{ loop.revindex }}{% else %}-{% endfor %}",
        "{% for m in messages if m.role == 'none' %}{% else %}none{% endfor %}",
        "{% for m in [[1, [2]], [3]] recursive %}{{ loop(m) if m is iterable else m }}{% endfor %}",
        "{% macro f() %}<{{ caller(1) }}>{% endmacro %}{% call(x) f() %}{{ x }}{% endcall %}",
    ],
)
def test_what_is_counted_is_written_as_jinja_does(source: str) -> None:
    plain = ImmutableSandboxedEnvironment()
    plain.globals["range"] = range
    tagged = "{% generation %}" + source + "{% endgeneration %}"
    [_, answer] = jinja(tagged).render(TURNS[1:3])
    assert answer.text == plain.from_string(source).render(messages=[{"role": "user"}, {"role": "assistant"}])


@pytest.mark.parametrize(
    "source", [TAGGED.replace("{% for", "{{ tools | tojson }}{% for", 1), "{{ tools | tojson }}" + PLAIN]
)
def test_tools_are_given_to_a_jinja_file(source: str) -> None:
    [question, *_] = jinja(source).render([u("Q"), a("A")], tools=[{"name": "f"}])
    assert question.text.startswith('[{"name": "f"}]')
    assert jinja(source).render([u("Q"), a("A")])[0].text.startswith("null")


def test_an_answer_that_later_turns_write_otherwise() -> None:
    source = LOOP + "{{ m.content if loop.last or m.role == 'user' else 'dropped' }}|{% endfor %}"
    with pytest.raises(DataError, match=r"^message 4: t\.jinja writes the text before this answer otherwise"):
        jinja(source).render(TURNS[1:])


def test_fewer_tags_than_answers_where_one_belongs_to_the_prompt() -> None:
    source = LOOP + "{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    assert jinja(source).render([u("Q"), a("A"), a("B")]) == [p(""), t("B", True)]
    with pytest.raises(
        DataError, match=r"^t\.jinja: 1 generation tags for 2 answers, of which some belong to the prom"
    ):
        jinja(source).render([u("Q"), a("A", learnt=False), a("B")])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "t.jinja:2: Expected an expression, got 'end of statement block'; mend the template"),
        ("a\n{% generation %}\n", "t.jinja:2: Unexpected end of template"),
        ("{% generatoin %}", "t.jinja:1: Encountered unknown tag 'generatoin'"),
        ("{{ x | nofilter }}", "t.jinja:1: No filter named 'nofilter'"),
        ("{{ " + "(" * 20_000 + "1", "t.jinja: "),
        ("{{ 'a", "t.jinja:1: "),
    ],
)
def test_jinja_files_that_cannot_be_compiled(source: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        jinja(source)
    assert str(error.value).startswith(f"--template {message}")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["t.jinja", "t.j2", "t.txt", "t.chat"])
def test_a_file_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode())
    template: Template = find_template(str(tmp_path / name))
    assert template.render(TURNS) == jinja(PLAIN).render(TURNS)
    assert (template.name, template.stop, template.any_role) == (str(tmp_path / name), None, True)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(b"a\nb\xff")
    with pytest.raises(ConfigError, match=r"t\.jinja:2: not UTF-8 \(byte 0xff\); save the file as UTF-8$"):
        find_template(str(tmp_path / "t.jinja"))


PIECES = ["{% generation %}", "{% endgeneration %}", "{{ eos_token }}", "{{ m.content }}", LOOP, "{% endfor %}",
          "{% if m.role == 'user' %}", "{% endif %}", "{{", "%}", "x", "\n"]  # fmt: skip


@settings(deadline=None)
@given(source=st.lists(st.sampled_from(PIECES), max_size=9))
def test_any_file_gives_segments_or_one_line(source: list[str]) -> None:
    try:
        segments = jinja("".join(source)).render(TURNS)
    except (ConfigError, DataError) as error:
        assert str(error).isprintable()
    else:
        assert not segments[0].target and segments[-1].target
        assert any(segment.ends for segment in segments if segment.target)


def test_messages_hold_any_role_and_field() -> None:
    more: dict[str, Any] = {"tool_calls": [{"name": "f"}], "name": "N"}
    source = LOOP + "{{ m.role }}{{ m.name }}{{ m.content }}{% endfor %}"
    assert jinja(source).render([Message("developer", "D", more=more), Message("assistant", "A", more=more)]) == [
        p("developerND"),
        t("assistantNA", True),
    ]
