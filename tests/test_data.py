"""The data room: text ↔ ids, lines → examples → rows → batches, and the message for everything that can be wrong."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rwkv_peft.config import Overlong, TrainConfig
from rwkv_peft.data.chat import Segment, render_chat, render_pair, render_prompt
from rwkv_peft.data.masking import Encoded, encode_example
from rwkv_peft.data.sampling import (
    Counts,
    Dataset,
    collate,
    epoch_order,
    fit,
    load_dataset,
    step_batches,
    steps_per_epoch,
)
from rwkv_peft.data.text import read_examples
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import DataError

WORLD = Tokenizer.world()
BYTE = Tokenizer.byte()

HARD_TEXTS = [
    "",
    "a",
    " ",
    "Hello, world! It's 2024-01-01.",
    "  \t \n\n\r\n \r x\n\n\n\ny" + " " * 300 + "\n" * 200,
    "User: hi\n\nAssistant: hello\n\nUser:",
    "def f(x):\n\treturn {k: v for k, v in x.items()}\r\n\r\n",
    "我们来谈谈人工智能，以及RWKV。这是一个没有空格的很长的句子然后继续继续继续继续继续继续继续继续继续继续继续继续",
    "日本語のテキスト、한국어 텍스트、Русский текст, نص عربي, हिन्दी",
    "👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪 e\u0301 \u200b\u2028\ufeff\x00\x7f\x85 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaa ========================= ------------- ..........",
    "0123456789" * 20 + "deadbeef" * 20,
]

# Whitespace, letters, punctuation, CJK and emoji next to each other, where tokens compete; and everything else.
texts = st.one_of(st.text(st.sampled_from("  \n\n\r\tab.Thé,'\"=-09我们的，。👍🏽é")), st.text())


# --- chat form

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


def marked(segments: list[Segment]) -> str:
    """The text of the segments, targets in brackets."""
    return "".join(f"[{segment.text}]" if segment.target else segment.text for segment in segments)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([(USER, "Q"), (ASSISTANT, "A")], "User: Q\n\nAssistant:[ A]"),
        ([(SYSTEM, "S"), (USER, "Q"), (ASSISTANT, "A")], "System: S\n\nUser: Q\n\nAssistant:[ A]"),
        ([(SYSTEM, " "), (USER, "Q"), (ASSISTANT, "A")], "User: Q\n\nAssistant:[ A]"),
        (
            [(USER, "Q"), (ASSISTANT, "A"), (USER, "R"), (ASSISTANT, "B")],
            "User: Q\n\nAssistant:[ A\n\n]User: R\n\nAssistant:[ B]",
        ),
        ([(USER, "Q"), (ASSISTANT, "A"), (USER, "left out")], "User: Q\n\nAssistant:[ A]"),
        ([(USER, "P"), (USER, "Q"), (ASSISTANT, "A")], "User: P\n\nUser: Q\n\nAssistant:[ A]"),
        ([(ASSISTANT, "A"), (ASSISTANT, "B")], "Assistant:[ A\n\n]Assistant:[ B]"),
        ([(USER, " a\r\n\r\nb\n \t\n\n  c\nd\n"), (ASSISTANT, "A")], "User: a\nb\n  c\nd\n\nAssistant:[ A]"),
        ([(USER, "Q"), (ASSISTANT, "\n a\n\n\nb \n")], "User: Q\n\nAssistant:[ a\n\n\nb]"),
        ([(USER, ""), (ASSISTANT, "A")], "User:\n\nAssistant:[ A]"),
    ],
)
def test_render_chat(messages: list[tuple[str, str]], expected: str) -> None:
    assert marked(render_chat(messages)) == expected


def test_render_pair_and_prompt_share_the_form() -> None:
    assert render_pair("Q", "A") == [Segment("User: Q\n\nAssistant:", False), Segment(" A", True)]
    assert render_prompt([(SYSTEM, "S"), (USER, "Q\n\nQ")]) == "System: S\n\nUser: Q\nQ\n\nAssistant:"


@given(questions=st.lists(texts, min_size=1, max_size=3), answer=texts.filter(str.strip))
def test_training_sees_the_ids_that_inference_will(questions: list[str], answer: str) -> None:
    messages = [turn for question in questions for turn in ((USER, question), (ASSISTANT, answer))]
    trained = [index for segment in render_chat(messages)[:-1] for index in WORLD.encode(segment.text)]
    assert trained == WORLD.encode(render_prompt(messages[:-1]))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([(USER, "Q")], "no answer tokens"),
        ([], "no answer tokens"),
        ([(USER, "Q"), (ASSISTANT, " \n")], "message 2: no answer tokens"),
        ([(USER, "Q"), ("tool", "T")], "role 'tool': allowed are system, user, assistant"),
    ],
)
def test_chats_that_teach_nothing(messages: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(DataError) as error:
        render_chat(messages)
    assert str(error.value).startswith(message)


# --- files


def write(folder: Path, *lines: object, name: str = "d.jsonl") -> Path:
    """A file with one line for each of `lines`: text and bytes as they are, anything else as JSON."""
    path = folder / name
    raw = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(raw))
    return path


PAIR = "User: Q\n\nAssistant:[ A]"
CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
SHARED = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


@pytest.mark.parametrize(
    ("line", "fields", "expected"),
    [
        ({"text": " T\n\nU "}, None, "[ T\n\nU ]"),
        ({"messages": CHAT}, None, f"System: S\n\n{PAIR}"),
        ({"messages": [CHAT[1], {"role": "assistant", "content": [{"type": "text", "text": t} for t in "AB"]}]}, None,
         "User: Q\n\nAssistant:[ AB]"),
        ({"conversations": SHARED}, None, PAIR),
        ({"conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]}, None, PAIR),
        ({"conversations": [{"from": "system", "value": "S"}, SHARED[0], {"from": "bot", "value": "A"}]}, None,
         f"System: S\n\n{PAIR}"),
        ({"prompt": "Q", "response": "A"}, None, PAIR),
        ({"question": "Q", "answer": "A"}, ("question", "answer"), PAIR),
        ({"text": "T", "messages": CHAT, "q": "Q", "a": "A"}, ("q", "a"), PAIR),
        ({"prompt": "P", "response": "R", "text": "T"}, None, "[T]"),
        ({"text": "T", "conversations": SHARED}, None, PAIR),
        ({"text": "\u2028\x85 stays on its line"}, None, "[\u2028\x85 stays on its line]"),
    ],
)  # fmt: skip
def test_forms_of_a_line(tmp_path: Path, line: object, fields: tuple[str, str] | None, expected: str) -> None:
    examples = read_examples([write(tmp_path, json.dumps(line, ensure_ascii=False))], fields, "stop")
    assert [marked(item) for item in examples.items] == [expected]


def test_blank_lines_bom_and_origins(tmp_path: Path) -> None:
    first = write(tmp_path, b'\xef\xbb\xbf{"text": "a"}\r', " ", '{"text": "b"}', "", name="1.jsonl")
    second = write(tmp_path, {"text": "c"}, name="2.jsonl")
    examples = read_examples([first, second], None, "stop")
    assert [item[0].text for item in examples.items] == ["a", "b", "c"]
    assert (examples.origins, examples.skipped) == ([(first, 1), (first, 3), (second, 1)], 0)


def messages(*roles: str) -> dict[str, object]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


BAD_LINES: list[tuple[object, str]] = [
    ('{"text": "a" "b"}', "broken JSON at column 14: Expecting ',' delimiter; each line must be one whole JSON object"),
    ('{"text": "a"', "broken JSON at column 13: Expecting ',' delimiter"),
    ("[" * 100_000, "broken JSON: "),
    ('{"text": ' + "1" * 5000 + "}", "broken JSON: "),
    (b'{"text": "\xff"}', "not UTF-8 (byte 0xff at byte 11 of the line); save the file as UTF-8"),
    (["a"], "got a list, must be a JSON object"),
    (3.5, "got a number, must be a JSON object"),
    (None, "got null, must be a JSON object"),
    ({"q": "Q", "ä": "A"}, "none of the fields 'messages', 'conversations', 'text': the line has 'q', 'ä'; "
                           "say which two are prompt and response with --fields PROMPT RESPONSE"),
    ({}, "none of the fields 'messages', 'conversations', 'text': the line has none;"),
    ({str(i): i for i in range(99)}, "none of the fields 'messages', 'conversations', 'text': the line has '0', '1', "
                                     "'2', '3', '4', '5', '6', '7', '8', '9', '10', '11', …; say"),
    ({"text": 1}, "field 'text': got a number, must be a string"),
    ({"text": ""}, "no answer tokens: field 'text' is empty"),
    ({"text": "a\ud800"}, "lone surrogate U+D800: "),
    ({"prompt": "Q", "response": ["A"]}, "field 'response': got a list, must be a string"),
    ({"prompt": "Q", "response": " "}, "no answer tokens: field 'response' is empty"),
    ({"messages": "Q"}, "field 'messages': got a string, must be a list of messages"),
    ({"messages": []}, "field 'messages': got an empty list"),
    ({"messages": ["Q"]}, "message 1: got a string, must be an object; write its 'role' and 'content'"),
    ({"messages": SHARED}, "message 1: no field 'role': it has 'from', 'value'"),
    (messages("user", "tool"), "message 2: field 'role': got 'tool', allowed are 'system', 'user', 'assistant'"),
    ({"messages": [{"role": None, "content": "x"}]}, "message 1: field 'role': got null, allowed are"),
    ({"messages": [{"role": "user", "content": None}]}, "message 1: field 'content': got null, must be a string or a"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "message 1: field 'content': got the part {'type': 'image_url'}, must be {'type': 'text', 'text': '…'}"),
    ({"conversations": [{"from": "robot", "value": "x"}]},
     "message 1: field 'from': got 'robot', allowed are 'system', 'human', 'user', 'gpt', 'assistant', 'bot'"),
    (messages("system", "user"), "no answer tokens: no message is by the assistant"),
    ({"messages": [CHAT[1], {"role": "assistant", "content": ""}]}, "message 2: no answer tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_stops_with_its_number_or_is_skipped(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path, {"text": "good"}, "", line)
    with pytest.raises(DataError) as error:
        read_examples([path], None, "stop")
    assert str(error.value).startswith(f"{path}:3: {message}")
    assert str(error.value).isprintable()
    examples = read_examples([path], None, "skip")
    assert (len(examples.items), examples.skipped) == (1, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"q": "Q", "text": "T"}, "no field 'a': the line has 'q', 'text'; name two of them with --fields"),
        ({"a": "A"}, "no field 'q': the line has 'a'"),
        ({"q": 1, "a": "A"}, "field 'q': got a number, must be a string"),
        ({"q": "Q", "a": ""}, "no answer tokens: field 'a' is empty"),
    ],
)
def test_bad_lines_with_named_fields(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path, line)
    with pytest.raises(DataError) as error:
        read_examples([path], ("q", "a"), "stop")
    assert str(error.value).startswith(f"{path}:1: {message}")


def test_nothing_left_quotes_the_first_problem(tmp_path: Path) -> None:
    path = write(tmp_path, "{", "[]")
    with pytest.raises(DataError) as error:
        read_examples([path], None, "skip")
    assert str(error.value).startswith(f"{path}:1: broken JSON at column 2")
    assert "first of 2 skipped lines; no line is left" in str(error.value)


@pytest.mark.parametrize("on_bad_line", ["stop", "skip"])
def test_files_that_cannot_be_used(tmp_path: Path, on_bad_line: Any) -> None:
    good, empty = write(tmp_path, {"text": "a"}), write(tmp_path, "", " \r", name="empty.jsonl")
    for path, message in (
        (tmp_path / "gone.jsonl", "no such file; "),
        (tmp_path, "is a directory; "),
        (good / "below", "cannot be read (Not a directory); "),
        (empty, "has no lines that are not blank; "),
    ):
        with pytest.raises(DataError) as error:
            read_examples([good, path], None, on_bad_line)
        assert str(error.value).startswith(f"{path}: {message}")


# --- masks


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"text": "abc"}, [("a", 0), ("b", 1), ("c", 1), ("", 1)]),
        (
            {"prompt": "Q", "response": "A"},
            [*((c, 0) for c in "User: Q\n\nAssistant:"), (" ", 1), ("A", 1), ("", 1)],
        ),
        (
            {"messages": [*CHAT, *CHAT[1:]]},
            [
                *((c, 0) for c in "System: S\n\nUser: Q\n\nAssistant:"),
                *((c, 1) for c in " A\n\n"),
                *((c, 0) for c in "User: Q\n\nAssistant:"),
                *((c, 1) for c in [" ", "A", ""]),
            ],
        ),
        ({"conversations": SHARED}, [*((c, 0) for c in "User: Q\n\nAssistant:"), (" ", 1), ("A", 1), ("", 1)]),
    ],
)
def test_targets_token_by_token(tmp_path: Path, line: object, expected: list[tuple[str, int]]) -> None:
    [segments] = read_examples([write(tmp_path, line)], None, "stop").items
    encoded = encode_example(segments, BYTE)
    assert [
        (BYTE.decode([index]), target) for index, target in zip(encoded.ids, encoded.target, strict=True)
    ] == expected
    assert (encoded.ids.dtype, encoded.target.dtype) == (np.int32, np.bool_)
    assert (encoded.inputs, encoded.targets) == (len(expected) - 1, sum(target for _, target in expected))


def test_world_targets_token_by_token() -> None:
    encoded = encode_example(render_pair("Hi there", "Fine\n\nthanks"), WORLD)
    assert [WORLD.decode([index]) for index in encoded.ids[~encoded.target]] == [
        "User", ":", " Hi", " there", "\n\n", "Ass", "istant", ":",
    ]  # fmt: skip
    assert [WORLD.decode([index]) for index in encoded.ids[encoded.target]] == [" Fine", "\n\n", "thanks", ""]


@pytest.mark.parametrize("segments", [[], [Segment("Q", False)], [Segment("Q", False), Segment("", True)]])
def test_an_example_without_targets(segments: list[Segment]) -> None:
    with pytest.raises(DataError, match=r"^no answer tokens: "):
        encode_example(segments, BYTE)


# --- rows

masks = st.lists(st.booleans(), min_size=2, max_size=60).filter(lambda mask: any(mask[1:]))


def encoded_from(mask: list[bool]) -> Encoded:
    """Ids 1, 2, 3, …, so that an id tells its place."""
    return Encoded(np.arange(1, len(mask) + 1, dtype=np.int32), np.array([False, *mask[1:]]))


def predicted(rows: list[Encoded]) -> list[int]:
    """Ids that are targets, in order, as training counts them."""
    return [int(index) for row in rows for index in row.ids[1:][row.target[1:]]]


@given(mask=masks, ctx_len=st.integers(1, 20))
def test_split_predicts_every_target_once(mask: list[bool], ctx_len: int) -> None:
    encoded = encoded_from(mask)
    rows = fit(encoded, ctx_len, "split")
    assert predicted(rows) == predicted([encoded])
    assert all(1 <= row.inputs <= ctx_len and row.targets and not row.target[0] for row in rows)
    assert all((row.ids[0] - 1) % ctx_len == 0 for row in rows)


@given(mask=masks, ctx_len=st.integers(1, 20), overlong=st.sampled_from(["truncate", "drop"]))
def test_truncate_and_drop(mask: list[bool], ctx_len: int, overlong: Overlong) -> None:
    encoded = encoded_from(mask)
    rows = fit(encoded, ctx_len, overlong)
    kept = len(mask) <= ctx_len + 1 or overlong == "truncate"
    assert predicted(rows) == ([index for index in predicted([encoded]) if index <= ctx_len + 1] if kept else [])
    assert all(row.inputs <= ctx_len and row.targets for row in rows)


def test_split_rows_overlap_by_one_id() -> None:
    rows = fit(encoded_from([True] * 10), 4, "split")
    assert [row.ids.tolist() for row in rows] == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [9, 10]]
    assert all(before.ids[-1] == after.ids[0] for before, after in pairwise(rows))


LINES = [{"text": "exactly8"}, {"prompt": "a question", "response": "yes"}, {"text": "abcdefghijklmnop"}]


@pytest.mark.parametrize(
    ("overlong", "counts", "summary"),
    [
        (
            "split",
            Counts(examples=3, rows=4, tokens=32, target_tokens=29, skipped=1, overlong=2, lost=0),
            "3 examples, 4 rows, 32 tokens (29 trained on); 2 longer than --ctx-len 8: split into rows; "
            "1 bad line skipped",
        ),
        (
            "truncate",
            Counts(examples=3, rows=2, tokens=16, target_tokens=16, skipped=1, overlong=2, lost=2),
            "3 examples, 2 rows, 16 tokens (16 trained on); 2 longer than --ctx-len 8: truncated "
            "(2 lost answer tokens); 1 bad line skipped",
        ),
        (
            "drop",
            Counts(examples=3, rows=1, tokens=8, target_tokens=8, skipped=1, overlong=2, lost=2),
            "3 examples, 1 row, 8 tokens (8 trained on); 2 longer than --ctx-len 8: dropped (2 lost answer tokens); "
            "1 bad line skipped",
        ),
    ],
)
def test_the_summary_hides_no_loss(tmp_path: Path, overlong: Overlong, counts: Counts, summary: str) -> None:
    config = TrainConfig(Path("m"), [write(tmp_path, *LINES, "{")], Path("o"), ctx_len=8, overlong=overlong)
    config.on_bad_line = "skip"
    dataset = load_dataset(config, BYTE)
    assert dataset.counts == counts
    assert dataset.summary() == summary


def test_nothing_but_overlong_examples(tmp_path: Path) -> None:
    path = write(tmp_path, LINES[0])
    config = TrainConfig(Path("m"), [path], Path("o"), ctx_len=3, overlong="drop")
    with pytest.raises(DataError, match=rf"^{path}: no row is left: with --ctx-len 3 and --overlong drop, .*; use"):
        load_dataset(config, BYTE)


# --- steps


def dataset_of(n: int) -> Dataset:
    """`n` rows of 2 to 6 ids, each of its own."""
    rows = [Encoded(np.full(2 + i * 7 % 5, i + 1, np.int32), np.arange(2 + i * 7 % 5) > 0) for i in range(n)]
    return Dataset(rows, Counts(n, n, 0, 0, 0, 0, 0), 16, "split")


def rows_of(batches: list[Any]) -> list[int]:
    return [int(row) - 1 for batch in batches for row in batch.tokens[:, 0]]


@given(n=st.integers(1, 200), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_epoch_order_is_a_pure_permutation(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch).tolist()
    assert sorted(order) == list(range(n))
    epoch_order.cache_clear()
    assert epoch_order(n, seed, epoch).tolist() == order


def test_epoch_order_depends_on_seed_and_epoch() -> None:
    orders = {tuple(epoch_order(100, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert tuple(range(100)) not in orders


@pytest.mark.parametrize(("n", "micro_batch", "grad_accum"), [(1, 8, 1), (16, 8, 1), (21, 4, 2), (21, 1, 3), (5, 2, 8)])
def test_an_epoch_is_one_pass(n: int, micro_batch: int, grad_accum: int) -> None:
    dataset = dataset_of(n)
    steps = steps_per_epoch(dataset, micro_batch, grad_accum)
    epochs = []
    for epoch in range(2):
        batches = [step_batches(dataset, epoch * steps + k, micro_batch, grad_accum, seed=3) for k in range(steps)]
        assert all(len(step) <= grad_accum and all(len(b.tokens) <= micro_batch for b in step) for step in batches)
        assert [len(rows_of(step)) for step in batches[:-1]] == [micro_batch * grad_accum] * (steps - 1)
        epochs.append([rows_of(step) for step in batches])
        assert sorted(row for step in epochs[-1] for row in step) == list(range(n))
    assert steps == 1 or epochs[0] != epochs[1]


def test_a_step_is_the_same_rows_however_it_is_cut() -> None:
    dataset = dataset_of(30)
    for step in range(9):
        [whole] = step_batches(dataset, step, 8, 1, seed=1)
        halves = step_batches(dataset, step, 4, 2, seed=1)
        assert rows_of([whole]) == rows_of(halves)
        assert sorted(whole.labels.tolist()) == sorted(torch.cat([half.labels for half in halves]).tolist())
        lengths = [len(dataset.rows[row].ids) for row in rows_of(halves)]
        assert lengths == sorted(lengths, reverse=True)


def test_a_step_is_a_pure_function() -> None:
    dataset = dataset_of(30)
    expected = rows_of(step_batches(dataset, 2, 4, 2, seed=1))
    step_batches(dataset, 17, 4, 2, seed=9)
    epoch_order.cache_clear()
    assert rows_of(step_batches(dataset, 2, 4, 2, seed=1)) == expected
    assert rows_of(step_batches(dataset, 2, 4, 2, seed=2)) != expected


def test_collate() -> None:
    rows = [
        Encoded(np.array([5, 6, 7, 0], np.int32), np.array([False, False, True, True])),
        Encoded(np.array([8, 9], np.int32), np.array([False, True])),
    ]
    batch = collate(rows)
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.positions.tolist() == [1, 2, 3]
    assert batch.labels.tolist() == [7, 0, 9]
    assert batch.inputs == 4
    assert {t.dtype for t in (batch.tokens, batch.positions, batch.labels)} == {torch.int64}


@given(rows=st.lists(masks, min_size=1, max_size=5))
def test_collate_keeps_every_target(rows: list[list[bool]]) -> None:
    encoded = [encoded_from(mask) for mask in rows]
    batch = collate(encoded)
    assert batch.tokens.shape == (len(rows), max(len(mask) for mask in rows) - 1)
    assert batch.labels.tolist() == predicted(encoded)
    assert (batch.tokens.flatten()[batch.positions] + 1).tolist() == batch.labels.tolist()
