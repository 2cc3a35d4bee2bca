"""Generating: the same model token by token, and what of it is shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rwkv_peft as rp
from conftest import difference, random_tokens
from rwkv_peft import chat_repl, inference
from rwkv_peft.chat_repl import Conversation, run_chat
from rwkv_peft.cli import main
from rwkv_peft.config import AdapterConfig, ChatConfig, ChatForm, SamplingConfig
from rwkv_peft.data.templates import Message, find_template
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import CheckpointError, ConfigError, DataError
from rwkv_peft.inference import Session, StopTexts, answer_all, generate, sample
from rwkv_peft.models import ModelState, Rwkv

BYTE = Tokenizer.byte()
PROMPT = "User: Hi!\n\nAssistant:"
END = BYTE.end_token


def text(pieces: Iterator[str]) -> str:
    return "".join(pieces)


@torch.no_grad()
def greedy_by_recomputation(model: Rwkv, prompt: str, count: int) -> list[int]:
    """The likeliest `count` tokens after `prompt`, up to the end token, each from the whole text anew."""
    ids: list[int] = []
    while len(ids) < count:
        logits, _ = model(torch.tensor([(BYTE.encode(prompt) or [END]) + ids]))
        token = int(logits[0, -1].argmax())
        if token == END:
            break
        ids.append(token)
    return ids


def shown(ids: list[int]) -> str:
    """What ids look like; those without a text as U+FFFD."""
    return b"".join("\ufffd".encode() if i > 256 else BYTE.decode_bytes([i]) for i in ids).decode(errors="replace")


# --- the tokens


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_the_argmax_of_the_whole_text(seed: int, load: Callable[..., Rwkv]) -> None:
    model = load(layers=3, width=128, seed=seed)
    want = greedy_by_recomputation(model, PROMPT, 30)
    assert len(set(want)) > 3
    assert text(generate(model, BYTE, PROMPT, max_tokens=30, temperature=0)) == shown(want)


def test_one_seed_one_text(load: Callable[..., Rwkv]) -> None:
    model = load()
    texts = [text(generate(model, BYTE, PROMPT, 40, top_p=1.0, seed=seed)) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    without = {text(generate(model, BYTE, PROMPT, 40, top_p=1.0)) for _ in range(4)}
    assert len(without) == 4


def test_temperature_0_needs_no_seed(load: Callable[..., Rwkv]) -> None:
    model = load()
    assert len({text(generate(model, BYTE, PROMPT, 30, temperature=0, seed=seed)) for seed in (None, 1, 2)}) == 1


def test_max_tokens(load: Callable[..., Rwkv], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "sample", lambda *args: BYTE.encode("a")[0])
    assert text(generate(load(), BYTE, PROMPT, max_tokens=7)) == "a" * 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "--max-tokens 0: must be at least 1"),
        ({"temperature": -0.1}, r"--temperature -0\.1: must be at least 0"),
        ({"top_p": 0.0}, r"--top-p 0\.0: must be above 0"),
        ({"top_p": 1.1}, r"--top-p 1\.1: must be above 0 and at most 1"),
    ],
    ids=str,
)
def test_numbers_out_of_range(arguments: dict[str, Any], message: str, load: Callable[..., Rwkv]) -> None:
    with pytest.raises(ConfigError, match=message):  # at once, not when the first piece is asked for
        generate(load(), BYTE, PROMPT, **arguments)


def test_from_a_state(load: Callable[..., Rwkv]) -> None:
    """Which stays as it is: from there, the rest of the prompt goes on as the whole would."""
    model, first = load(), "User: Hi!\n\n"
    with torch.no_grad():
        _, state = model(torch.tensor([BYTE.encode(first)]))
    before = ModelState(state.wkv.clone(), state.shift.clone())
    want = text(generate(model, BYTE, PROMPT, 20, temperature=0))
    for _ in range(2):
        assert text(generate(model, BYTE, PROMPT.removeprefix(first), 20, temperature=0, state=state)) == want
    assert torch.equal(state.wkv, before.wkv)
    assert torch.equal(state.shift, before.shift)
    assert text(generate(model, BYTE, PROMPT.removeprefix(first), 20, temperature=0)) != want


def test_an_empty_prompt_begins_a_document(load: Callable[..., Rwkv]) -> None:
    model = load()
    with torch.no_grad():
        want = int(model(torch.tensor([[END]]))[0][0, -1].argmax())
    assert text(generate(model, BYTE, "", 1, temperature=0)) == shown([want])


def test_generating_leaves_autograd_on(load: Callable[..., Rwkv]) -> None:
    for _ in generate(load(), BYTE, PROMPT, 3):
        assert torch.is_grad_enabled()


# --- sampling

PROBABILITIES = torch.tensor([0.05, 0.5, 0.15, 0.3])


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-9, {1}),
        (0.49, {1}),
        (0.51, {1, 3}),
        (0.79, {1, 3}),
        (0.81, {1, 2, 3}),
        (0.96, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_likeliest(top_p: float, kept: set[int]) -> None:
    """In the proportions that they have among one another."""
    random = torch.Generator().manual_seed(0)
    draws = torch.tensor([sample(PROBABILITIES.double().log(), 1.0, top_p, random) for _ in range(3000)])
    share = torch.bincount(draws, minlength=4) / len(draws)
    assert set(draws.tolist()) == kept
    want = torch.tensor([float(p) if i in kept else 0.0 for i, p in enumerate(PROBABILITIES)])
    torch.testing.assert_close(share, want / want.sum(), atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_or_flattens(temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    draws = torch.tensor([sample(PROBABILITIES.log(), temperature, 1.0, random) for _ in range(3000)])
    want = PROBABILITIES ** (1 / temperature)
    share = torch.bincount(draws, minlength=4) / len(draws)
    torch.testing.assert_close(share, want / want.sum(), atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [0, 1e-3])
def test_without_temperature_the_likeliest(temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    assert {sample(PROBABILITIES.log() * 50, temperature, 1.0, random) for _ in range(50)} == {1}


# --- what is shown


@pytest.fixture
def script(load: Callable[..., Rwkv], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The pieces shown of a model that writes just these tokens: `script(ids, stop=…)`."""
    model = load(vocab_size=300)

    def pieces(ids: list[int], **arguments: Any) -> list[str]:
        left = iter(ids)
        monkeypatch.setattr(inference, "sample", lambda *args: next(left))
        return list(generate(model, BYTE, PROMPT, max_tokens=len(ids), **arguments))

    return pieces


@pytest.mark.parametrize(
    ("written", "stop", "want"),
    [
        ("Hello\n\nUser: more", ["\n\nUser:"], "Hello"),
        ("Hello\n\nUs all", ["\n\nUser:"], "Hello\n\nUs all"),
        ("Hello\n\nUser", ["\n\nUser:"], "Hello\n\nUser"),  # the text ends within what may have been a stop
        ("a\n\n\nUser: b", ["\n\nUser:"], "a\n"),
        ("\n\nUser:", ["\n\nUser:"], ""),
        ("one, two; three", [";", ","], "one"),
        ("héé👍 stop", ["👍"], "héé"),
        ("no stop", [""], "no stop"),
        ("ababac", ["abac"], "ab"),
    ],
)
def test_stop_texts_are_never_shown(written: str, stop: list[str], want: str, script: Callable[..., list[str]]) -> None:
    """Byte by byte, so that the stop is split over tokens wherever it can be."""
    assert "".join(script(BYTE.encode(written), stop=stop)) == want


def test_text_is_shown_as_soon_as_it_cannot_be_a_stop(script: Callable[..., list[str]]) -> None:
    pieces = [p for p in script(BYTE.encode("ab\nc\n\nd"), stop=["\n\nUser:"]) if p]
    assert pieces == ["a", "b", "\nc", "\n\nd"]


@given(st.text("ab\n", max_size=30), st.text("ab\n", min_size=1, max_size=4), st.lists(st.integers(0, 30)))
def test_one_stop_text_wherever_the_text_is_split(written: str, stop: str, cuts: list[int]) -> None:
    stops, out = StopTexts([stop]), ""
    for start, end in pairwise([0, *sorted(min(c, len(written)) for c in cuts), len(written)]):
        out += "".join(stops.feed(written[start:end]))
        if stops.reached:
            break
    assert out + stops.held == written.partition(stop)[0]
    assert stops.reached == (stop in written)


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.integers(1, 30))
def test_several_stop_texts(written: str, texts: list[str], size: int) -> None:
    stops, out = StopTexts(texts), ""
    for start in range(0, len(written), size):
        out += "".join(stops.feed(written[start : start + size]))
        if stops.reached:
            break
    out += stops.held
    assert written.startswith(out)
    assert not any(stop in out for stop in texts)
    assert stops.reached or out == written


def test_the_first_of_two_stop_texts_in_one_piece() -> None:
    stops = StopTexts([";", ","])
    assert list(stops.feed("one, two; three")) == ["one"]
    assert stops.reached


def test_characters_are_shown_whole(script: Callable[..., list[str]]) -> None:
    pieces = [p for p in script(BYTE.encode("aé我👍🏽z")) if p]
    assert pieces == ["a", "é", "我", "👍", "🏽", "z"]


@pytest.mark.parametrize(
    ("ids", "want"),
    [
        (BYTE.encode("é")[:1], "\ufffd"),  # a character that is cut off
        ([*BYTE.encode("é")[:1], *BYTE.encode("a")], "\ufffda"),
        ([*BYTE.encode("a"), 299, *BYTE.encode("b")], "a\ufffdb"),  # an id that the vocabulary leaves unused
        ([*BYTE.encode("ab"), END, *BYTE.encode("c")], "ab"),
    ],
)
def test_tokens_that_are_no_text(ids: list[int], want: str, script: Callable[..., list[str]]) -> None:
    assert "".join(script(ids)) == want


# --- several prompts, adapters, files


@pytest.mark.parametrize("vocab_size", [257, 512])
def test_answers_of_all_are_each_alone(vocab_size: int, load: Callable[..., Rwkv]) -> None:
    """Prompts of unequal length, answers that end at unequal places; of 512 ids, half have no text."""
    model = load(layers=3, width=128, vocab_size=vocab_size, seed=1)
    with torch.no_grad():
        model.head.weight[END] *= 3  # so that some answers end
    prompts = ["a", "", "User: how are you today?\n\nAssistant:", "x" * 40, "?!", "End"]
    want = [greedy_by_recomputation(model, prompt, 12) for prompt in prompts]
    assert len({len(ids) for ids in want}) > 1
    assert answer_all(model, BYTE, prompts, max_tokens=12) == [shown(ids) for ids in want]
    assert [text(generate(model, BYTE, p, 12, temperature=0)) for p in prompts] == [shown(ids) for ids in want]


def test_base_with_adapter_writes_as_the_merged_file(
    load: Callable[..., Rwkv], model_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Python and on the command line."""
    model = rp.attach_adapter(load(), AdapterConfig(rank=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.2 * torch.randn_like(p))
    rp.save_adapter(model, tmp_path / "a")
    base = model_file()
    merged = rp.merge(base, tmp_path / "a", tmp_path / "merged.safetensors")
    texts = [text(generate(m, BYTE, PROMPT, 25, temperature=0)) for m in (model, rp.load_model(merged))]
    assert texts[0] == texts[1] != text(generate(rp.load_model(base), BYTE, PROMPT, 25, temperature=0))
    common = ["--prompt", "User: Hi!\\n\\nAssistant:", "--max-tokens", "25", "--temperature", "0", "--device", "cpu"]
    for argv in (["--model", str(base), "--adapter", str(tmp_path / "a")], ["--model", str(merged)]):
        assert main(["generate", *argv, *common]) == 0
        assert capsys.readouterr().out == texts[0] + "\n"


# --- chat


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [(BYTE, 257), (Tokenizer.world(), 65536)], ids=["byte", "world"])
def test_chat_leaves_the_state_that_training_would_see(
    tokenizer: Tokenizer,
    vocab_size: int,
    load: Callable[..., Rwkv],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each segment encoded by itself, without the stop text, of which the model wrote a part."""
    model = load(layers=1, vocab_size=vocab_size)
    turns = [("user", "How are you?"), ("assistant", "Fine, thanks."), ("user", "Bye"), ("assistant", "See you")]
    answers = iter([f" {turns[1][1]} \n\nUser: I", f" {turns[3][1]}\n\nUser:"])
    session, sampling = Session(model, tokenizer), SamplingConfig(stop=(chat_repl.STOP,))
    conversation, template = Conversation(session, find_template("rwkv"), "", every_turn=False), find_template("rwkv")
    for i in (0, 2):
        left = iter(tokenizer.encode(next(answers)))
        monkeypatch.setattr(inference, "sample", lambda *args, left=left: next(left))
        conversation.ask(turns[i][1])
        assert conversation.reply(sampling).strip() == turns[i + 1][1]
        assert capsys.readouterr().out.startswith(f"Assistant: {turns[i + 1][1]}")
    conversation.ask("x")
    messages = [Message(role, content) for role, content in [*turns, ("user", "x"), ("assistant", "y")]]
    ids = [token for segment in template.render(messages)[:5] for token in tokenizer.encode(segment.text)]
    with torch.no_grad():
        logits, want = model(torch.tensor([ids]))
    assert session.state is not None and session.logits is not None
    assert difference(session.state.wkv, want.wkv) <= 1e-5
    assert difference(session.state.shift, want.shift) <= 1e-5
    assert difference(session.logits, logits[0, -1]) <= 1e-5


INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)


class Recorder:
    """A session that records what it reads, and answers as it is told."""

    def __init__(self, answers: list[str]) -> None:
        self.tokenizer, self.answers, self.model = BYTE, iter(answers), SimpleNamespace(form=ChatForm())
        self.start = self.state = ""
        self.stop_token, self.read_texts = 0, []

    def read(self, ids: list[int]) -> None:
        self.state += "".join("∅" if i == 0 else "⊠" if i == 24 else BYTE.decode([i]) for i in ids)

    def write(self, sampling: SamplingConfig) -> list[str]:
        self.read_texts.append(self.state)
        return [next(self.answers)]


@pytest.mark.parametrize(
    ("settings", "answers", "expected"),
    [
        ({}, [" A", " B"], ["User: one\n\nAssistant:", "User: one\n\nAssistant: A\n\nUser: two\n\nAssistant:"]),
        ({"stop_token": "24"}, [" A", " B"],
         ["User: one\n\nAssistant:", "User: one\n\nAssistant: A⊠\n\nUser: two\n\nAssistant:"]),
        ({"template": "g1-think"}, [">\nhm\n</think>\nA", ">"],
         ["User: one\n\nAssistant: <think",
          "User: one\n\nAssistant: <think>\nhm\n</think>\nA\n\nUser: two\n\nAssistant: <think"]),
        ({"template": "g1-fake-think"}, [">\nA", ">"],
         ["User: one\n\nAssistant: <think>\n</think",
          "User: one\n\nAssistant: <think>\n</think>\nA\n\nUser: two\n\nAssistant: <think>\n</think"]),
        ({"template": "raw"}, ["A", "B"], ["one", "oneAtwo"]),
        ({"template": "instruction"}, ["A", "B"], [INSTRUCTION.format(text) for text in ("one", "two")]),
        ({}, ["", "B"], ["User: one\n\nAssistant:", "User: one\n\nUser: two\n\nAssistant:"]),
    ],
)  # fmt: skip
def test_chat_reads_what_training_would(
    settings: dict[str, Any], answers: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, session = iter(["one", "two", "/exit"]), Recorder(answers)
    session.stop_token = int(settings.get("stop_token", 0))
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(chat_repl, "open_session", lambda config: session)
    run_chat(ChatConfig(Path("m.pth"), **settings))
    assert session.read_texts == expected


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        ("g1-think", ">\n<think> foo"), ("g1-think", ">\nR\n</think>\n<think>x</think>y"),
        ("g1-fake-think", ">\n<think>a</think>b"), ("rwkv", "\n\n"), ("rwkv", "User: x"), ("raw", " "),
    ],
)  # fmt: skip
def test_chat_survives_any_answer(template: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, session = iter(["one", "two", "three", "/exit"]), Recorder([answer] * 3)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(chat_repl, "open_session", lambda config: session)
    run_chat(ChatConfig(Path("m.pth"), template=template))
    assert len(session.read_texts) == 3
    assert "three" in session.read_texts[-1]


def test_chat_says_at_once_what_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_repl, "open_session", lambda config: Recorder([]))
    with pytest.raises(DataError, match="template instruction: got messages of system, user"):
        run_chat(ChatConfig(Path("m.pth"), template="instruction", system="S"))


def test_chat_takes_the_stop_token_of_its_template(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, session = iter(["one", "two", "/exit"]), Recorder(["A\n", "B"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(chat_repl, "open_session", lambda config: session)
    run_chat(ChatConfig(Path("m.pth"), template="instruction"))
    assert session.stop_token == 24
    assert "begun anew" not in capsys.readouterr().out
    assert all(text.startswith("Below is an ") and text.endswith("### Response:") for text in session.read_texts)
    assert [text.count("###") for text in session.read_texts] == [2, 2]  # each question by itself


JINJA = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}" \
        "{% if add_generation_prompt %}<assistant>{% endif %}"  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "User: hi\n\nAssistant:"),
        ({"template": "instruction", "stop_token": "24"}, "Below is an"),
        ({"template": "form.jinja", "special_tokens": ("<user>", "<assistant>")}, "<user>hi<assistant>"),
    ],
    ids=["rwkv", "instruction", "Jinja"],
)
def test_an_adapter_tells_chat_how_it_was_trained(
    settings: dict[str, Any],
    expected: str,
    model_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "form.jinja").write_text(JINJA)
    (tmp_path / "data.jsonl").write_text('{"prompt": "hi", "response": "ho"}\n')
    monkeypatch.chdir(tmp_path)
    base = model_file(vocab_size=300)
    run = rp.train(rp.TrainConfig(base, ["data.jsonl"], tmp_path / "run", max_steps=1, device="cpu", **settings))
    again = rp.train(
        rp.TrainConfig(base, ["data.jsonl"], tmp_path / "again", adapter=run.result, max_steps=1, device="cpu")
    )
    forms = [json.loads((result / "rwkv_peft.json").read_text()).get("form") for result in (run.result, again.result)]
    assert forms[0] == forms[1]  # going on takes it up
    (tmp_path / "form.jinja").unlink()  # the folder has what it needs
    sessions: list[Conversation] = []
    lines = iter(["hi", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(Conversation, "reply", lambda self, sampling: sessions.append(self))
    run_chat(ChatConfig(base, adapter=(run.result,), device="cpu"))
    [conversation] = sessions
    text = "".join(segment.text for segment in conversation.segments)
    assert text.startswith(expected)
    assert conversation.session.stop_token == int(settings.get("stop_token", 0))
    if "special_tokens" in settings:
        assert conversation.session.tokenizer.encode(text) == [257, *BYTE.encode("hi"), 258]


TAGGED = """{% for m in messages %}<{{ m.role }}>{% if m.role == "assistant" %}{% generation %}{{ m.content }}\
{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}""".replace("\\\n", "")


@pytest.mark.parametrize("source", [JINJA, TAGGED], ids=["plain", "tagged"])
def test_chat_with_a_jinja_file(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads what training would, answers by themselves, and prints no more than the answers."""
    (tmp_path / "form.jinja").write_text(source)
    lines, session = iter(["one", "two", "/exit"]), Recorder(["A", "B"])
    pieces: list[str] = []
    monkeypatch.setattr(session, "read", lambda ids: (pieces.append(BYTE.decode(ids)), Recorder.read(session, ids)))
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(chat_repl, "open_session", lambda config: session)
    run_chat(ChatConfig(Path("m.pth"), template=str(tmp_path / "form.jinja")))
    assert session.read_texts == ["<user>one<assistant>", "<user>one<assistant>A∅<user>two<assistant>"]
    assert pieces == ["<user>one<assistant>", "A", "<user>two<assistant>"]  # nothing twice
    assert "<user>" not in capsys.readouterr().out


@pytest.mark.parametrize("form", [[], {"template": 3}, {"special_tokens": "a"}, {"other": "a"}, {"stop_token": [1]}])
def test_a_damaged_form(form: object, model_file: Callable[..., Path], tmp_path: Path) -> None:
    model = rp.attach_adapter(rp.load_model(model_file()), AdapterConfig(rank=2))
    rp.save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "rwkv_peft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"form": form}))
    with pytest.raises(CheckpointError, match="the entry form is damaged"):
        rp.load_adapter(rp.load_model(model_file()), tmp_path / "adapter")


def test_chat_in_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The system text before the first turn, and again after /reset; blank lines are nothing."""
    lines, session = iter(["one", "", "  two ", "/reset", "three", "/exit", "never"]), Recorder([" A", " B", " C"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(chat_repl, "open_session", lambda config: session)
    run_chat(dataclasses.replace(ChatConfig(Path("m.pth")), system="Be brief."))
    first = "System: Be brief.\n\nUser: {}\n\nAssistant:".format
    assert session.read_texts == [first("one"), f"{first('one')} A\n\nUser: two\n\nAssistant:", first("three")]
    assert "begun anew" in capsys.readouterr().out


def test_chat_ends_with_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    monkeypatch.setattr(chat_repl, "open_session", lambda config: Recorder([]))
    run_chat(ChatConfig(Path("m.pth"), sampling=SamplingConfig()))


def test_a_session_reads_in_pieces(load: Callable[..., Rwkv]) -> None:
    model, ids = load(), random_tokens(257, 30).tolist()
    whole, pieces = Session(model, BYTE), Session(model, BYTE)
    whole.read(ids)
    for start, end in pairwise([0, 1, 14, 30]):
        pieces.read(ids[start:end])
    assert whole.logits is not None and pieces.logits is not None
    assert difference(pieces.logits, whole.logits) <= 1e-5


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_numbers_out_of_range_are_said(
    temperature: str, model_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = torch.load(model_file())
    tensors["head.weight"] *= 1e38
    torch.save(tensors, tmp_path / "large.pth")
    flags = ["--prompt", "a", "--temperature", temperature, "--device", "cpu"]
    assert main(["generate", "--model", str(tmp_path / "large.pth"), *flags]) == 2
    assert capsys.readouterr().err == (
        "error: the model's logits are NaN or Inf; try --dtype fp32, or without the adapter or state\n"
    )
