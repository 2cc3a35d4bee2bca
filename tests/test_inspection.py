"""`rwkv-peft inspect`: what it tells of data, and of model, adapter and state files."""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import rwkv_peft as rp
from conftest import random_model
from rwkv_peft.checkpoint import fingerprint, write_tensors
from rwkv_peft.cli import COMMANDS, main, parse, parser
from rwkv_peft.config import AdapterConfig, InspectConfig
from rwkv_peft.data.masking import Encoded
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import CheckpointError
from rwkv_peft.inspection import run_inspect
from rwkv_peft.inspection.data import earlier, view_of
from rwkv_peft.inspection.examples import Writer, harmless, spread
from rwkv_peft.inspection.lengths import MOST_BINS, bins_of, histogram
from rwkv_peft.inspection.weights import weights_rows

BYTE = Tokenizer.byte()


class Output(io.StringIO):
    """Text that says it has an encoding."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


def told(*data: object, encoding: str = "utf-8", colour: bool = False, **settings: Any) -> str:
    """What `inspect` prints, with one token a byte unless `tokenizer` says otherwise."""
    config = InspectConfig(data=[str(path) for path in data], **{"tokenizer": "byte", **settings})
    output = Output(encoding)
    run_inspect(config, Console(file=output, force_terminal=colour, color_system="standard" if colour else None))
    return output.getvalue()


def rows(text: str) -> dict[str, list[str]]:
    """The lines of each label, up to the examples."""
    found: dict[str, list[str]] = {}
    label = ""
    for line in text.partition("\n---")[0].splitlines():
        label = line[:13].strip() or label
        found.setdefault(label, []).append(line[13:])
    return found


def write(path: Path, *values: Any) -> Path:
    """A JSONL file; a string is a line as it is."""
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="surrogatepass")
    return path


def pair(prompt: str, response: str) -> dict[str, str]:
    return {"prompt": prompt, "response": response}


# --- data


def test_counts_of_good_data(tmp_path: Path) -> None:
    """With one token a byte, every number can be told by hand: `User: q⏎⏎Assistant:` is 19 bytes and ` aaa` 4."""
    path = write(tmp_path / "d.jsonl", pair("q", "aaa"), pair("q", "aaaaaaa"), {"text": "0123456789"})
    found = rows(told(path))
    assert found["data"] == [f"{path}: 3 examples, 60 tokens"]  # 23 + 27 + 10: the last of each is only predicted
    assert found["forms"] == ["prompt + response (2), text (1)"]
    assert found["examples"] == ["3"]
    assert found["tokens"] == ["60, of which 24 (40.0%) are trained on"]  # (4+1) + (8+1) + 10
    assert found["lengths"][0] == "min 10, median 23, mean 20.0, p90 26, p99 27, max 27"
    assert found["rows"] == ["1 an epoch with --sampling pack, 5.9% full; 1 step with --micro-batch 4"]
    assert not found.keys() & {"unusable", "empty", "duplicates", "too long", "stop token", "note", "shares"}


USER = {"role": "user", "content": "q"}
PROBLEMS = {
    "broken JSON": "{broken",
    "must be a JSON object": "[1, 2]",
    "field 'text' is empty": {"text": " "},
    "field 'response' is empty": pair("q", ""),
    "the assistant's text is empty": {"messages": [USER, {"role": "assistant", "content": ""}]},
    "no message is by the assistant": {"messages": [USER]},
    "got 'wizard'": {"messages": [{"role": "wizard", "content": "q"}]},
    "none of the fields": {"foo": 1},
    "got a number, must be a string": pair("q", 5),  # type: ignore[arg-type]
    "lone surrogate": '{"text": "\\ud800"}',
}


@pytest.mark.parametrize(("message", "value"), PROBLEMS.items(), ids=PROBLEMS)
def test_a_bad_example_is_told_with_its_first_origin(tmp_path: Path, message: str, value: Any) -> None:
    path = write(tmp_path / "d.jsonl", pair("q", "a"), value, pair("q", "b"), value)
    found = rows(told(path))
    header, reason = found["unusable"]
    assert header == "2 of 4 cannot be used; the first of each kind:"
    assert reason.startswith(f"2x {path}:2: ")
    assert message in reason
    assert found["examples"] == ["2"]
    is_empty = "is empty" in message
    assert found.get("empty") == (["2 answers, among these"] if is_empty else None)


def test_five_reasons_are_told_the_most_frequent_first(tmp_path: Path) -> None:
    values = [*PROBLEMS.values()]
    path = write(tmp_path / "d.jsonl", pair("q", "a"), *values, values[5], values[5])
    header, *reasons = rows(told(path))["unusable"]
    assert header == f"{len(values) + 2} of {len(values) + 3} cannot be used; the first of each kind:"
    assert reasons[0].startswith("3x ")
    assert [reason.partition("x ")[0] for reason in reasons] == ["3", "2", "1", "1", "1", "4"]  # two are an empty field
    assert reasons[-1] == "4x of 4 other kinds"


def test_bad_examples_do_not_stop_but_a_bad_source_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write(tmp_path / "bad.jsonl", {"foo": 1}, "{")
    assert main(["inspect", str(bad)]) == 0
    shown = rows(capsys.readouterr().out)
    assert len(shown["unusable"]) == 3
    assert shown["rows"][0].startswith(f"none: {bad}:1: none of the fields")
    empty = write(tmp_path / "empty.jsonl")
    for source in (tmp_path / "missing.jsonl", empty):
        assert main(["inspect", str(source)]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert re.fullmatch(r"error: .*\n", output.err)


def test_duplicates(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *(pair("q", letter) for letter in "abcbcab"))
    assert rows(told(path))["duplicates"] == [f"4 examples (57.1%), first {path}:4, the same as {path}:2"]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=12))
def test_duplicates_are_those_of_a_plain_search(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = write(tmp_path_factory.mktemp("d") / "d.jsonl", *({"text": text} for text in texts))
    found = earlier(view_of(InspectConfig(data=[str(path)]), BYTE).data)
    assert found.tolist() == [texts.index(text) for text in texts]


@pytest.mark.parametrize(
    ("overlong", "want", "trained"),
    [
        ("split", "split into rows; nothing is lost", 41),
        ("truncate", "truncated; 15 tokens to train on (36.6%) of 1 example are lost", 26),
        ("drop", "dropped; 31 tokens to train on (75.6%) of 1 example are lost", 10),
    ],
)
def test_what_the_context_length_takes_away(tmp_path: Path, overlong: str, want: str, trained: int) -> None:
    path = write(tmp_path / "d.jsonl", {"text": "x" * 31}, {"text": "y" * 10})  # 31 and 10 targets, the end token too
    found = rows(told(path, ctx_len=16, overlong=overlong))
    assert found["too long"] == [f"1 example (50.0%) for --ctx-len 16: {want}"]
    assert found["tokens"] == [f"41, of which {trained} ({trained / 41:.1%}) are trained on"]


def test_the_stop_token_inside_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", pair("q", "a"), pair("q\x17", "a\x17b\x17"), pair("\x17", "a"))
    text = told(path, stop_token="\\x17", show=3)
    found = rows(text)
    assert found["stop token"] == [f"24 is inside the text of 2 examples, first {path}:2"]
    assert "note" not in found
    assert "Assistant:⟧ a<24>b<24><24>" in text


def test_sources_with_shares_and_split(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", *(pair("q", "a" * n) for n in range(1, 9)))
    b = write(tmp_path / "b.jsonl", *(pair("q", "b" * n) for n in range(1, 5)))
    found = rows(told(f"{a}:0.25", f"{b}:0.75", split="train[2:10]"))
    assert [line.partition(", ")[0] for line in found["data"]] == [f"{a}: 6 examples", f"{b}: 2 examples"]
    assert found["shares"] == ["25.0%, 75.0%"]
    assert found["examples"] == ["8 (--split train[2:10] of 12)"]


def write_binidx(prefix: Path, documents: list[list[int]], code: int = 8) -> None:
    letter = {8: "H", 4: "i"}[code]
    with Path(f"{prefix}.bin").open("wb") as file:
        for ids in documents:
            file.write(struct.pack(f"<{len(ids)}{letter}", *ids))
    sizes = [len(ids) for ids in documents]
    width = struct.calcsize(letter)
    pointers = [sum(sizes[:i]) * width for i in range(len(sizes))]
    n = len(sizes)
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, n, n + 1)
        + struct.pack(f"<{n}i{n}q{n + 1}q", *sizes, *pointers, *range(n + 1))
    )


@pytest.mark.parametrize(("code", "dtype"), [(8, "uint16"), (4, "int32")])
def test_binidx(tmp_path: Path, code: int, dtype: str) -> None:
    prefix = tmp_path / "data"
    write_binidx(prefix, [[66, 67, 0], [70, 70, 71, 200, 0], [66, 67, 0]], code)
    text = told(prefix, show=1)
    found = rows(text)
    assert found["data"] == [f"{prefix}: 3 documents, 8 tokens; binidx, {dtype}, largest id 200"]
    assert found["tokens"] == ["8, of which 8 (100.0%) are trained on"]
    assert found["duplicates"][0].endswith(f"first {prefix}: document 3, the same as {prefix}: document 1")
    assert text.endswith(f"\n--- {prefix}: document 1: 2 tokens, 2 trained on\n⟦A⟧B<0>\n")


def test_binidx_stays_on_the_disk(tmp_path: Path) -> None:
    write_binidx(tmp_path / "data", [[66, 67, 0]] * 4)
    view = view_of(InspectConfig(data=[str(tmp_path / "data")]), BYTE)
    assert isinstance(view.data.corpora[0].ids, np.memmap)
    assert np.shares_memory(view.data.corpora[0].ids, view.data.piece(3).ids)


def test_an_id_beyond_the_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_binidx(tmp_path / "data", [[66, 600, 0]])
    assert main(["inspect", str(tmp_path / "data"), "--tokenizer", "byte"]) == 2
    assert re.fullmatch(r"error: [^\n]*600[^\n]*\n", capsys.readouterr().err)


# --- lengths


@given(st.integers(1, 10**9), st.integers(0, 10**9))
def test_bins_hold_every_length_in_few_lines(least: int, more: int) -> None:
    edges = bins_of(least, least + more)
    assert 1 <= len(edges) - 1 <= MOST_BINS
    assert (np.diff(edges) > 0).all()
    assert edges[0] <= least < edges[1]
    assert edges[-2] <= least + more < edges[-1]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.booleans())
def test_a_histogram_counts_every_length_once(lengths: list[int], plain: bool) -> None:
    total = 0
    for line in histogram(np.array(lengths), plain):
        name, count, *bar = re.split(r" {2,}", line.strip())
        begin, _, last = name.replace(",", "").partition("-" if plain else "–")
        there = sum(int(begin) <= length <= int(last or begin) for length in lengths)
        assert int(count) == there
        assert bool(bar) == (there > 0)
        assert set("".join(bar)) <= {"#" if plain else "█"}
        total += there
    assert total == len(lengths)


def test_the_longest_bar_is_of_the_most(tmp_path: Path) -> None:
    bars = [line.count("█") for line in histogram(np.array([1] * 30 + [2] * 15 + [3]), plain=False)]
    assert bars == [40, 20, 1]


@pytest.mark.parametrize("ctx_len", [1, 4096])
def test_picture(tmp_path: Path, ctx_len: int) -> None:
    path = write(tmp_path / "d.jsonl", *({"text": "x" * n} for n in (1, 3, 200, 3000)))
    told(path, picture=tmp_path / "new" / "lengths.png", ctx_len=ctx_len)
    assert (tmp_path / "new" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_picture_must_be_png(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "d.jsonl", "--picture", "x.jpg"]) == 2
    assert capsys.readouterr().err.startswith("error: --picture x.jpg: must end in .png")


def test_a_picture_without_a_name_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "d.jsonl", {"text": "abc"})
    (tmp_path / "c.yaml").write_text('picture: "a\\0b.png"\n')
    assert main(["inspect", str(data), "--config", str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: --picture 'a\\x00b.png': is no name that a file can have; choose")


# --- examples in full


CONVERSATION = {
    "messages": [
        {"role": "user", "content": "Assistant: no"},
        {"role": "assistant", "content": "héllo 👩‍👩‍👧"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "a\tb"},
    ]
}


@pytest.mark.parametrize("tokenizer", ["byte", "world"])
@pytest.mark.parametrize(
    ("encoding", "colour", "begin", "end"),
    [("utf-8", False, "⟦", "⟧"), ("latin-1", False, "[[", "]]"), ("utf-8", True, "\x1b[90m", "\x1b[0m")],
)
def test_the_masked_part_is_set_apart(
    tmp_path: Path, tokenizer: str, encoding: str, colour: bool, begin: str, end: str
) -> None:
    text = told(
        write(tmp_path / "d.jsonl", CONVERSATION), encoding=encoding, colour=colour, tokenizer=tokenizer, show=1
    )
    shown = text.rpartition("trained on")[2].removeprefix("\x1b[0m").strip("\n")
    if colour:  # a style ends and begins anew at a line's end
        shown = shown.replace(f"{end}\n{begin}", "\n").replace(f"{end}\n\n{begin}", "\n\n")
        shown = re.sub(r" {2,}b", "\tb", shown)
    want = f"{begin}User: Assistant: no\n\nAssistant:{end} héllo 👩‍👩‍👧\n\n{begin}User: more\n\nAssistant:{end} a\tb<0>"
    assert shown == want


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=12), st.booleans()), min_size=1, max_size=6))
def test_every_byte_is_shown(parts: list[tuple[bytes, bool]]) -> None:
    ids = [token for data, _ in parts for token in BYTE.encode_bytes(data)]
    target = [learnt for data, learnt in parts for _ in data]
    output = Output()
    writer = Writer(Console(file=output, color_system=None), BYTE, {0})
    writer.marks = ("", "")
    writer.write(Encoded(np.array(ids, np.int64), np.array(target, np.bool_)))
    runs: list[tuple[bytes, bool]] = []
    for data, learnt in parts:
        if data and runs and runs[-1][1] == learnt:
            runs[-1] = (runs[-1][0] + data, learnt)
        elif data:
            runs.append((data, learnt))
    want = "".join(harmless(data.decode("utf-8", errors="backslashreplace")) for data, _ in runs)
    assert output.getvalue() == want + "\n"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a\n\tb", "a\n\tb"),
        ("\x1b[31m\x07\r\x7f\x9b", "\\x1b[31m\\x07\\r\\x7f\\x9b"),
        ("👩‍👩 ك", "👩‍👩 ك"),
        ("\u202e", "\\u202e"),
    ],
)
def test_nothing_shown_steers_the_terminal(text: str, want: str) -> None:
    assert harmless(text) == want


def test_rows_of_a_long_example_and_a_dropped_one(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"text": "abcdefgh"}, {"text": "xy"})
    assert told(path, show=2, ctx_len=5).partition("\n---")[2].splitlines() == [
        f" {path}:1, row 1 of 2: 5 tokens, 5 trained on", "⟦a⟧bcdef", "",
        f"--- {path}:1, row 2 of 2: 3 tokens, 3 trained on", "⟦f⟧gh<0>", "",
        f"--- {path}:2: 2 tokens, 2 trained on", "⟦x⟧y<0>",
    ]  # fmt: skip
    assert told(path, show=1, ctx_len=5, overlong="drop").endswith(f"--- {path}:1: 8 tokens, not trained on\n")


def test_windows_of_the_stream(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"text": "abc"}, {"text": "de"})
    shown = told(path, show=9, ctx_len=4, sampling="get").partition("\n---")[2].splitlines()
    assert shown[1::3] == ["⟦a⟧bc<0>d", "⟦d⟧e<0>"]


@pytest.mark.parametrize(
    ("count", "wanted", "want"), [(10, 3, [0, 3, 6]), (2, 5, [0, 1]), (5, 0, []), (4, 4, [0, 1, 2, 3])]
)
def test_examples_are_spread_evenly(count: int, wanted: int, want: list[int]) -> None:
    assert spread(count, wanted) == want


def test_special_tokens_are_shown_as_text(tmp_path: Path) -> None:
    text = told(write(tmp_path / "d.jsonl", {"text": "a<|x|>b"}), special_tokens=("<|x|>",), show=1)
    assert text.endswith("--- " + f"{tmp_path / 'd.jsonl'}:1: 3 tokens, 3 trained on\n⟦a⟧<|x|>b<0>\n")


# --- models, adapters and states


def weights(path: Path) -> dict[str, str]:
    return dict(weights_rows(str(path)))


@pytest.mark.parametrize(
    ("version", "title", "heads", "ranks"),
    [
        ("x070", "RWKV-7 (x070)", "2 heads of 64", "w 8, a 8, v 4, g 16"),
        ("x070a", "RWKV-7a (x070a)", "2 heads of 64", "w 8, a 8, v 4, g 16, s 32"),
        ("x060", "RWKV-6 (x060)", "4 heads of 32", "mix 4, decay 8"),
        ("x052", "RWKV-5.2 (x052)", "4 heads of 32", None),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_model(tmp_path: Path, version: str, title: str, heads: str, ranks: str | None, suffix: str) -> None:
    tensors = random_model(version, layers=2, width=128, dtype=torch.bfloat16)
    path = tmp_path / f"m{suffix}"
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    found = weights(path)
    total = sum(tensor.numel() for tensor in tensors.values())
    assert found["model"] == title
    assert (found["layers"], found["width"], found["vocabulary"]) == ("2", f"128: {heads}", "257")
    assert found["ffn"] == str(tensors["blocks.0.ffn.key.weight"].shape[0])
    assert found.get("low ranks") == ranks
    assert found["formats"] == f"bf16 ({len(tensors)} tensors)"
    assert found["parameters"].strip() == f"{total:,}"
    parts = {label.strip(): int(text.split()[0].replace(",", "")) for label, text in found.items() if label[0] == " "}
    assert parts["emb"] == parts["head"] == 257 * 128
    assert parts["att"] == sum(tensor.numel() for name, tensor in tensors.items() if ".att." in name)
    assert sum(parts.values()) == total
    assert found["size"].startswith(f"{path.stat().st_size:,} bytes (")
    assert found["fingerprint"] == fingerprint(tensors)


def test_a_model_that_cannot_be_used_is_told_before_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_model()
    del tensors["blocks.1.att.key.weight"]
    torch.save(tensors, tmp_path / "m.pth")
    assert main(["inspect", str(tmp_path / "m.pth")]) == 2
    output = capsys.readouterr()
    assert "RWKV-7 (x070), cannot be used as it is" in output.out
    assert f"fingerprint  {fingerprint(tensors)}" in output.out
    assert re.fullmatch(r"error: [^\n]*blocks\.1\.att\.key\.weight is missing[^\n]*\n", output.err)


class Code:
    """Something that would make a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_damaged_and_unknown_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(random_model(), tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 99)
    torch.save({"model.layers.0.weight": torch.zeros(2)}, tmp_path / "llama.pth")
    torch.save({"x": Code(tmp_path / "ran")}, tmp_path / "code.pth")
    torch.save({}, tmp_path / "nothing.pth")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.pth").write_bytes(data)
    for name, says in {
        "cut.pth": "is cut off or damaged", "empty.pth": "is empty", "noise.safetensors": "is cut off or no",
        "llama.pth": "holds no RWKV model", "code.pth": "which is never run", "nothing.pth": "holds no RWKV model",
        "missing.pth": "no such file", "adapter": "cannot be read", "models": "name the model file in it",
    }.items():  # fmt: skip
        assert main(["inspect", str(tmp_path / name)]) == 2, name
        output = capsys.readouterr()
        assert output.out == ""
        assert re.fullmatch(r"error: [^\n]*\n", output.err), name
        assert says in output.err, (name, output.err)
    assert not (tmp_path / "ran").exists()


ADAPTERS = {
    "lora": ({"rank": 4, "alpha": 8.0}, "lora, rank 4, alpha 8, scale 2"),
    "pissa": ({"rank": 4}, "pissa, rank 4, alpha 4, scale 1"),
    "bone": ({"rank": 8}, "bone, rank 8"),
    "state": ({}, "state: the state that every text begins with is learned"),
}


@pytest.mark.parametrize("peft", ADAPTERS)
def test_adapter_folder(load: Callable[..., Any], tmp_path: Path, peft: str) -> None:
    settings, method = ADAPTERS[peft]
    model = rp.attach_adapter(load(), AdapterConfig(peft, **settings), ["ln"])  # type: ignore[arg-type]
    rp.save_adapter(model, tmp_path / "adapter")
    found = weights(tmp_path / "adapter")
    saved = {p: torch.load(p) for p in (tmp_path / "adapter").glob("*.pth")}
    from safetensors.torch import load_file

    tensors = [t for p in (tmp_path / "adapter").glob("*.safetensors") for t in load_file(p).values()]
    tensors += [t for found_in in saved.values() for t in found_in.values()]
    assert found["adapter"] == method
    assert found["parameters"].strip() == f"{sum(t.numel() for t in tensors):,}"
    assert found["formats"] == f"fp32 ({len(tensors)} tensors)"
    assert ("targets" in found) == (peft != "state")
    if peft != "state":
        assert found["targets"].startswith("12 matrices: att.key, ")
    assert "ln (" in found["parts"]
    name = "of unknown name" if peft == "state" else "base.pth"
    assert found["base"] == f"{name}, fingerprint {model.fingerprint}"
    files = sum(p.stat().st_size for p in (tmp_path / "adapter").iterdir())
    assert files - int(found["size"].split()[0].replace(",", "")) == 0
    file = tmp_path / "adapter" / "parts.safetensors"
    assert weights(file) == {"taken for": f"the adapter in the folder {file.parent}", **found}


def test_adapter_of_the_original_program(tmp_path: Path) -> None:
    target = "blocks.0.att.key"
    tensors = {f"model.{target}.lora_A": torch.ones(4, 8), f"model.{target}.lora_B": torch.ones(8, 4)}
    torch.save(tensors, tmp_path / "rwkv-0.pth")
    found = weights(tmp_path / "rwkv-0.pth")
    assert found["taken for"] == "an adapter of the original program (RWKV-PEFT)"
    assert found["adapter"] == "lora, rank 4, alpha not told by the file"
    assert found["targets"] == "1 matrices: blocks.0.att.key"
    assert found["parameters"].strip() == "64"
    del tensors[f"model.{target}.lora_B"]
    torch.save(tensors, tmp_path / "rwkv-0.pth")
    with pytest.raises(CheckpointError, match="lora_B is missing"):
        weights(tmp_path / "rwkv-0.pth")


def test_state(tmp_path: Path) -> None:
    states = {f"blocks.{i}.att.time_state": torch.full((2, 4, 4), float(i + 1)) for i in range(10)}
    torch.save(states, tmp_path / "s.pth")
    found = weights(tmp_path / "s.pth")
    assert found["state"] == "10 layers, 2 heads of 4 by 4; token shifts zero"
    assert "row = value index" in found["layout"]
    want = [f"{(i + 1) * 32**0.5:.4g}" for i in range(10)]
    assert found["norm 0"].split() + found["norm 8"].split() == want


def test_the_folder_of_a_run_and_data_beside_it(load: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    rp.save_adapter(rp.attach_adapter(load(), AdapterConfig("lora", 2)), run / "adapter")
    write(run / "metrics.jsonl", {"step": 1})
    (run / "config.yaml").write_text("")
    text = told(run, write(tmp_path / "d.jsonl", {"text": "abc"}))
    assert text.splitlines()[:2] == [f"{run} is taken for the folder of a run", str(run / "adapter")]
    assert "lora, rank 2" in text
    assert f"\n\ndata         {tmp_path / 'd.jsonl'}: 1 example, 3 tokens\n" in text


@pytest.mark.parametrize("peft", ["lora", "full"])
def test_the_best_of_a_run(load: Callable[..., Any], tmp_path: Path, peft: str) -> None:
    run = tmp_path / "run"
    for folder, rank in ((run, 2), (run / "best", 3)):
        if peft == "lora":
            rp.save_adapter(rp.attach_adapter(load(), AdapterConfig("lora", rank)), folder / "adapter")
        else:
            write_tensors(folder / "model.pth", random_model("x070", layers=rank))
    write(run / "metrics.jsonl", {"step": 1})
    (run / "config.yaml").write_text("")
    written = "adapter" if peft == "lora" else "model.pth"
    last, best = ("lora, rank 2", "lora, rank 3") if peft == "lora" else ("layers       2", "layers       3")
    text = told(run)
    assert text.startswith(f"{run} is taken for the folder of a run\n{run / written}\n")
    assert text.index(last) < text.index(f"\n{run / 'best' / written}\n") < text.index(best)
    alone = told(run / "best")
    assert alone.startswith(f"{run / 'best'} is taken for the best of a run\n{run / 'best' / written}\n")
    assert best in alone and last not in alone


# --- the command


def test_words_are_data_and_required_settings_come_first() -> None:
    assert parse("inspect", ["a.jsonl", "b", "--show", "2"]) == InspectConfig(data=["a.jsonl", "b"], show=2)
    assert parse("prepare", ["a.jsonl", "b", "--out", "c"]).data == ["a.jsonl", "b"]
    for name in COMMANDS:
        shown = re.split(r"\n  (?=--)", parser(name, everything=True).format_help())[1:]
        required = ["(required)" in re.sub(r"\s+", " ", text) for text in shown]
        assert required == sorted(required, reverse=True)


def test_the_demo_data(capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(rp.__file__).parent / "assets" / "demo" / "train.jsonl"
    assert main(["inspect", str(data), "--tokenizer", "byte", "--show", "1"]) == 0
    shown = capsys.readouterr().out
    assert f"{data}: 2,400 examples, 251,205 tokens" in shown
    assert shown.count("\n---") == 1
