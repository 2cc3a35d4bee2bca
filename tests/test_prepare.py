"""`prepare`: files to the letter, the same whatever the number of processes, whatever ends a run; and back to text."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress

from rwkv_peft.config import PrepareConfig
from rwkv_peft.data import binidx as binidx_module
from rwkv_peft.data.binidx import BinidxWriter, open_binidx, put_in_place
from rwkv_peft.data.examples import segments_of
from rwkv_peft.data.masking import Encoder
from rwkv_peft.data.sources import Item, Piece, items_of, streams, texts
from rwkv_peft.data.templates import find_template
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError, DataError, OutputError, RwkvPeftError
from rwkv_peft.preparation import encoding, lock, prepare, resume
from rwkv_peft.preparation import run as prepare_module
from rwkv_peft.preparation.encoding import blocks_of
from rwkv_peft.preparation.workers import Workers

WORLD = Tokenizer.world()
TEXTS = ["Hello", "我们来谈谈\n\n人工智能", "👩‍👩‍👧‍👦 \x00 e\u0301", " ", "a" * 3000, "def f(x):\n\treturn x\n" * 20]
PAIR = {"prompt": "Q", "response": "A"}
CHAT = {"messages": [{"role": r, "content": c} for r, c in [("user", "U: User: x"), ("assistant", "A\n\nB"),
                                                            ("user", "V"), ("assistant", "C")]]}  # fmt: skip


def write(path: Path, *values: object) -> str:
    """A JSONL file; texts become {"text": …}, bytes stay as they are."""
    lines = [
        value if isinstance(value, bytes) else json.dumps({"text": value} if isinstance(value, str) else value).encode()
        for value in values
    ]
    path.write_bytes(b"\n".join(lines))
    return str(path)


def run(*data: str, out: Path, **settings: Any) -> str:
    """Prepare in this process, and return what it printed."""
    printed = io.StringIO()
    settings = {"jobs": 1, **settings}
    prepare(PrepareConfig(data=list(data), out=out, **settings), Console(file=printed, width=80))
    return printed.getvalue()


def expected(documents: list[list[int]]) -> tuple[bytes, bytes]:
    """The bytes of .bin and .idx, written number by number as the format is described."""
    tokens, sizes, pointers, numbers = b"", b"", b"", struct.pack("<q", 0)
    for number, document in enumerate(documents, 1):
        pointers += struct.pack("<q", len(tokens))
        sizes += struct.pack("<i", len(document))
        tokens += struct.pack(f"<{len(document)}H", *document)
        numbers += struct.pack("<q", number)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(documents), len(documents) + 1)
    return tokens, head + sizes + pointers + numbers


def files_of(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def documents_of(prefix: Path) -> list[list[int]]:
    pair = open_binidx(str(prefix))
    return [pair.ids[s : s + n].tolist() for s, n in zip(pair.starts, pair.lengths, strict=True)]


def set_blocks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let blocks, and the lines and parts that they are made of, have about that many bytes."""
    monkeypatch.setattr(encoding, "BLOCK", size)
    monkeypatch.setattr(streams, "BLOCK", size)
    monkeypatch.setattr(texts, "PART", size)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is written


def test_the_files_are_the_format_to_the_letter(tmp_path: Path) -> None:
    texts = [text for text in TEXTS if text.strip()]
    printed = run(write(tmp_path / "d.jsonl", *texts), out=tmp_path / "o", ctx_len=64)
    documents = [[*WORLD.encode(text), 0] for text in texts]
    assert files_of(tmp_path / "o") == expected(documents)
    assert left_in(tmp_path) == ["d.jsonl", "o.bin", "o.idx"]
    tokens = sum(map(len, documents))
    size = sum(len(text.encode()) for text in texts) / 1e6
    first, second = printed.splitlines()
    assert first.startswith(f"{tmp_path}/o.bin and .idx: 5 documents, {tokens:,} tokens, {size:.1f} MB of text, ")
    assert first.endswith(" MB/s")
    assert second == f"for RWKV-LM: --my_exit_tokens {tokens} --magic_prime 5 --ctx_len 64"


def test_too_few_tokens_for_rwkv_lm_are_told(tmp_path: Path) -> None:
    printed = run(write(tmp_path / "d.jsonl", "a"), out=tmp_path / "o")
    assert printed.splitlines()[1] == (
        "for RWKV-LM: fewer tokens than three windows of --ctx-len 4096, so it has no --magic_prime"
    )


@given(texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5))
@settings(max_examples=30)
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    run(write(folder / "d.jsonl", *texts), out=folder / "o")
    assert documents_of(folder / "o") == [[*WORLD.encode(text), 0] for text in texts]
    run(str(folder / "o"), out=folder / "back.jsonl")
    assert [json.loads(line)["text"] for line in (folder / "back.jsonl").read_text("utf-8").split("\n")[:-1]] == texts


@pytest.mark.parametrize(
    ("more", "template", "stop"),
    [
        ({}, "rwkv", 0),
        ({"stop_token": r"\x17"}, "rwkv", 24),
        ({"template": "raw", "stop_token": "65535", "special_tokens": [f"<{i}>" for i in range(6)]}, "raw", 65535),
        ({"tokenizer": "byte", "special_tokens": ["U: "]}, "rwkv", 0),
    ],
)
def test_the_tokens_are_those_of_training(tmp_path: Path, more: dict[str, Any], template: str, stop: int) -> None:
    values = [CHAT, PAIR, {"prompt": "Q", "completions": ["A", "B"]}, {"text": "T <0> U: V"}]
    run(write(tmp_path / "d.jsonl", *values), out=tmp_path / "o", **more)
    base = Tokenizer.byte() if more.get("tokenizer") == "byte" else WORLD
    tokenizer = base.with_special(more.get("special_tokens", ()), 65536)
    encoder = Encoder(tokenizer, "auto", stop)
    trained = [
        encoder.encode(segments).ids.tolist()
        for value in values
        for segments in segments_of(value, None, find_template(template), "stop_token" in more)
    ]
    assert documents_of(tmp_path / "o") == trained
    assert [document[-1] for document in trained] == [stop] * 4 + [0]


def test_instruction_ends_with_its_own_stop_token(tmp_path: Path) -> None:
    run(write(tmp_path / "d.jsonl", PAIR, "plain"), out=tmp_path / "o", template="instruction")
    assert [document[-1] for document in documents_of(tmp_path / "o")] == [24, 0]


def test_a_stop_token_inside_a_text_is_told(tmp_path: Path) -> None:
    chat = {"prompt": "a\x17b", "response": "c\x17"}
    printed = run(write(tmp_path / "d.jsonl", chat, PAIR), out=tmp_path / "o", stop_token="24")
    assert "; 2 texts hold the stop token, where a model learns to stop\n" in printed


def test_several_sources_of_several_forms(tmp_path: Path) -> None:
    first = write(tmp_path / "1.jsonl", "a", "b")
    (tmp_path / "2.txt").write_text("c\n---\nd")
    (tmp_path / "3.jsonl.gz").write_bytes(gzip.compress(b'{"text": "e"}'))
    (tmp_path / "f").mkdir()
    write(tmp_path / "f" / "train.jsonl", "f")
    write(tmp_path / "f" / "test.jsonl", "no")
    data = [first, str(tmp_path / "2.txt"), str(tmp_path / "3.jsonl.gz"), str(tmp_path / "f")]
    printed = run(*data, out=tmp_path / "o", separator="\n---\n")
    assert [WORLD.decode(document[:-1]) for document in documents_of(tmp_path / "o")] == list("abcdef")
    assert f"; {tmp_path}/f: 1 file of other splits left out\n" in printed


@pytest.mark.parametrize(
    ("split", "chosen"),
    [
        ("train[:3]", "abc"), ("train[2:]", "cdefg"), ("train[-2:]", "fg"), ("train[10%:50%]", "bcd"),
        ("train[:0%]", ""), ("train[1:4]", "bcd"), ("train[:100]", "abcdefg"), ("train[9:]", ""),
    ],
)  # fmt: skip
def test_split_counts_documents(tmp_path: Path, split: str, chosen: str) -> None:
    values = ["a", b"broken", {"prompt": "", "completions": ["b", "c"]}, "d", "e"]
    first, second = write(tmp_path / "1.jsonl", *values), write(tmp_path / "2.jsonl", "f", "g")
    more = {"split": split, "on_bad_line": "skip", "template": "raw"}
    if not chosen:
        with pytest.raises(DataError, match=r"^--split train\[.*\]: none of the 7 documents; choose a wider one$"):
            run(first, second, out=tmp_path / "o", **more)
        return
    printed = run(first, second, out=tmp_path / "o", **more)
    assert files_of(tmp_path / "o") == expected([[*WORLD.encode(text), 0] for text in chosen])
    assert left_in(tmp_path) == ["1.jsonl", "2.jsonl", "o.bin", "o.idx"]
    assert f": {len(chosen)} of " in printed or f": {len(chosen)} documents" in printed


@pytest.mark.parametrize(
    ("source", "more", "note"),
    [
        ("d.jsonl", {"separator": "x"}, "; --separator: no effect, no source is a text file\n"),
        ("d.jsonl", {"subset": "x"}, "; --subset: no effect, no source is a dataset of the hub\n"),
        ("f", {"separator": "x"}, "; 1 file of no known form left out, the first c.jsn\n"),
        ("t", {"separator": "x"}, " MB/s\n"),
        ("d.jsonl", {}, " MB/s\n"),
    ],
)
def test_what_has_no_effect_and_what_is_left_out_is_told(
    tmp_path: Path, source: str, more: dict[str, str], note: str
) -> None:
    write(tmp_path / "d.jsonl", "a")
    for folder in ("f", "t"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("axb")
    write(tmp_path / "f" / "c.jsn", "a")
    printed = run(str(tmp_path / source), out=tmp_path / "o", **more)
    assert printed.splitlines(keepends=True)[0].replace(f"{tmp_path}/f: ", "").endswith(note)


def test_a_split_that_has_enough_reads_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_blocks(monkeypatch, 1)
    run(write(tmp_path / "d.jsonl", "a", "b", b"broken"), out=tmp_path / "o", split="train[:2]")
    assert len(documents_of(tmp_path / "o")) == 2


def test_it_is_quiet_but_for_its_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    assert len(run(write(tmp_path / "d.jsonl", "a"), out=tmp_path / "o").splitlines()) == 2


def test_a_terminal_sees_a_bar(tmp_path: Path) -> None:
    printed = io.StringIO()
    config = PrepareConfig(data=[write(tmp_path / "d.jsonl", "a" * 3_000_000)], out=tmp_path / "o", jobs=1)
    prepare(config, Console(file=printed, force_terminal=True, width=120))
    assert "100%, 1 documents, 3 MB, " in printed.getvalue()


def bar_of(monkeypatch: pytest.MonkeyPatch, *data: str, out: Path, broken_after: int = 10**9) -> list[str]:
    """What a bar shows after each block, without times; the run is broken off after so many."""
    seen: list[str] = []
    update = Progress.update

    def spy(self: Progress, task: Any, **fields: Any) -> None:
        update(self, task, **fields)
        seen.append(re.sub(r"[\d.]+ MB/s|\d:\d\d:\d\d", "…", fields["shown"]) + f" ({fields['completed']:,})")
        if len(seen) == broken_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", spy)
        prepare(PrepareConfig(data=list(data), out=out, jobs=1), Console(file=io.StringIO(), force_terminal=True))
    return seen


def test_a_bar_knows_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_blocks(monkeypatch, 50_000)
    text, lines = "word\n" * 40_000, [{"text": "a" * 989}] * 200
    (tmp_path / "1.txt").write_text(text)
    data = [str(tmp_path / "1.txt"), write(tmp_path / "2.jsonl", *lines)]
    total = sum(Path(path).stat().st_size for path in data)
    with pytest.raises(KeyboardInterrupt):
        bar_of(monkeypatch, *data, out=tmp_path / "o", broken_after=1)
    seen = bar_of(monkeypatch, *data, out=tmp_path / "o")
    assert seen[0] == "37%, 0 documents, 0 MB, … (150,000)"
    assert seen[1] == "50%, 0 documents, 0 MB, …, … left (200,000)"
    assert seen[-1] == f"100%, 201 documents, 0 MB, …, … left ({total:,})"


def test_a_bar_of_what_has_no_size_shows_no_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_blocks(monkeypatch, 50)
    monkeypatch.setattr(prepare_module, "size_of", lambda *_: None)
    seen = bar_of(monkeypatch, write(tmp_path / "1.jsonl", *["abc" * 20] * 9), out=tmp_path / "o")
    assert len(seen) == 9
    assert seen[0].startswith("1 documents, 0 MB, … (")


# --- processes


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8,000 documents of all lengths, 4 MB: more than ten blocks of the size that `small_blocks` sets."""
    path = tmp_path_factory.mktemp("many") / "d.jsonl"
    chance, words = random.Random(3), "\n".join(TEXTS).split(" ")
    with path.open("w") as file:
        for number in range(8_000):
            text = f"{number} " + " ".join(chance.choices(words, k=chance.randint(0, 8)))
            file.write(json.dumps({"text": text[: chance.randint(8, 1500)]}) + "\n")
    return path


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    set_blocks(monkeypatch, 300_000)


@pytest.fixture(scope="module")
def alone(many: Path) -> tuple[bytes, bytes]:
    """What one process makes of it."""
    run(str(many), out=many.with_name("alone"))
    return files_of(many.with_name("alone"))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("jobs", [2, 3])
def test_the_number_of_processes_changes_nothing(
    tmp_path: Path, many: Path, alone: tuple[bytes, bytes], jobs: int
) -> None:
    run(str(many), out=tmp_path / "o", jobs=jobs)
    assert files_of(tmp_path / "o") == alone
    texts = [json.loads(line)["text"] for line in many.read_text().splitlines()]
    documents = documents_of(tmp_path / "o")
    assert len(documents) == 8_000
    assert documents[::500] == [[*WORLD.encode(text), 0] for text in texts[::500]]


def uneven(seconds: float) -> float:
    """Work that takes its time."""
    time.sleep(seconds)
    return seconds


def make_uneven() -> Any:
    return uneven


def make_broken() -> Any:
    return os._exit


def test_results_keep_the_order_of_the_work_and_little_waits() -> None:
    begun: list[float] = []

    def work() -> Any:
        for number in range(12):
            begun.append(number)
            yield 0.3 if number == 0 else number / 1000

    workers: Workers[float, float] = Workers(2, make_uneven)
    try:
        results = workers.map(work())
        assert next(results) == 0.3
        assert len(begun) <= 6
        assert list(results) == [number / 1000 for number in range(1, 12)]
    finally:
        workers.close()
    assert not any(process.is_alive() for process in workers.processes)


def test_a_process_that_ends_is_told() -> None:
    workers: Workers[int, None] = Workers(2, make_broken)
    try:
        with pytest.raises(ConfigError, match=r"^--jobs 2: a process ended by itself; the same command goes on "):
            list(workers.map(iter([1, 1, 1])))
    finally:
        workers.close()


def test_blocks_are_bounded_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BLOCK", 1000)
    items = [Item(str(n), {"a": ["x" * n, {"b": 1}], "c": None}) for n in range(200)]
    blocks = list(blocks_of(items))
    found = [[item for piece in block for item in items_of(piece)] for block in blocks]
    assert [item for block in found for item in block] == items
    assert max(len(block) for block in blocks) < 1000 / encoding.ITEM
    assert max(sum(len(str(item.value)) for item in block) for block in found) < 2000


# --- texts that are too long to be in memory


LONG = "".join(f"Line {number},\twords\r\n“Ja?”\n我们来谈谈。\n  \n" for number in range(20_000))  # 0.9 MB


def write_long(folder: Path) -> list[str]:
    """Sources of short and long documents, the long ones in many parts."""
    (folder / "1.txt").write_text(LONG, newline="")
    (folder / "3.txt").write_text("short\n")
    (folder / "4.md").write_text(LONG[::2] + "end")
    (folder / "4.md.gz").write_bytes(gzip.compress(LONG[::2].encode() + b"end"))
    return [
        str(folder / "1.txt"),
        write(folder / "2.jsonl", "a", "b"),
        *(str(folder / f"{n}") for n in ("3.txt", "4.md.gz")),
    ]


def long_documents() -> list[list[int]]:
    return [[*WORLD.encode(text.replace("\r\n", "\n")), 0] for text in (LONG, "a", "b", "short\n", LONG[::2] + "end")]


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("size", [50_000, 120_000])
def test_a_long_text_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, jobs: int) -> None:
    set_blocks(monkeypatch, size)
    monkeypatch.setattr(encoding, "BLOCK", 100_000)
    printed = run(*write_long(tmp_path), out=tmp_path / "o", jobs=jobs)
    assert files_of(tmp_path / "o") == expected(long_documents())
    total = len((LONG.replace("\r\n", "\n") + "ab" + "short\n" + LONG[::2].replace("\r\n", "\n") + "end").encode())
    assert f": 5 documents, {sum(map(len, long_documents())):,} tokens, {total / 1e6:,.1f} MB of text" in printed


def test_a_long_text_can_be_gone_on_with_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_blocks(monkeypatch, 100_000)
    monkeypatch.setattr(encoding, "BLOCK", 50_000)
    data, whole = write_long(tmp_path), expected(long_documents())
    monkeypatch.setattr(resume, "SAVED_EVERY", 0.0)
    add, left = resume.Partial.add, 0

    def break_off(self: resume.Partial, block: Any) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        add(self, block)

    monkeypatch.setattr(resume.Partial, "add", break_off)
    seen = []
    for at in count(1):
        left = at
        try:
            run(*data, out=tmp_path / "o")
            break
        except KeyboardInterrupt:
            pass
        state = json.loads((tmp_path / "o.partial" / "state.json").read_text())
        seen.append((state["documents"], state["begun"] > 0))
        left = -1
        printed = run(*data, out=tmp_path / "o")
        more = " and a part of the next one" * (state["begun"] > 0)
        assert f"going on after {state['documents']:,} documents{more}\n" in printed
        assert files_of(tmp_path / "o") == whole
        for end in ("bin", "idx"):
            Path(f"{tmp_path}/o.{end}").unlink()
    assert files_of(tmp_path / "o") == whole
    assert len(seen) > 8
    assert {(0, True), (4, True)} <= set(seen)


@pytest.mark.parametrize("step", ["cut_off", "put_in_place", "remove"])
def test_a_split_ends_in_a_long_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    set_blocks(monkeypatch, 50_000)
    monkeypatch.setattr(encoding, "BLOCK", 250_000)
    (tmp_path / "2.txt").write_text(LONG)
    data = [write(tmp_path / "1.jsonl", "a", "b"), str(tmp_path / "2.txt")]

    def broken(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, step, broken)
        run(*data, out=tmp_path / "o", split="train[:2]")
    more = {"overwrite": True} if step == "remove" else {}
    if step != "remove":
        with pytest.raises(
            ConfigError, match=r"o\.partial is of a run with other settings or sources \(split\); remove"
        ):
            run(*data, out=tmp_path / "o", split="train[:3]")
    run(*data, out=tmp_path / "o", split="train[:2]", **more)
    assert files_of(tmp_path / "o") == expected([[*WORLD.encode(text), 0] for text in "ab"])
    assert left_in(tmp_path) == ["1.jsonl", "2.txt", "o.bin", "o.idx"]


def test_a_long_text_that_is_not_utf8_is_skipped_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_blocks(monkeypatch, 50_000)
    (tmp_path / "1.txt").write_bytes(LONG.encode() + b"\xff")
    data = [str(tmp_path / "1.txt"), write(tmp_path / "2.jsonl", "a")]
    where = rf"{data[0]}: not UTF-8 \(byte 0xff at line 80001 byte 1\); save the file as UTF-8"
    with pytest.raises(DataError, match=f"^{where}$"):
        run(*data, out=tmp_path / "o")
    printed = run(*data, out=tmp_path / "o", on_bad_line="skip")
    assert re.search(rf": 1 documents, 2 tokens, 0\.0 MB of text, .*; 1 skipped, the first {where}", printed)


def test_special_tokens_across_lines_are_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_blocks(monkeypatch, 100)
    special, text = ["<e>\n", ";\n\n"], "word<e>\nword>\nx;\n\n字\n" * 500
    (tmp_path / "d.txt").write_text(text)
    run(str(tmp_path / "d.txt"), out=tmp_path / "o", special_tokens=special)
    assert documents_of(tmp_path / "o") == [[*WORLD.with_special(special, 65536).encode(text), 0]]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_document_longer_than_the_format_can_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    set_blocks(monkeypatch, 100)
    monkeypatch.setattr(resume, "MOST_TOKENS", 1000)
    (tmp_path / "d.txt").write_text("word\n" * 600)
    path = write(tmp_path / "d.jsonl", "word\n" * 600) if suffix == "jsonl" else str(tmp_path / "d.txt")
    with pytest.raises(
        DataError, match=r"^document 2 has more than 1,000 tokens, which binidx cannot hold; name what "
    ):
        run(write(tmp_path / "a.jsonl", "a"), path, out=tmp_path / "o")


# --- bad items


def test_a_bad_line_stops_and_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", "a", b'{"text": "x"', "b")
    with pytest.raises(DataError, match=rf"^{path}:2: broken JSON at column 13"):
        run(path, out=tmp_path / "o")
    assert left_in(tmp_path) == ["d.jsonl"]


def test_bad_lines_are_skipped_and_told(tmp_path: Path) -> None:
    bad = [b"[]", {"text": 5}, {"text": "\ud800"}, {"prompt": "a", "completions": ["b", ""]}]
    path = write(tmp_path / "d.jsonl", "a", *bad, "b")
    printed = run(path, out=tmp_path / "o", on_bad_line="skip")
    assert documents_of(tmp_path / "o") == [[98, 0], [99, 0]]
    assert f"; 4 skipped, the first {path}:2: got a list, must be a JSON object; " in printed


def test_nothing_left_quotes_the_first_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", b"[]", b"{")
    with pytest.raises(DataError, match=rf"^{path}:1: got a list.* \(the first of 2 skipped; none is left\)$"):
        run(path, out=tmp_path / "o", on_bad_line="skip")
    assert left_in(tmp_path) == ["d.jsonl"]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_bad_line_far_away_keeps_what_was_done(
    tmp_path: Path, many: Path, alone: tuple[bytes, bytes], jobs: int
) -> None:
    path = tmp_path / "d.jsonl"
    lines = many.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:6_000], b"broken\n", *lines[6_000:]]))
    with pytest.raises(DataError, match=rf"^{path}:6001: broken JSON"):
        run(str(path), out=tmp_path / "o", jobs=jobs)
    assert left_in(tmp_path) == ["d.jsonl", "o.partial"]
    printed = run(str(path), out=tmp_path / "o", jobs=3 - jobs, on_bad_line="skip")
    assert "o.partial: going on after " in printed
    assert f"; 1 skipped, the first {path}:6001: broken JSON" in printed
    assert files_of(tmp_path / "o") == alone
    assert left_in(tmp_path) == ["d.jsonl", "o.bin", "o.idx"]


# --- settings that cannot be


def binidx(prefix: Path, *documents: bytes) -> str:
    """A pair of documents given as bytes, each ended by token 0."""
    writer = BinidxWriter(str(prefix))
    for document in documents:
        ids = [*WORLD.encode_bytes(document), 0]
        writer.add(np.array(ids), np.array([len(ids)]))
    writer.flush()
    writer.close()
    put_in_place(str(prefix))
    resume.remove(str(prefix))
    return str(prefix)


@pytest.mark.parametrize(
    ("data", "out", "more", "message"),
    [
        (["d.jsonl:0.5", "d.jsonl:0.5"], "o", {}, "--data d.jsonl:0.5 d.jsonl:0.5: shares are for training; "),
        (["d.jsonl"], "o.jsonl", {}, "--out o.jsonl: text is made of binidx pairs only; "),
        (["p", "d.jsonl"], "o.txt", {}, "--out o.txt: text is made of binidx pairs only; "),
        (["p"], "o", {}, "--data p: is tokens already; "),
        (["p.bin"], "o", {}, "--data p.bin: is tokens already; "),
        (["folder"], "o", {}, "--data folder: holds tokens already, folder/q.bin; name the files of text in it"),
        (["d.jsonl"], "p", {}, "--out p.idx: is there already; choose another name, or use --overwrite"),
        (["d.jsonl"], "half", {}, "--out half.bin: is there already; "),
        (["p"], "d.jsonl", {}, "--out d.jsonl: is there already; "),
        (["none.jsonl"], "o", {}, "none.jsonl: no such file; "),
        (["d.jsonl"], "o", {"jobs": 0}, "--jobs 0: must be at least 1; "),
        (["d.jsonl"], "o", {"template": "rvkw"}, "--template rvkw: "),
        (["d.jsonl"], "o", {"stop_token": "99999"}, "--stop-token 99999: not in the world vocabulary"),
        (["d.jsonl"], "o", {"special_tokens": [f"<{i}>" for i in range(7)]}, "--special-tokens: got 7, "),
        (["d.jsonl"], "o", {"split": "train["}, "--split train[: no known form"),
        (["d.jsonl"], "o", {"split": "test"}, "--split test: d.jsonl is one file"),
        (["d.jsonl"], "o", {"split": f"train[:{'9' * 400}]"}, "--split 'train[:99999"),
        (["d.jsonl"], "o", {"split": "train[5:]"}, "--split train[5:]: none of the 2 documents; choose a wider one"),
        (["d.jsonl"], "folder", {}, "--out folder: is a folder; name a prefix in it, e.g. folder/data"),
        (["d.jsonl"], "folder/", {"overwrite": True}, "--out folder: is a folder; name a prefix in it, e.g. folder/"),
        (["p"], "texts.jsonl", {"overwrite": True}, "--out texts.jsonl: is a folder; name a prefix in it, e.g. "),
        (["d.jsonl"], "i", {"overwrite": True}, "--out i: i.idx is a folder; choose another name"),
        (["d.jsonl"], "b.bin", {"overwrite": True}, "--out b.bin: is a folder; name a prefix in it"),
        (["d.jsonl"], "b", {"overwrite": True}, "--out b: b.bin is a folder; choose another name"),
        (["d.jsonl"], "a\0b", {}, "--out 'a\\x00b': is no name that a file can have; choose another one"),
        (["p"], "a\0b.txt", {}, "--out 'a\\x00b.txt': is no name that a file can have; choose another one"),
        (["d.jsonl"], "x" * 300, {}, f"{'x' * 300}: cannot be written (File name too long); "),
        (["p"], "o.jsonl", {"split": "train[1:]"}, "--split train[1:]: none of the 1 documents; choose a wider one"),
        (["p"], "o.jsonl", {"split": "test[:1]"}, "--split test[:1]: a pair of files has no split 'test'; write train"),
        (["p"], "o.jsonl", {"split": "train["}, "--split train[: no known form"),
        (["p"], "o.txt", {"fields": ("a", "b")}, "--fields: has no effect where tokens become .txt text; leave it out"),
        (["p"], "o.txt", {"template": "raw"}, "--template: has no effect where tokens become .txt text; leave it out"),
        (["p"], "o.txt", {"template": "instruction", "stop_token": "0"}, "--template: has no effect where tokens"),
        (["p"], "o.txt", {"template": "rvkw"}, "--template rvkw: "),
        (["p"], "o.txt", {"subset": "en"}, "--subset: has no effect where tokens become .txt text; leave it out"),
        (["p"], "o.txt", {"on_bad_line": "skip"}, "--on-bad-line: has no effect where tokens become .txt text; "),
        (["p"], "o.jsonl", {"separator": "-"}, "--separator: has no effect where tokens become .jsonl text; leave it"),
        (["d.jsonl"], "d.jsonl/o", {}, "d.jsonl/o.partial: cannot be written (Not a directory); "),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: list[str], out: str, more: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("d.jsonl"), "a", "b")
    binidx(Path("p"), b"text")
    Path("half.bin").touch()
    Path("folder").mkdir()
    binidx(Path("folder", "q"), b"text")
    for name in ("texts.jsonl", "i.idx", "b.bin"):
        Path(name).mkdir()
    write(Path("folder", "d.jsonl"), "a")
    before = left_in(tmp_path)
    with pytest.raises(RwkvPeftError) as error:
        run(*data, out=Path(out), **more)
    assert str(error.value).startswith(message)
    assert str(error.value).isprintable()
    assert left_in(tmp_path) == before


def test_overwriting(tmp_path: Path) -> None:
    run(write(tmp_path / "d.jsonl", "a", "b"), out=tmp_path / "o")
    run(write(tmp_path / "d.jsonl", "c"), out=tmp_path / "o.bin", overwrite=True)
    assert documents_of(tmp_path / "o") == [[100, 0]]
    assert left_in(tmp_path) == ["d.jsonl", "o.bin", "o.idx"]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"o\.partial: cannot be written \(No space left on device\); make room, or"):
        run(write(tmp_path / "d.jsonl", "a"), out=tmp_path / "o")


# --- whatever ends a run


def start(many: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """The same as the command line does, in a process of its own that leaves time to end it."""
    script = (
        "import sys, time\n"
        "from rwkv_peft.config import PrepareConfig\n"
        "from rwkv_peft.data.sources import streams, texts\n"
        "from rwkv_peft.preparation import encoding, resume, run\n"
        "add = resume.Partial.add\n"
        "def slow_add(self, block):\n"
        "    add(self, block)\n"
        "    time.sleep(0.3)\n"
        "if __name__ == '__main__':\n"
        "    encoding.BLOCK = streams.BLOCK = texts.PART = 300_000\n"
        "    resume.Partial.add = slow_add\n"
        "    run.prepare(PrepareConfig(data=[sys.argv[1]], out=sys.argv[2], jobs=int(sys.argv[3])))\n"
    )
    path = out.with_name("script.py")
    path.write_text(script)
    command = [sys.executable, str(path), str(many), str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_state(out: Path, process: subprocess.Popen[str]) -> None:
    while not Path(f"{out}.partial", "state.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def children_of(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_run_is_gone_on_with(tmp_path: Path, many: Path, alone: tuple[bytes, bytes], jobs: int) -> None:
    out = tmp_path / "o"
    process = start(many, out, str(jobs))
    wait_for_state(out, process)
    children = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not Path(f"{out}.idx").exists()
    state = json.loads(Path(f"{out}.partial", "state.json").read_text())
    assert 0 < state["documents"] < 8_000
    printed = run(str(many), out=out, jobs=3 - jobs)
    assert f"going on after {state['documents']:,} documents" in printed
    assert files_of(out) == alone
    psutil.wait_procs([psutil.Process(pid) for pid in children if psutil.pid_exists(pid)], timeout=10)
    assert not any(map(psutil.pid_exists, children))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_is_killed_within_a_long_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    path, out = tmp_path / "d.txt", tmp_path / "o"
    path.write_text(LONG * 4)
    process = start(path, out, str(jobs))
    wait_for_state(out, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    state = json.loads(Path(f"{out}.partial", "state.json").read_text())
    assert (state["documents"], state["begun"]) == (0, state["tokens"])
    assert 0 < state["tokens"] < 1_000_000
    set_blocks(monkeypatch, 300_000)
    printed = run(str(path), out=out, jobs=3 - jobs)
    assert "going on after 0 documents and a part of the next one\n" in printed
    assert files_of(out) == expected([[*WORLD.encode(LONG.replace("\r\n", "\n") * 4), 0]])
    assert left_in(tmp_path) == ["d.txt", "o.bin", "o.idx", "script.py"]


def test_a_second_command_is_refused(tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "o"
    process = start(many, out, "1")
    wait_for_state(out, process)
    message = rf"^--out {out}: another command is at work in {out}\.partial; wait until it has ended, or choose another"
    for more in ({}, {"overwrite": True}):
        with pytest.raises(ConfigError, match=message):
            run(str(many), out=out, **more)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    set_blocks(monkeypatch, 300_000)
    assert "going on after " in run(str(many), out=out)
    assert left_in(tmp_path) == ["o.bin", "o.idx", "script.py"]


def test_a_command_that_waits_for_nobody_goes_on_undisturbed(tmp_path: Path, many: Path) -> None:
    out = tmp_path / "o"
    process = start(many, out, "1")
    wait_for_state(out, process)
    second = start(many, out, "1")
    assert "ConfigError: --out " in second.communicate()[1]
    assert process.communicate()[0].count("\n") == 2
    assert (second.returncode, process.returncode) == (1, 0)
    assert len(documents_of(out)) == 8_000


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", fail)
    printed = run(write(tmp_path / "d.jsonl", "a"), out=tmp_path / "o")
    assert f"; {tmp_path}/o.partial: has no lock (No locks available); let no other command write it" in printed
    assert left_in(tmp_path) == ["d.jsonl", "o.bin", "o.idx"]


def test_a_lock_on_a_file_that_was_just_removed_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, take = [], lock._lock

    def late(file: Any) -> None:
        if not taken:
            Path(file.name).unlink()
        taken.append(file)
        take(file)

    monkeypatch.setattr(lock, "_lock", late)
    with lock.locked(str(tmp_path / "o")):
        assert len(taken) == 2
        with pytest.raises(ConfigError), lock.locked(str(tmp_path / "o")):
            pass
    assert not left_in(tmp_path)


@pytest.mark.usefixtures("small_blocks")
def test_an_interrupted_run_says_what_it_keeps(tmp_path: Path, many: Path, alone: tuple[bytes, bytes]) -> None:
    out = tmp_path / "o"
    process = start(many, out, "2")
    wait_for_state(out, process)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate()
    assert process.returncode != 0
    assert "o.partial: keeps " in printed
    assert " documents; the same command goes on after them, unless a source changes" in printed
    run(str(many), out=out)
    assert files_of(out) == alone


def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A run of three documents that is broken off after two."""
    set_blocks(monkeypatch, 1)
    path, out = write(tmp_path / "d.jsonl", "a", "b", "c"), tmp_path / "o"
    add = resume.Partial.add

    def break_off(self: resume.Partial, block: Any) -> None:
        if self.state.documents == 2:
            raise KeyboardInterrupt
        add(self, block)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resume.Partial, "add", break_off)
        run(path, out=out)
    return path, out


def test_what_is_done_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = begin(tmp_path, monkeypatch)
    seen: list[str] = []
    call = encoding.BlockEncoder.__call__

    def spy(self: encoding.BlockEncoder, pieces: list[Piece]) -> encoding.Block:
        seen.extend(item.origin for piece in pieces for item in items_of(piece))
        return call(self, pieces)

    monkeypatch.setattr(encoding.BlockEncoder, "__call__", spy)
    assert "o.partial: going on after 2 documents\n" in run(path, out=out)
    assert seen == [f"{path}:3"]
    assert documents_of(out) == [[98, 0], [99, 0], [100, 0]]


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        ({"template": "raw"}, "template"),
        ({"stop_token": "23"}, "stop_token, stop"),
        ({"separator": "x"}, "separator"),
        ({"tokenizer": "byte"}, "tokenizer"),
        ({"special_tokens": ["<x>"]}, "special_tokens"),
        ({"fields": ("a", "b")}, "fields"),
        (None, "sources"),
        ("broken", r"its state\.json cannot be read"),
    ],
)
def test_another_run_in_the_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: Any, changed: str
) -> None:
    path, out = begin(tmp_path, monkeypatch)
    if more is None:
        write(Path(path), "a", "b", "c", "d")
    elif more == "broken":
        Path(f"{out}.partial", "state.json").write_text('{"counts": {}}')
    kept = {name: Path(f"{out}.partial", name).read_bytes() for name in left_in(Path(f"{out}.partial"))}
    settings = more if isinstance(more, dict) else {}
    with pytest.raises(
        ConfigError,
        match=rf"^--out {out}: {out}\.partial is of a run with other settings or sources \({changed}\); remove",
    ):
        run(path, out=out, **settings)
    assert kept == {name: Path(f"{out}.partial", name).read_bytes() for name in left_in(Path(f"{out}.partial"))}
    if "fields" not in settings:
        run(path, out=out, overwrite=True, **settings)
        assert len(documents_of(out)) == 3 + (more is None)
        assert left_in(tmp_path) == ["d.jsonl", "o.bin", "o.idx"]


def test_settings_that_change_no_token_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = begin(tmp_path, monkeypatch)
    run(path, out=out, jobs=2, ctx_len=5, on_bad_line="skip", split="train[1:]")
    assert documents_of(out) == [[99, 0], [100, 0]]


def test_a_changed_template_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    monkeypatch.setattr(resume, "SAVED_EVERY", 0.0)
    config = PrepareConfig(data=[write(tmp_path / "d.jsonl", "a")], out=tmp_path / "o", template=str(template))
    recipe = encoding.Recipe.of(config)
    before = resume.settings_of(config, recipe, 0)
    template.write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    assert resume.settings_of(config, recipe, 0) != before


@pytest.mark.parametrize("step", ["_write_index", "remove"])
def test_a_run_that_ends_between_the_last_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path, out = write(tmp_path / "d.jsonl", "a", "b"), tmp_path / "o"

    def broken(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(binidx_module if step == "_write_index" else prepare_module, step, broken)
        run(path, out=out)
    assert Path(f"{out}.bin").exists()
    run(path, out=out, overwrite=step == "remove")
    assert documents_of(out) == [[98, 0], [99, 0]]
    assert left_in(tmp_path) == ["d.jsonl", "o.bin", "o.idx"]


def test_nothing_that_is_not_ours_is_removed(tmp_path: Path) -> None:
    (tmp_path / "o.partial").mkdir()
    (tmp_path / "o.partial" / "diary.txt").write_text("mine")
    run(write(tmp_path / "d.jsonl", "a"), out=tmp_path / "o")
    assert (tmp_path / "o.partial" / "diary.txt").read_text() == "mine"


# --- back to text


def test_back_to_jsonl_and_there_again(tmp_path: Path) -> None:
    texts = [text for text in TEXTS if text.strip()]
    run(write(tmp_path / "d.jsonl", *texts), out=tmp_path / "o")
    printed = run(str(tmp_path / "o.idx"), out=tmp_path / "back.jsonl")
    size = (tmp_path / "back.jsonl").stat().st_size / 1e6
    assert printed == f"{tmp_path}/back.jsonl: 5 documents, {size:.1f} MB\n"
    run(str(tmp_path / "back.jsonl"), out=tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "o")


def test_back_to_text_for_reading(tmp_path: Path) -> None:
    pair = binidx(tmp_path / "p", b"a", b"", b"b\r\nc")
    run(pair, pair, out=tmp_path / "1.txt")
    assert (tmp_path / "1.txt").read_bytes() == b"a\n\n\n\nb\r\nc\n\na\n\n\n\nb\r\nc"
    run(pair, out=tmp_path / "2.TXT", separator="---")
    assert (tmp_path / "2.TXT").read_bytes() == b"a------b\r\nc"


@pytest.mark.parametrize(
    ("split", "chosen"),
    [
        ("train[:3]", "abc"),
        ("train[2:]", "cde"),
        ("train[-2:4]", "d"),
        ("train[20%:60%]", "bc"),
        ("train[:9]", "abcde"),
    ],
)
def test_a_split_counts_through_all_pairs(tmp_path: Path, split: str, chosen: str) -> None:
    pairs = binidx(tmp_path / "p", b"a", b"b"), binidx(tmp_path / "q", b"c", b"d", b"e")
    printed = run(*pairs, out=tmp_path / "o.jsonl", split=split)
    lines = (tmp_path / "o.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == list(chosen)
    told = f"{len(chosen)} documents" if len(chosen) == 5 else f"{len(chosen)} of 5 documents"
    assert printed == f"{tmp_path}/o.jsonl: {told}, 0.0 MB\n"


def test_a_template_takes_its_own_end_off(tmp_path: Path) -> None:
    run(write(tmp_path / "d.jsonl", PAIR), out=tmp_path / "o", template="instruction")
    run(str(tmp_path / "o"), out=tmp_path / "1.txt", template="instruction")
    assert (tmp_path / "1.txt").read_text().endswith("### Response:A\n")


def test_what_is_no_text_is_counted(tmp_path: Path) -> None:
    pair = binidx(tmp_path / "p", b"a\xffb", "né".encode(), "né".encode()[:-1])
    printed = run(pair, out=tmp_path / "o.jsonl")
    assert "; 2 hold bytes that are not UTF-8, written as U+FFFD\n" in printed
    lines = (tmp_path / "o.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "a\ufffdb"}, {"text": "né"}, {"text": "n\ufffd"}]


def test_end_tokens_inside_are_counted(tmp_path: Path) -> None:
    writer = BinidxWriter(str(tmp_path / "p"))
    writer.add(np.array([98, 0, 99, 24, 98, 0, 0]), np.array([4, 3]))
    writer.flush()
    put_in_place(str(tmp_path / "p"))
    printed = run(str(tmp_path / "p"), out=tmp_path / "o.txt", separator="|", stop_token="24")
    assert (tmp_path / "o.txt").read_text() == "ab|a"
    assert "; 2 hold token 0 before their end, which has no text\n" in printed


def test_special_tokens_come_back_with_their_setting(tmp_path: Path) -> None:
    run(write(tmp_path / "d.jsonl", "a<x>b"), out=tmp_path / "o", special_tokens=["<x>"])
    with pytest.raises(DataError, match=r"o\.bin: document 1: token id 65530 is not in the vocabulary"):
        run(str(tmp_path / "o"), out=tmp_path / "back.jsonl")
    assert not (tmp_path / "back.jsonl").exists()
    run(str(tmp_path / "o"), out=tmp_path / "back.jsonl", special_tokens=["<x>"])
    assert json.loads((tmp_path / "back.jsonl").read_text()) == {"text": "a<x>b"}
