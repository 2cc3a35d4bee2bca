"""The data room as a whole: what is wrong with data is one clear line, and the documentation is true."""

from __future__ import annotations

import gzip
import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_peft.cli import main
from rwkv_peft.config import DataConfig, PrepareConfig, TrainConfig
from rwkv_peft.data.dataset import Dataset, load_dataset
from rwkv_peft.data.examples import segments_of
from rwkv_peft.data.masking import encoder_for
from rwkv_peft.data.templates import find_template
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError, DataError
from rwkv_peft.preparation import prepare
from rwkv_peft.training.run import train

BYTE = Tokenizer.byte()
DOCS = Path(__file__).parent.parent / "docs" / "data.md"


def write(folder: Path, *lines: object, name: str = "d.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def load(*data: object, **settings: Any) -> Dataset:
    return load_dataset(DataConfig([str(path) for path in data], **settings), BYTE)


def texts(data: Dataset) -> list[str]:
    """The text of each piece, and what of it is learnt in brackets."""
    found = []
    for i in range(len(data.pieces)):
        piece, shown, inside = data.piece(i), "", False
        for index, target in zip(piece.ids.tolist(), piece.target.tolist(), strict=True):
            shown += ("[" if target else "]") if target != inside else ""
            inside = target
            shown += BYTE.decode([index]).replace("\n", "⏎") if index else "∅"
        found.append(shown + "]" * inside)
    return found


# --- what a run meets


def binidx(folder: Path, documents: list[list[int]], dtype: int = 8) -> Path:
    """A pair, written by the description of the format."""
    kind = {8: "<u2", 4: "<i4"}[dtype]
    ids = [np.array(document, kind).tobytes() for document in documents]
    sizes = [len(document) for document in documents]
    pointers = [sum(map(len, ids[:i])) for i in range(len(ids))]
    (folder / "pair.bin").write_bytes(b"".join(ids))
    (folder / "pair.idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, dtype, len(sizes), len(sizes) + 1)
        + struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *pointers)
        + struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    )  # fmt: skip
    return folder / "pair"


def broken_gzip(folder: Path) -> list[str]:
    lines = [json.dumps({"text": f"line {i}"}) for i in range(50)]
    lines[24] = '{"text": "broken'
    (folder / "d.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return [str(folder / "d.jsonl.gz")]


def not_utf8(folder: Path) -> list[str]:
    (folder / "d.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    return [str(folder / "d.jsonl")]


def short_index(folder: Path) -> list[str]:
    index = binidx(folder, [[1, 2, 3], [4, 5, 6]]).with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:-30])
    return [str(folder / "pair")]


def short_bin(folder: Path) -> list[str]:
    pair = binidx(folder, [[1, 2, 3], [4, 5, 6]]).with_suffix(".bin")
    pair.write_bytes(pair.read_bytes()[:-2])
    return [str(folder / "pair")]


def template_with_an_error(folder: Path) -> list[str]:
    (folder / "form.jinja").write_text("{% for m in messages %}\n{{ m.content | nothing }}\n{% endfor %}")
    return [str(write(folder, {"prompt": "a", "response": "b"})), "--template", str(folder / "form.jinja")]


def shares(folder: Path) -> list[str]:
    one, two = (write(folder, {"text": "a"}, name=f"{i}.jsonl") for i in (1, 2))
    return [f"{one}:0.7", f"{two}:0.7"]


ROLE = {"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}
BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "a broken line in the middle of a gzip": (broken_gzip, r"d\.jsonl\.gz:25: broken JSON"),
    "invalid UTF-8": (not_utf8, r"d\.jsonl:2: not UTF-8 \(byte 0xe9"),
    "a truncated .idx": (short_index, r"pair\.idx: "),
    "a .bin shorter than its index says": (short_bin, r"pair\.bin: "),
    "ids beyond the vocabulary": (lambda d: [str(binidx(d, [[1, 2], [3, 900, 5]]))], r"pair.*900.*0 to 256"),
    "a role that is unknown": (lambda d: [str(write(d, ROLE))], r"d\.jsonl:1: .*'robot'"),
    "a template with an error": (template_with_an_error, r"--template .*form\.jinja:2: .*nothing"),
    "no such template": (lambda d: [str(write(d, ROLE)), "--template", "rwvk"], "--template rwvk: .*did you mean rwkv"),
    "an empty split": (lambda d: [str(write(d, {"text": "a"})), "--split", "train[5:]"], r"--split train\[5:\]: no"),
    "no split": (lambda d: [str(write(d, {"text": "a"})), "--split", "train[5"], r"--split train\[5: no known form"),
    "shares that do not sum": (shares, r"--data .*: the shares sum to 1\.4"),
    "a stop token of two tokens": (
        lambda d: [str(write(d, {"text": "a"})), "--stop-token", "ab"], "--stop-token ab: is 2 tokens of the byte"
    ),
    "a stop token that is none": (
        lambda d: [str(write(d, {"text": "a"})), "--stop-token", "99999"], "--stop-token 99999: not in the byte"
    ),
    "no room for special tokens": (
        lambda d: [str(write(d, {"text": "a"})), "--special-tokens", "<a>"], "--special-tokens: got 1, .*room for 0"
    ),
    "answers of plain text": (
        lambda d: [str(write(d, {"text": "a"})), "--mask", "answers"], r"d\.jsonl:1: plain text has no answers"
    ),
    "answers of binidx": (lambda d: [str(binidx(d, [[1, 2]])), "--mask", "last"], "--mask last: .*pair is binidx"),
    "an empty name": (lambda d: [""], "--data: one name is empty"),
    "a split of a pair": (lambda d: [str(binidx(d, [[1, 2]])), "--split", "test"], "--split test: .*has no splits"),
    "a row too long": (
        lambda d: [str(write(d, {"text": "a"})), "--ctx-len", str(2**63)], f"--ctx-len {2**63}: must be at most"
    ),
    "a separator that is no text": (
        lambda d: [str(write(d, {"text": "a"})), "--separator", "\udcff"], "--separator: is no UTF-8"
    ),
    "marks thousands deep": (
        lambda d: [str(write(d, {"text": "a"})), "--mask", "qa", "--mask-id", "[" * 100_000], "--mask-id .*: must be"
    ),
    "nothing": (lambda d: [str(write(d))], r"d\.jsonl: "),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_data_is_one_line(
    what: str, tmp_path: Path, model_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD[what]
    run = ["train", "--model", str(model_file()), "--out", str(tmp_path / "run"), "--device", "cpu", "--max-steps", "1"]
    assert main([*run, "--data", *make(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert re.search(f"^error: .*{message}", shown.err), shown.err
    assert shown.err.count("\n") == 1
    assert len(shown.err) < 700
    assert not (tmp_path / "run").exists()


def test_a_bad_line_stops_with_its_number_or_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "good"}, "", {"text": ""}, "{", {"text": "fine"})
    with pytest.raises(DataError, match=rf"^{path}:3: no answer tokens"):
        load(path)
    data = load(path, on_bad_line="skip")
    assert texts(data) == ["g[ood∅]", "f[ine∅]"]
    assert data.summary().endswith("2 bad lines skipped")


def test_nothing_left_quotes_the_first_problem(tmp_path: Path) -> None:
    path = write(tmp_path, "{,}", "nothing")
    with pytest.raises(DataError, match=rf"^{path}:1: broken JSON .*the first of 2 skipped examples; none is left"):
        load(path, on_bad_line="skip")


def test_sources_of_every_kind_together(tmp_path: Path) -> None:
    """In the order of --data, and --split counts through all of them."""
    lines = write(tmp_path, {"prompt": "q", "response": "a"})
    table = tmp_path / "t.csv"
    table.write_text("text\none\ntwo\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.txt").write_text("bee")
    (folder / "a.json").write_text('[{"text": "ay"}]')
    pair = binidx(tmp_path, [BYTE.encode("tokens")])
    want = ["User: q⏎⏎Assistant:[ a∅]", "o[ne∅]", "t[wo∅]", "a[y∅]", "b[ee∅]", "t[okens]"]
    assert texts(load(lines, table, folder, pair)) == want
    assert texts(load(lines, table, folder, pair, split="train[1:4]")) == want[1:4]
    assert texts(load(pair, lines, mask="qa")) == ["t[okens]", "User: q⏎⏎[Assistant: a∅]"]


def test_settings_of_text_have_no_effect_on_tokens(tmp_path: Path) -> None:
    pair = binidx(tmp_path, [BYTE.encode("tokens")])
    data = load(pair, template="raw", stop_token="24")
    assert data.notes == ["--template --stop-token: no effect, the data are tokens already"]
    assert load(pair, write(tmp_path, {"text": "ab"}), template="raw").notes == []


def test_tokens_of_any_vocabulary_train(tmp_path: Path, model_file: Callable[..., Path]) -> None:
    """Where the data are tokens already, nobody needs to know what they mean."""
    config = TrainConfig(
        model_file(vocab_size=1000), [str(binidx(tmp_path, [[1, 999, 5, 0], [700, 3]]))], tmp_path / "run", max_steps=1,
        device="cpu",
    )  # fmt: skip
    assert train(config).steps == 1
    with pytest.raises(ConfigError, match="--tokenizer auto: cannot tell for a vocabulary of 1000"):
        train(replace(config, data=[str(write(tmp_path, {"text": "a"}))], out=tmp_path / "other"))


def test_what_a_folder_holds_besides_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    binidx(folder, [BYTE.encode("tokens")])
    (folder / "README.md").write_text("about it")
    (folder / "odd.xyz").write_text("?")
    assert [note.partition(": ")[2] for note in load(folder).notes] == [
        "1 file of no known form left out, the first odd.xyz", "1 file about the data left out, the first README.md"
    ]  # fmt: skip


def test_prepared_data_are_the_same_data(tmp_path: Path) -> None:
    """But that their first tokens are learnt with the rest: which tokens are an answer is not kept."""
    path = write(tmp_path, {"prompt": "q", "response": "a"}, {"text": "some text"})
    prepare(PrepareConfig([str(path)], tmp_path / "out", tokenizer="byte"))
    before, after = load(path), load(tmp_path / "out")
    assert [before.piece(i).ids.tolist() for i in range(2)] == [after.piece(i).ids.tolist() for i in range(2)]


# --- the documentation


def table_of(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    section = DOCS.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    rows = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def learnt(value: Any, **settings: Any) -> str:
    config = DataConfig(["d"], **settings)
    template = find_template(config.template)
    [segments] = segments_of(value, None, template)
    piece = encoder_for(config, BYTE, template).encode(segments)
    shown, inside = "", False
    for index, target in zip(piece.ids.tolist(), piece.target.tolist(), strict=True):
        shown += ("[" if target else "]") if target != inside else ""
        inside = target
        shown += "∅" if index == 0 else " and U+0017" if index == 24 else BYTE.decode([index]).replace("\n", "⏎")
    return shown + "]" * inside


@pytest.mark.parametrize("row", table_of("Masks"), ids=lambda row: row[0])
def test_the_table_of_masks_is_true(row: list[str]) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    for mask in re.findall("`([a-z]+)`", row[0]):
        marks = {"mask_id": '{"mask0": "c", "mask1": "b"}'} if mask == "se" else {}
        assert re.findall("`(User.*)`", row[2].replace("U[ser", "User")) == [
            learnt(chat, mask=mask, **marks).replace("U[ser", "User")
        ]
        if row[3] == "an error":
            with pytest.raises(DataError):
                learnt({"text": "xyz"}, mask=mask)
        else:
            assert row[3] == f"`{learnt({'text': 'xyz'}, mask=mask, **marks)}`"


@pytest.mark.parametrize("row", table_of("Templates"), ids=lambda row: row[0])
def test_the_table_of_templates_is_true(row: list[str]) -> None:
    for written in re.findall("`([a-z0-9-]+)`", row[0]):
        name = f"g1-think{written}" if written.startswith("-") else written
        value = {"messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "A"} | ({"reasoning": "R"} if "⏎R⏎" in row[1] or "same" in row[1] else {}),
        ]}  # fmt: skip
        shown = learnt(value, template=name).replace("[", "").replace("]", "")
        if "the same" in row[1]:
            word = {"g1-think-word": " think", "g1-think-bit": " think a bit", "g1-think-lot": " think a lot"}[name]
            assert f"`{word}`" in row[1]
            assert shown == f"User: Q{word}⏎⏎Assistant: <think>⏎R⏎</think>⏎A∅"
        else:
            assert shown in row[1].replace("`", "").replace("the original program's: ", "")
