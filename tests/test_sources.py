"""Sources: every format to items, in constant memory, and the message for everything that can be wrong with them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.data.sources import (
    Item,
    Split,
    files_of,
    fingerprint,
    formats,
    read_items,
    read_pieces,
    reading,
    size_of,
    streams,
    texts,
)
from rwkv_peft.data.sources.places import has_texts
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError, DataError, RwkvPeftError

ROWS = [{"text": "a"}, {"text": 'zwei\nZeilen, "é👍"', "n": 1}, {"messages": [{"role": "user", "content": "Q"}]}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def read(path: Path, **settings: str) -> list[tuple[str, Any]]:
    """Origin, without the folder, and value of each item; errors as their text behind a `!`."""
    return [
        (
            item.origin.removeprefix(f"{path.parent}/"),
            f"!{item.value}" if isinstance(item.value, DataError) else item.value,
        )
        for item in read_items(str(path), **settings)
    ]


def written(path: Path, data: bytes) -> Path:
    """`path`, packed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PACKERS.get(path.suffix, bytes)(data))
    return path


def failure(path: Path, **settings: str) -> str:
    """What reading says, without the folder; it must be one line of ours."""
    with pytest.raises(RwkvPeftError) as caught:
        list(read_items(str(path), **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path.parent}/", "")


@contextmanager
def another_user() -> Iterator[None]:
    """As somebody who may not read everything, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


# --- formats


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(
    ("name", "data", "places"),
    [
        ("a.jsonl", LINES, [":1", ":2", ":3"]),
        ("a.NDJSON", b"\xef\xbb\xbf\n \r\n" + LINES.replace(b"\n", b"\r\n").rstrip(), [":3", ":4", ":5"]),
        ("a.json", json.dumps(ROWS).encode(), [": item 1", ": item 2", ": item 3"]),
        (
            "a.json",
            b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=3).encode() + b"\n\n",
            [": item 1", ": item 2", ": item 3"],
        ),
        ("a.json", b"\n" + LINES, [":2", ":3", ":4"]),
    ],
)
def test_objects_of_every_form(tmp_path: Path, name: str, data: bytes, places: list[str], packer: str) -> None:
    name += packer
    assert read(written(tmp_path / name, data)) == [
        (name + place, row) for place, row in zip(places, ROWS, strict=True)
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_one_example(tmp_path: Path, indent: int | None) -> None:
    path = written(tmp_path / "one.json", json.dumps(ROWS[1], indent=indent).encode())
    assert read(path) == [("one.json" + (":1" if indent is None else ""), ROWS[1])]


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(
    ("name", "data", "separator", "items"),
    [
        ("a.txt", "é\n\nb\n".encode(), "", [("", "é\n\nb\n")]),
        ("a.md", b"\xef\xbb\xbfa\r\nb\rc", "", [("", "a\nb\rc")]),
        ("a.text", b"a\n\nb\n\n\n\nc\n", "\n\n", [
            (": document 1", "a"), (": document 2", "b"), (": document 4", "c\n"),
        ]),
        ("a.txt", b"a\r\n\r\nb", "\n\n", [(": document 1", "a"), (": document 2", "b")]),
        ("a.txt", b"a<|x|> b<|x|>", "<|x|>", [(": document 1", "a"), (": document 2", " b")]),
        ("a.txt", b"a|\xff\n|c", "|", [
            (": document 1", "a"),
            (": document 2", "!not UTF-8 (byte 0xff at line 1 byte 1); save the file as UTF-8"),
            (": document 3", "c"),
        ]),
        ("a.txt", b"a\nbc\xe9d", "", [("", "!not UTF-8 (byte 0xe9 at line 2 byte 3); save the file as UTF-8")]),
    ],
)  # fmt: skip
def test_text(tmp_path: Path, name: str, data: bytes, separator: str, items: list[Any], packer: str) -> None:
    name += packer
    expected = [(name + place, value) for place, value in items]
    assert read(written(tmp_path / name, data), separator=separator) == expected


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(
    ("name", "data", "rows"),
    [
        ("t.csv", b'\xef\xbb\xbfa,b\r\n1,"x\r\ny, ""z"""\r\n\r\n,2\r\n', [
            {"a": "1", "b": 'x\r\ny, "z"'}, {"a": "", "b": "2"},
        ]),
        ("t.csv", b'a;b\n"1,5";2', [{"a": "1,5", "b": "2"}]),
        ("t.csv", b"\n,text\n0,x\n", [{"": "0", "text": "x"}]),
        ("t.tsv", "a\té\n1, 2\tx\n".encode(), [{"a": "1, 2", "é": "x"}]),
        ("t.csv", b"text\na; b\n", [{"text": "a; b"}]),
        ("t.csv", b"a,b\n1\n1,2,3\n5,6\n", [
            "!has 1 field, must have 2 as the header (line 2); quote fields that hold a ','",
            "!has 3 fields, must have 2 as the header (line 3); quote fields that hold a ','",
            {"a": "5", "b": "6"},
        ]),
        ("t.csv", b'a,b\n"x"y,2\n5,6\n', [
            "!broken CSV (',' expected after '\"'); mend its quotes", {"a": "5", "b": "6"},
        ]),
        ("t.csv", b'a,b\n"\n\xff",2\n5,6\n', [
            "!not UTF-8 (byte 0xff at byte 1 of the line); save the file as UTF-8", {"a": "5", "b": "6"},
        ]),
        ("t.csv", b"a,b\n\0,2\n5,6\n", [
            "!a NUL byte (line 2); save the file as UTF-8 text", {"a": "5", "b": "6"},
        ]),
    ],
)  # fmt: skip
def test_tables(tmp_path: Path, name: str, data: bytes, rows: list[Any], packer: str) -> None:
    name += packer
    expected = [(f"{name}: row {number}", row) for number, row in enumerate(rows, 1)]
    assert read(written(tmp_path / name, data)) == expected


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    writer.write_table(pyarrow.Table.from_pylist(rows), file, **options)
    return file.getvalue()


@pytest.mark.parametrize("packer", PACKERS)
def test_parquet(tmp_path: Path, packer: str) -> None:
    rows = [
        {"text": f"é{number}", "messages": [{"role": "user", "content": "Q"}] * (number % 3)} for number in range(50)
    ]
    path = written(tmp_path / f"t.parquet{packer}", parquet(rows, row_group_size=7))
    assert read(path) == [(f"{path.name}: row {number}", row) for number, row in enumerate(rows, 1)]


def test_a_parquet_row_that_python_cannot_hold(tmp_path: Path) -> None:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    offsets, text = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xffc")
    column = pyarrow.StringArray.from_buffers(3, offsets, text)
    writer.write_table(pyarrow.table({"text": column}), tmp_path / "t.parquet")
    first, second, third = read(tmp_path / "t.parquet")
    assert (first, third) == (("t.parquet: row 1", {"text": "a"}), ("t.parquet: row 3", {"text": "c"}))
    assert second[0] == "t.parquet: row 2"
    assert second[1].startswith("!a value cannot be read ('utf-8' codec")


def test_parquet_tables_without_rows_or_with_a_name_twice(tmp_path: Path) -> None:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "t.parquet")
    assert failure(tmp_path / "t.parquet") == "t.parquet: has no rows; write one example a row"
    writer.write_table(pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, ["a", "a"]), tmp_path / "t.parquet")
    assert failure(tmp_path / "t.parquet") == "t.parquet: names the column 'a' twice; rename one"


# --- what makes one item useless, and not the others


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "b"', "broken JSON at column 13: Expecting ',' delimiter; each line must be one whole JSON object"),
        (b'{"a": 1} x', "broken JSON at column 10: Extra data; each line must be one whole JSON object"),
        (b'{"text": "b\xc3"}', "not UTF-8 (byte 0xc3 at byte 12 of the line); save the file as UTF-8"),
        (b"[1]", "got a list, must be a JSON object; write one object a line, without a list around them"),
        (b"7", "got a number, must be a JSON object; write one object a line, without a list around them"),
        (b'{"n": ' + b"9" * 5000 + b"}", "broken JSON: Exceeds the limit"),
        (b'{"n": ' + b"[" * 200_000 + b"}", "broken JSON: maximum recursion depth exceeded"),
    ],
)
def test_a_bad_line_among_good_ones(tmp_path: Path, line: bytes, problem: str, packer: str) -> None:
    path = written(tmp_path / f"a.jsonl{packer}", b'{"text": "a"}\n' * 3000 + line + b'\n{"text": "c"}\n')
    items = read(path)
    assert [place for place, _ in items] == [f"{path.name}:{number}" for number in range(1, 3003)]
    assert [index for index, (_, value) in enumerate(items) if isinstance(value, str)] == [3000]
    assert items[3000][1].startswith(f"!{problem}")


@pytest.mark.parametrize(
    ("element", "problem"),
    [
        (b"7", "got a number, must be a JSON object; write {...} around its fields"),
        (b'"7, ]"', "got a string, must be a JSON object; write {...} around its fields"),
        (b"[[], {}]", "got a list, must be a JSON object; write {...} around its fields"),
        (b"null", "got null, must be a JSON object; write {...} around its fields"),
        ('{"é": "'.encode() + b'\xff"}', "not UTF-8 (byte 0xff at byte 9 of the object); save the file as UTF-8"),
    ],
)
def test_a_bad_element_among_good_ones(tmp_path: Path, element: bytes, problem: str) -> None:
    path = written(tmp_path / "l.json", b'[{"a": 1}, ' + element + b', {"a": "\\ud800"}]')
    assert read(path) == [
        ("l.json: item 1", {"a": 1}),
        ("l.json: item 2", f"!{problem}"),
        ("l.json: item 3", {"a": "\ud800"}),
    ]


# --- what ends the reading


FORM = "; must be a list of objects, one object, or one object a line"
NO_GZIP = "a.jsonl.gz: is no gzip file, or a damaged one (Error -3 while decompressing data: "
ANEW = "; copy or pack it anew"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: has no lines that are not blank; write one JSON object a line"),
        ("a.jsonl.gz", b" \n\r\n\t", "a.jsonl.gz: has no lines that are not blank; write one JSON object a line"),
        ("a.json", b"\n ", "a.json: is empty or blank; write a list of JSON objects"),
        ("a.json", b" []", "a.json: holds an empty list; write objects into it"),
        ("a.json", b'[{"a": 1}, {"b" 1}, {}]',
         "a.json: item 2: broken JSON at line 1 column 17: Expecting ':' delimiter" + FORM),
        ("a.json", b'[{"a": 1},\n  {"b": 1}\n  {}]',
         "a.json: item 2: broken JSON at line 3 column 3: a comma or the list's end is missing" + FORM),
        ("a.json", b'[{"a": 1},\n]', "a.json: item 2: broken JSON at line 2 column 1: Expecting value" + FORM),
        ("a.json", b'[{"a": 1}', "a.json: item 1: broken JSON at line 1 column 10: the list is never closed" + FORM),
        ("a.json", b'[{"a": 1}, {"b": "x',
         "a.json: item 2: broken JSON at line 1 column 18: Unterminated string starting at" + FORM),
        ("a.json", b'[{"a": 1}]\n x', "a.json: broken JSON at line 2 column 2: more follows the list" + FORM),
        ("a.json", b'{\n"a": 1}\n{"b": 2}',
         "a.json: broken JSON at line 3 column 1: more follows the first object" + FORM),
        ("a.json", b'{"a": 1\n{"b": 2}',
         "a.json: broken JSON at line 2 column 1: Expecting ',' delimiter" + FORM),
        ("a.json", b"[" + b"[" * 200_000,
         "a.json: item 1: broken JSON at line 1 column 2: maximum recursion depth exceeded"),
        ("a.json", b"text", "a.json: broken JSON at line 1 column 1: Expecting value" + FORM),
        ("a.json", '{"a": 1}'.encode("utf-16"), "a.json: is UTF-16 or UTF-32, must be UTF-8; save the file as UTF-8"),
        ("a.txt", b" \n", "a.txt: is empty or blank; write text into it"),
        ("t.csv", b"", "t.csv: has no rows; write the names of the fields into the first line, and"),
        ("t.csv", b"a,b\n\n", "t.csv: has no rows; write the names of the fields into the first line, and"),
        ("t.csv", b"a,b,a\n1,2,3\n", "t.csv: the header: names the field 'a' twice; rename one"),
        ("t.csv", b"a,\xff\n1,2\n",
         "t.csv: the header: not UTF-8 (byte 0xff at byte 3 of the line); save the file as UTF-8"),
        ("t.csv", b'a,b\n1,2\n3,"4\n5,6\n',
         "t.csv: the quote that opens at line 3 is never closed; close or double it"),
        ("t.parquet", b"PAR1 but no more PAR1", "t.parquet: is no Parquet file, or a damaged one ("),
        ("t.parquet", b"", "t.parquet: is no Parquet file, or a damaged one ("),
        ("a.jsonl.bz2", b"x", "a.jsonl.bz2: unknown suffix '.bz2'; rename it to what it is: .jsonl, .ndjson, .json, "
         ".csv, .tsv, .parquet, .txt, .text, .md, each also with .gz or .zst behind it"),
        ("a.bin.gz", b"x", "a.bin.gz: unknown suffix '.bin.gz'; rename it"),
        ("data", b"x", "data: has no suffix; rename it"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    said = failure(written(tmp_path / name, data))
    assert said[: None if message.endswith(FORM) else len(message)] == message


def random_lines(count: int) -> bytes:
    """Lines that pack badly, so that a packed file ends in the middle of them wherever it is cut."""
    source = random.Random(0)
    return b"".join(b'{"text": "%x"}\n' % source.getrandbits(2000) for _ in range(count))


@pytest.mark.parametrize("packer", [".gz", ".zst"])
def test_a_cut_off_file_gives_its_whole_lines_and_then_fails(tmp_path: Path, packer: str) -> None:
    lines = random_lines(2000)
    path = tmp_path / f"a.jsonl{packer}"
    packed = PACKERS[packer](lines)
    path.write_bytes(packed[: len(packed) * 2 // 3])
    numbers = []
    with pytest.raises(DataError) as caught:
        for item in read_items(str(path)):
            assert item.value == json.loads(lines.splitlines()[len(numbers)])
            numbers.append(item.origin)
    assert 1000 < len(numbers) < 2000
    form = "gzip" if packer == ".gz" else "Zstandard"
    assert str(caught.value) == f"{path}: is cut off: the {form} file ends too early after line {len(numbers)}{ANEW}"


@pytest.mark.parametrize(
    ("name", "packed", "message"),
    [
        ("a.jsonl.gz", LINES, NO_GZIP + "incorrect header check) from its beginning" + ANEW),
        ("a.jsonl.zst", LINES, "a.jsonl.zst: is no Zstandard file, or a damaged one ("),
        ("a.jsonl.gz", gzip.compress(LINES)[:-8] + b"\0" * 8, NO_GZIP + "incorrect data check)"),
        ("a.jsonl.gz", gzip.compress(LINES) + LINES, NO_GZIP + "incorrect header check) after line 3" + ANEW),
        ("l.json.gz", gzip.compress(b'[{"a": 1}, {"b": 2}, {"c')[:-9], "l.json.gz: is cut off: the gzip file ends too "
         "early after item 2" + ANEW),
        ("t.csv.gz", gzip.compress(b"a,b\n1,2\n3,4\n5,")[:-9], "t.csv.gz: is cut off: the gzip file ends too early "
         "after row 2" + ANEW),
        ("t.parquet.gz", gzip.compress(b"x" * 99)[:-9], "t.parquet.gz: is cut off: the gzip file ends too early from "
         "its beginning" + ANEW),
    ],
)  # fmt: skip
def test_damaged_packed_files(tmp_path: Path, name: str, packed: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(packed)
    assert failure(tmp_path / name).startswith(message)


@pytest.mark.parametrize("packer", [".gz", ".zst"])
def test_packed_files_of_several_members(tmp_path: Path, packer: str) -> None:
    pack, (first, *others) = PACKERS[packer], LINES.splitlines(keepends=True)
    skippable = b"\x50\x2a\x4d\x18\4\0\0\0skip" if packer == ".zst" else b""
    padding = b"\0" * 512 if packer == ".gz" else b""
    path = tmp_path / f"a.jsonl{packer}"
    path.write_bytes(pack(first[:5]) + skippable + pack(first[5:]) + pack(b"") + pack(b"".join(others)) + padding)
    assert [value for _, value in read(path)] == ROWS


@given(
    data=st.binary(max_size=60),
    at=st.integers(0, 400),
    name=st.sampled_from(["a.jsonl.gz", "a.json.zst", "t.parquet", "t.csv"]),
)
@settings(max_examples=150, deadline=None)
def test_no_damage_gives_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: bytes, at: int, name: str) -> None:
    rows = [{"a": f"x{number}"} for number in range(9)]
    whole = {
        "a.jsonl.gz": gzip.compress(LINES), "a.json.zst": zstandard.compress(json.dumps(rows).encode()),
        "t.parquet": parquet(rows), "t.csv": b"a,b\n" + b'1,"2\n"\n' * 20,
    }[name]  # fmt: skip
    path = tmp_path_factory.mktemp("damage") / name
    at %= len(whole)
    path.write_bytes(whole[:at] + data + whole[at + len(data) // 2 :])
    try:
        for item in read_items(str(path)):
            assert isinstance(item.value, dict | DataError)
    except RwkvPeftError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.jsonl", "no.jsonl: no such file; give --data the path of a file or folder, or a dataset's name"),
        ("no/a/b", "b: no such file; give --data the path"),
        ("x" * 300 + ".jsonl", "cannot be read (File name too long); give --data what can be"),
        ("a\0b.jsonl", "b.jsonl': names nothing; give the path of a file or folder"),
        ("fifo.jsonl", "fifo.jsonl: is not a regular file; write what it gives into one, and give --data that"),
        ("empty", "empty: holds no file to be read; allowed are .jsonl, .ndjson, .json, .csv"),
        ("pictures", "pictures: holds no file to be read, but p.png of no known form; allowed are .jsonl, .ndjson"),
        ("card", "card: holds no file to be read, but README.md, as what tells of the data is called; rename it, or "
         "give --data the file itself"),
        ("secret.jsonl", "cannot be read (Permission denied); give --data "),
        ("closed", "cannot be read (Permission denied); give --data "),
    ],
)  # fmt: skip
def test_paths_that_lead_nowhere(tmp_path: Path, name: str, message: str) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "empty").mkdir()
    written(tmp_path / "empty" / ".hidden", b"")
    written(tmp_path / "pictures" / "p.png", b"")
    written(tmp_path / "card" / "README.md", b"# Data")
    written(tmp_path / "secret.jsonl", LINES).chmod(0)
    written(tmp_path / "closed" / "a.jsonl", LINES).parent.chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    try:
        with another_user():
            assert message in failure(tmp_path / name)
    finally:
        (tmp_path / "closed").chmod(0o755)


def test_devices_and_empty_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    assert failure(tmp_path / "zero.txt").startswith("zero.txt: is not a regular file; ")
    with pytest.raises(DataError, match=r"^--data '': names nothing; "):
        list(read_items(""))


def test_a_line_or_value_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LONGEST", 1 << 21)
    monkeypatch.setattr(formats, "LONGEST", 1 << 21)
    lines = written(tmp_path / "a.jsonl", LINES + b"x" * (1 << 23))
    assert failure(lines) == "a.jsonl: line 4 has more than 2,097,152 bytes; write one example a line"
    value = written(tmp_path / "a.json", b'[{"a": 1}, {"b": "' + b"x" * (1 << 23))
    assert failure(value).startswith(
        "a.json: item 2: broken JSON at line 1 column 12: a value of more than 2,097,152 characters"
    )


# --- memory and pieces


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json.zst", "l.json", "l.json.gz", "t.csv", "d.txt", "t.csv.gz"]
)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(streams, "BLOCK", 1 << 17)
    source, count = random.Random(0), 10_000
    texts = [f"é{source.getrandbits(1500):x}" for _ in range(count)]
    data = {
        "a": "\n".join(f'{{"text": "{text}"}}' for text in texts),
        "l": "[" + ",\n".join(f'{{"text": "{text}"}}' for text in texts) + "]",
        "t": "x,y\n" + "".join(f"{text},b\n" for text in texts),
        "d": "".join(f"{text}\n" for text in texts),
    }[name[0]]
    path = written(tmp_path / name, data.encode())
    tracemalloc.start()
    try:
        found = sum(not isinstance(item.value, DataError) for item in read_items(str(path), separator="\n"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == count
    assert peak < len(data) / 3  # 3.8 MB


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=12), max_size=3), min_size=1, max_size=8),
    indent=st.sampled_from([None, 0, 2]), size=st.integers(1, 9), ascii_only=st.booleans(),
)  # fmt: skip
@settings(deadline=None)
def test_where_blocks_end_does_not_matter(
    rows: list[dict[str, str]], indent: int | None, size: int, ascii_only: bool
) -> None:
    def blocks(text: str) -> Iterator[bytes]:
        data = text.encode()
        return streams.text_blocks(data[at : at + size] for at in range(0, len(data), size))

    dump = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    assert [value for _, value in formats.json_file(blocks(dump))] == rows
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\r\n" for row in rows)
    for read_lines in (formats.json_lines, formats.json_file):
        assert [value for _, value in read_lines(blocks(lines))] == rows
    documents = ["a" + "".join(row.values()).replace("\r", "").replace("\n", "") for row in rows]
    found = [value for _, value in texts.text_file(blocks("\r\n\r\n".join(documents)), "\n\n")]
    assert found == documents


# --- long texts, in parts

HARD = (
    "Zeile eins\r\nword\n\n  def f(x):\n\treturn x;\n“Ja?”\n我们来谈谈。\n人工智能！\n第一章\n…\n👩‍👩‍👧‍👦\n"
    "\x00e\u0301 \u3000\n1.\r\r\nEnde\n\n"
)


def parts_in(data: bytes, size: int = 7, special_tokens: tuple[str, ...] = ()) -> list[tuple[bytes, bool]]:
    blocks = (data[at : at + size] for at in range(0, len(data), size))
    return list(texts.parts_of(texts.with_line_feeds(blocks), texts.cut_of(special_tokens)))


@pytest.mark.parametrize("tokenizer", [Tokenizer.world(), Tokenizer.byte()], ids=["world", "byte"])
def test_no_token_goes_across_a_place_where_a_part_may_end(tokenizer: Tokenizer) -> None:
    cut = texts.cut_of(())
    assert all(cut.search(letter.encode() + b"\n") for letter in "azAZ09.;,:!?)}]\"'”字")
    assert sum(bool(cut.search(token)) for token in tokenizer._tokens) == 0
    assert sum(b"\n" in token[1:] for token in Tokenizer.world()._tokens) > 90  # so that there are some to be found


def test_no_part_begins_or_ends_a_text_that_is_blank() -> None:
    characters = map(chr, filter(lambda code: not 0xD800 <= code < 0xE000, range(0x110000)))
    blanks = [character for character in characters if character.isspace()]
    assert len(blanks) > 20
    assert not any(blank.encode()[-1] in texts.CUT_AFTER for blank in blanks)


@given(
    text=st.lists(st.sampled_from([*HARD, "a\n", "<|end|>\n", "b\r\n", "\n\n"]), max_size=60).map("".join),
    part=st.integers(1, 9), size=st.integers(1, 9),
    special_tokens=st.sampled_from([(), ("<|end|>\n",), ("a\nb", ";\n\n"), ("n\n", "\n<|end|>")]),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_the_tokens_of_the_parts_are_those_of_the_text(
    text: str, part: int, size: int, special_tokens: tuple[str, ...]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PART", part)
        parts = parts_in(text.encode(), size, special_tokens)
        assert parts == parts_in(text.encode(), 1000, special_tokens)
    whole = text.replace("\r\n", "\n")
    assert b"".join(raw for raw, _ in parts) == whole.encode()
    assert [more for _, more in parts] == [True] * (len(parts) - 1) + [False]
    for plain in (Tokenizer.world(), Tokenizer.byte()):
        tokenizer = plain.with_special(special_tokens, 65536)
        assert [i for raw, _ in parts for i in tokenizer.encode(raw.decode())] == tokenizer.encode(whole)


def test_parts_are_cut_where_they_may_be_and_else_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PART", 4)
    assert parts_in(b"a\nb\nc\n") == [(b"a\nb\nc", True), (b"\n", False)]
    assert parts_in(b"a  \n  \n x\ny") == [(b"a  \n  \n x", True), (b"\ny", False)]
    assert parts_in("。\n".encode() * 9) == [("。\n".encode() * 9, False)]
    assert parts_in(b"....\n....\n", special_tokens=("x.\n",)) == [(b"....\n....\n", False)]
    assert parts_in(b"....\n....\n", special_tokens=("x.", "\n")) == [
        (b"....", True),
        (b"\n....", True),
        (b"\n", False),
    ]


@pytest.mark.parametrize("packer", PACKERS)
def test_a_long_text_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packer: str) -> None:
    monkeypatch.setattr(texts, "PART", 4)
    path = written(tmp_path / f"a.txt{packer}", b"\xef\xbb\xbfline\r\ntwo\r\n\r\n")
    name = str(path)
    assert list(read_items(name)) == [
        Item(name, "line", more=True),
        Item(name, "\ntwo", True, True),
        Item(name, "\n\n", True),
    ]
    assert list(read_items(str(written(tmp_path / f"b.txt{packer}", b"word\r")))) == [
        Item(f"{tmp_path}/b.txt{packer}", "word\r")
    ]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b"\xff", "byte 0xff at line 1002 byte 4"),
        (b"\n\n\xe3\x81\n", "byte 0xe3 at line 1004 byte 1"),
        (b"\r\n" * 3 + b"b" * 99 + b"\x90\n" * 9, "byte 0x90 at line 1005 byte 100"),
    ],
)
def test_none_of_a_long_text_is_used_if_some_is_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: bytes, problem: str
) -> None:
    monkeypatch.setattr(texts, "PART", 50)
    data = "é line\r\n".encode() * 1001 + b"abc" + bad + b"more\n" * 100
    path = written(tmp_path / "a.txt", data)
    assert read(path) == [("a.txt", f"!not UTF-8 ({problem}); save the file as UTF-8")]
    monkeypatch.setattr(texts, "PART", 1 << 20)
    assert read(path) == [("a.txt", f"!not UTF-8 ({problem}); save the file as UTF-8")]


def test_a_long_text_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PART", 1 << 16)
    path = written(tmp_path / "a.txt", b"word\n" * 1_000_000)
    items = read_items(str(path))
    next(items)
    path.write_bytes(b"\xff" * 5_000_000)
    with pytest.raises(DataError, match=rf"^{path}: changed while it was read; start again when it is complete$"):
        list(items)


@pytest.mark.parametrize("packer", PACKERS)
def test_memory_does_not_grow_with_a_text_of_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packer: str
) -> None:
    monkeypatch.setattr(streams, "BLOCK", 1 << 16)
    monkeypatch.setattr(texts, "PART", 1 << 16)
    source = random.Random(0)
    lines = [f"谈谈人工智能\r\n{source.getrandbits(1000):0250x}\r\n" for _ in range(20_000)]
    path = written(tmp_path / f"a.txt{packer}", "".join(lines).encode())
    tracemalloc.start()
    try:
        size = sum(len(str(item.value).encode()) for item in read_items(str(path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 20_000 * (18 + 250 + 2)
    assert peak < size / 3  # 5.4 MB


# --- pieces


@given(
    lines=st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), max_size=20),
    block=st.integers(1, 30), size=st.integers(1, 9), ends=st.booleans(), damaged=st.booleans(),
)  # fmt: skip
@settings(deadline=None)
def test_lines_are_together_whatever_the_blocks(
    lines: list[bytes], block: int, size: int, ends: bool, damaged: bool
) -> None:
    data = b"\n".join(lines) + b"\n" * ends

    def blocks(size: int) -> Iterator[bytes]:
        yield from (data[at : at + size] for at in range(0, len(data), size))
        if damaged:
            raise streams.DamagedError("is cut off; copy it")

    def found(size: int) -> list[tuple[int, bytes]]:
        pieces = []
        with suppress(streams.DamagedError):
            for piece in streams.line_blocks(blocks(size)):
                pieces.append(piece)
            assert not damaged
        return pieces

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BLOCK", block)
        pieces = found(size)
        assert pieces == found(1000)
    assert b"".join(text for _, text in pieces) == (data[: data.rfind(b"\n") + 1] if damaged else data)
    ends_of = [0, *accumulate(text.count(b"\n") for _, text in pieces)]
    assert [number for number, _ in pieces] == [1 + lines for lines in ends_of[:-1]]
    assert all(len(text) >= block and text.endswith(b"\n") for _, text in pieces[:-1])


def packed_parquet(rows: int) -> bytes:
    return parquet([{"text": f"{number:x}" * 9} for number in range(rows)], row_group_size=70)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "t.csv", "short.txt", "long.txt", "d.md", "t.parquet"])
def test_the_bytes_of_a_file_are_told_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, packer: str
) -> None:
    monkeypatch.setattr(streams, "BLOCK", 5_000)
    monkeypatch.setattr(streams, "PACKED_BLOCK", 100)
    monkeypatch.setattr(reading.hub, "MOST_ROWS", 100)
    monkeypatch.setattr(texts, "PART", 5_000 if name == "long.txt" else 10**6)
    lines = b'{"a": "%x"}\n' % random.Random(0).getrandbits(99) * 2000
    path = written(tmp_path / f"{name}{packer}", packed_parquet(2000) if name == "t.parquet" else lines)
    seen: list[int] = []
    before = []
    for _ in read_pieces(str(path), separator="\n" if name == "d.md" else "", watch=seen.append):
        before.append(sum(seen))
    assert sum(seen) == size_of(path) == path.stat().st_size
    if not packer and name not in ("short.txt", "a.json"):
        assert 0 <= before[0] < before[len(before) // 2] < path.stat().st_size


def test_the_size_of_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "f" / "a.jsonl", LINES)
    written(tmp_path / "f" / "sub" / "train.txt.gz", b"text")
    written(tmp_path / "f" / "test.jsonl", LINES)
    sizes = [path.stat().st_size for path in (tmp_path / "f" / "a.jsonl", tmp_path / "f" / "sub" / "train.txt.gz")]
    assert size_of(tmp_path / "f" / "a.jsonl") == sizes[0]
    assert size_of(tmp_path / "f") == sizes[1]
    assert size_of("org/name") is None


CELLS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(rows=st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1))
@settings(deadline=None)
def test_what_the_csv_module_writes_is_read_again(rows: list[list[str]]) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["x", "y"], *rows])
    assert [value for _, value in formats.csv_file(iter([file.getvalue().encode()]), ",")] == [
        {"x": x, "y": y} for x, y in rows
    ]


# --- folders


def folder_of(tmp_path: Path, *names: str) -> Path:
    for name in names:
        written(tmp_path / "d" / name, LINES)
    return tmp_path / "d"


def names(folder: Path, paths: list[Any]) -> list[str]:
    return [str(path).removeprefix(f"{folder}/") for path in paths]


@pytest.mark.parametrize(
    ("there", "split", "chosen", "left_out"),
    [
        ("b.jsonl a.jsonl s/c.jsonl.gz x.png .hidden.jsonl .h/a.jsonl p.partial/a.jsonl a.jsonl.partial", "train",
         "a.jsonl b.jsonl s/c.jsonl.gz", ""),
        ("train.jsonl test.jsonl", "train[:10]", "train.jsonl", "test.jsonl"),
        ("train.jsonl test.jsonl", "test[:10]", "test.jsonl", "train.jsonl"),
        ("a/train-00000-of-00002.jsonl a/train-00001-of-00002.jsonl a/dev2.jsonl", "validation", "a/dev2.jsonl",
         "a/train-00000-of-00002.jsonl a/train-00001-of-00002.jsonl"),
        ("training/a.jsonl eval/a.jsonl val/b.jsonl", "test", "eval/a.jsonl", "training/a.jsonl val/b.jsonl"),
        ("train/contest.jsonl train/attest.jsonl latest.jsonl", "train", "train/attest.jsonl train/contest.jsonl",
         "latest.jsonl"),
        ("a.jsonl my_Test.jsonl", "train", "a.jsonl", "my_Test.jsonl"),
        ("train/test.jsonl train/a.jsonl", "train", "train/a.jsonl", "train/test.jsonl"),
        ("train_sft-1.jsonl test_sft-1.jsonl", "train_sft", "train_sft-1.jsonl", "test_sft-1.jsonl"),
        ("a.jsonl README.md LICENSE.txt", "train", "a.jsonl", ""),
    ],
)  # fmt: skip
def test_files_of_a_folder(tmp_path: Path, there: str, split: str, chosen: str, left_out: str) -> None:
    folder = folder_of(tmp_path, *there.split())
    found = files_of(str(folder), split)
    assert names(folder, found.files) == chosen.split()
    assert names(folder, found.left_out) == left_out.split()
    assert len(found.papers) == there.count("README") + there.count("LICENSE")
    origins = [item.origin for item in read_items(str(folder), split)]
    assert origins == [f"{path}:{number}" for path in found.files for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("there", "notes"),
    [
        ("a.jsonl .hidden b.partial/x c.png.partial p.idx p.bin", []),
        ("a.jsonl c.jsn", ["d: 1 file of no known form left out, the first c.jsn"]),
        ("a.jsonl s/d.jsonl.bz2 b.jsonl.xz q.bin", ["d: 3 files of no known form left out, the first b.jsonl.xz"]),
        (
            "train.jsonl test/b.jsonl test/c.jsn README.md LICENSE s/readme",
            [
                "d: 1 file of other splits left out",
                "d: 1 file of no known form left out, the first test/c.jsn",
                "d: 3 files about the data left out, the first LICENSE",
            ],
        ),
        ("a.jsonl x\ny", ["d: 1 file of no known form left out, the first 'x\\ny'"]),
    ],
)
def test_every_file_that_is_not_read_is_told(tmp_path: Path, there: str, notes: list[str]) -> None:
    folder = folder_of(tmp_path, *there.split(" "))
    found = files_of(folder)
    assert [note.removeprefix(f"{tmp_path}/") for note in found.notes(folder)] == notes
    every = [*found.files, *found.left_out, *found.papers, *found.unknown]
    seen = [name for name in there.split(" ") if name[0] != "." and ".partial" not in name and name[:2] != "p."]
    assert sorted(names(folder, every)) == sorted(seen)


def test_sources_that_hold_text(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "train.jsonl", "test.txt.gz")
    assert [has_texts(folder, split) for split in ("train", "test[:3]")] == [False, True]
    assert [has_texts(folder / name) for name in ("train.jsonl", "test.txt.gz")] == [False, True]
    assert not has_texts("owner/name")


def test_links_are_followed_but_not_round_and_round(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "s/a.jsonl")
    (folder / "s" / "loop").symlink_to(folder)
    (folder / "t").symlink_to(folder / "s")
    (folder / "b.jsonl").symlink_to(folder / "s" / "a.jsonl")
    assert names(folder, files_of(folder).files) == ["b.jsonl", "s/a.jsonl"]
    (folder / "broken.jsonl").symlink_to(folder / "nowhere")
    assert (
        failure(folder) == "d/broken.jsonl: no such file; give --data the path of a file or folder, or a dataset's name"
    )


def test_binidx_pairs_of_a_folder_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "train.idx", "train.bin", "test.idx", "test.bin", "model.bin")
    found = files_of(folder)
    assert (names(folder, found.pairs), names(folder, found.left_out)) == (["train"], ["test.idx"])
    assert failure(folder) == "d: holds only binidx files; give --data their prefixes, e.g. d/train"
    assert names(folder, [name for name, _, _ in fingerprint(folder)["files"]]) == ["train.bin", "train.idx"]


@pytest.mark.parametrize(
    ("there", "split", "message"),
    [
        ("a.jsonl", "test", "--split test: d has only files of train; choose one"),
        ("test.jsonl dev.jsonl", "train", "--split train: d has only files of test, validation; choose one"),
        (
            "a.jsonl",
            "train[",
            "--split train[: no known form; write train, train[:1000], train[1000:] or train[10%:90%]",
        ),
    ],
)
def test_splits_that_a_folder_lacks(tmp_path: Path, there: str, split: str, message: str) -> None:
    assert failure(folder_of(tmp_path, *there.split()), split=split) == message


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    said = failure(written(tmp_path / "a.jsonl", LINES), split="test[:3]")
    assert said == "--split test[:3]: a.jsonl is one file, which has no splits; write train, or cut train[a:b]"
    assert len(read(tmp_path / "a.jsonl", split="train[:1]")) == 3  # the caller cuts


# --- splits and fingerprints


@pytest.mark.parametrize(
    ("split", "name", "of_ten", "most"),
    [
        ("train", "train", range(10), None),
        (" test ", "test", range(10), None),
        ("train[:3]", "train", range(3), 3),
        ("train[2:4]", "train", range(2, 4), 4),
        ("train[2:0]", "train", range(0), 0),
        ("train[7:]", "train", range(7, 10), None),
        ("my_split.v-2[:]", "my_split.v-2", range(10), None),
        ("train[-3:]", "train", range(7, 10), None),
        ("train[-3:9]", "train", range(7, 9), None),
        ("train[:-3]", "train", range(7), None),
        ("train[10%:94%]", "train", range(1, 9), None),
        ("train[-20%:]", "train", range(8, 10), None),
        ("train[10%:3]", "train", range(1, 3), None),
        ("train[:500]", "train", range(10), 500),
    ],
)
def test_split(split: str, name: str, of_ten: range, most: int | None) -> None:
    found = Split.parse(split)
    assert (found.name, range(10)[found.of(10)], found.most) == (name, of_ten, most)


@pytest.mark.parametrize(
    "split", ["", "train[", "train[3]", "train[:3.5]", "train[a:b]", "[:3]", "train[:3]x", "train+test", "3",
              f"train[:{'9' * 19}%]"],
)  # fmt: skip
def test_splits_of_no_known_form(split: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Split.parse(split)
    assert (
        str(caught.value)
        == f"--split {split}: no known form; write train, train[:1000], train[1000:] or train[10%:90%]"
    )


@pytest.mark.parametrize(
    ("split", "shown"),
    [(f"train[{'9' * 400}:]", "'train[999999...99999999999:]'"), ("train\nx", "'train\\nx'")],
)
def test_splits_that_are_long_or_no_line_are_shown_short(split: str, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Split.parse(split)
    assert str(caught.value).startswith(f"--split {shown}: no known form; write train")


def test_fingerprints_change_with_the_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.jsonl", "test.jsonl")
    before = fingerprint(folder)
    stats = (folder / "a.jsonl").stat()
    assert before == {"files": [[str(folder / "a.jsonl"), stats.st_size, stats.st_mtime_ns]]}
    assert json.loads(json.dumps(before)) == before == fingerprint(str(folder))
    assert fingerprint(folder / "a.jsonl") == before
    written(folder / "test.jsonl", b"{}")
    assert fingerprint(folder) == before
    os.utime(folder / "a.jsonl", ns=(0, 0))
    assert fingerprint(folder) != before
    assert fingerprint("org/name") == {"files": [], "hub": "org/name"}
    with pytest.raises(DataError, match="no such file"):
        fingerprint(tmp_path / "no.jsonl")


# --- folders of save_to_disk


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets")
    top = tmp_path_factory.mktemp("saved")
    one = datasets.Dataset.from_list([{"text": f"é{number}", "m": [{"a": number}]} for number in range(2500)])
    one.select(range(2499, -1, -1)).save_to_disk(str(top / "one"))
    two = datasets.DatasetDict(train=one.select([1, 2]), test=one.select([3]), none=one.select([]))
    two.save_to_disk(str(top / "two"))
    return top


def test_saved_datasets(saved: Path) -> None:
    items = read(saved / "one")
    assert items[:2] == [
        ("one: row 1", {"text": "é2499", "m": [{"a": 2499}]}),
        ("one: row 2", {"text": "é2498", "m": [{"a": 2498}]}),
    ]
    assert len(items) == 2500
    assert read(saved / "two", split="test[:1]") == [("two[test]: row 1", {"text": "é3", "m": [{"a": 3}]})]
    assert [value["text"] for _, value in read(saved / "two")] == ["é1", "é2"]
    assert not files_of(saved / "two").left_out
    assert len(fingerprint(saved / "two")["files"]) >= 7


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("one", "test", "--split test: one holds one dataset, whose split is train"),
        ("two", "dev", "--split dev: two has the splits train, test, none; choose one"),
    ],
)
def test_splits_that_a_saved_dataset_lacks(saved: Path, name: str, split: str, message: str) -> None:
    assert failure(saved / name, split=split) == message


def test_an_empty_split_of_a_saved_dataset(saved: Path) -> None:
    assert failure(saved / "two", split="none").startswith("two: ")


def test_a_damaged_saved_dataset(tmp_path: Path, saved: Path) -> None:
    import shutil

    folder = tmp_path / "one"
    shutil.copytree(saved / "one", folder)
    table = next(folder.glob("*.arrow"))
    table.write_bytes(table.read_bytes()[:5000])
    assert failure(folder).startswith("one: cannot be loaded (")
    (folder / "state.json").write_text("{")
    assert failure(folder).startswith("one: cannot be loaded (")


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, needed_by: str) -> Any:
        raise ConfigError(f"{needed_by}: needs the package {module}")

    monkeypatch.setattr(reading.hub, "optional", missing)
    monkeypatch.setattr(streams, "optional", missing)
    assert failure(written(tmp_path / "a.jsonl.zst", LINES)) == "a.jsonl.zst: needs the package zstandard"
    assert failure(Path("name")) == (
        "name: no such file or folder; give --data one that exists, or, if it is a dataset on the hub, "
        "pip install 'rwkv-peft[data]'"
    )
