"""Datasets of the hub, from a small one on this machine that answers what the libraries really ask."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from rwkv_peft.data.sources import read_items
from rwkv_peft.data.sources.hub import LOGGERS, _said_of_hub, logs_if_it_works, one_line
from rwkv_peft.errors import DataError

pytest.importorskip("datasets")

COMMIT = "a" * 40
TOKEN = "hf_" + "S3cret" * 5
CONFIGURED = (
    b"---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n- config_name: fr\n  data_files: fr.jsonl\n---\n"
)


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


CHATS = [
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "é", "n": 1}]},
    {"messages": []},
]
FILES: dict[str, dict[str, bytes]] = {
    "org/plain": {
        "README.md": b"# A card\n",
        "data/train.jsonl": lines(*({"text": f"é{number}"} for number in range(5))),
        "data/test.jsonl": lines({"text": "t"}),
    },
    "org/chats": {"train.jsonl": lines(*CHATS)},
    "org/configured": {"README.md": CONFIGURED, "en.jsonl": lines({"text": "e"}), "fr.jsonl": lines({"text": "f"})},
    "org/damaged": {"train.jsonl": lines({"text": "a"}) + b'{"text":\n'},
    "org/nothing": {"README.md": b"# A card\n"},
    "org/big": {f"train-{number}.jsonl": lines(*[{"text": f"{number}"}] * 3000) for number in range(6)},
}
OLD_NAMES = {"plain": "org/plain"}
# Repository → what every question about it is answered with
ERRORS = {
    "org/gated": (403, "GatedRepo"),
    "org/private": (401, "RepoNotFound"),
    "org/broken": (500, ""),
    "broken": (503, ""),
}


@dataclass
class Hub:
    """A running hub and what it was asked."""

    address: str
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.hub = found = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


class Answers(BaseHTTPRequestHandler):
    """`/api/datasets/NAME…` tells of a repository and its files, `/datasets/NAME/resolve/…` gives one."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        address = urlsplit(self.path)
        path, body = unquote(address.path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        hub.tokens.add(self.headers.get("Authorization", ""))
        for name, (code, meaning) in ERRORS.items():
            if f"/datasets/{name}/" in path + "/":
                return self.answer(code, b'{"error": "no"}', {"X-Error-Code": meaning})
        for old, new in OLD_NAMES.items():
            path = path.replace(f"/datasets/{old}", f"/datasets/{new}") if path == f"/api/datasets/{old}" else path
        for name, files in FILES.items():
            rest = path.removeprefix("/api").removeprefix(f"/datasets/{name}")
            if rest.startswith("/resolve/"):
                return self.give(files.get(rest.split("/", 3)[3]))
            if path.startswith(f"/api/datasets/{name}/") or path == f"/api/datasets/{name}":
                return self.tell(name, files, rest, body, "recursive=true" in address.query.lower())
        return self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_POST = do_GET  # noqa: N815 - the names that http.server calls

    def give(self, data: bytes | None) -> None:
        if data is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if not wanted:
            return self.answer(200, data, headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        return self.answer(206, part, headers)

    def tell(self, name: str, files: dict[str, bytes], rest: str, body: bytes, deep: bool) -> None:
        found: Any
        folders = {file.rpartition("/")[0] for file in files} - {""}
        known = {
            **{file: {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": file}
               for file, data in files.items()},
            **{folder: {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders},
        }  # fmt: skip
        if rest.startswith("/tree/"):
            folder = "/".join(rest.split("/")[3:])
            found = [
                entry for path, entry in known.items()
                if (path.rpartition("/")[0] == folder or (deep and path.startswith(folder))) and path != folder
            ]  # fmt: skip
            if not found:
                return self.give(None)
        elif rest.startswith("/paths-info/"):
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            found = [known[path] for path in asked if path in known]
        else:
            found = {"id": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
            found["siblings"] = [{"rfilename": file} for file in files]
        return self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


READ = """
import itertools, json, sys, time

time.sleep = lambda seconds: None  # or the libraries' patience with a broken hub would cost half a minute

from rwkv_peft.data.sources import read_items
from rwkv_peft.errors import DataError, RwkvPeftError

def read(path, **settings):
    try:
        items = itertools.islice(read_items(path, **settings), 9)
        return [(item.origin, f"!{item.value}" if isinstance(item.value, DataError) else item.value) for item in items]
    except RwkvPeftError as error:
        return f"{type(error).__name__}: {error}"

print("\\n" + json.dumps([read(**call) for call in json.load(sys.stdin)]))
"""


def read(calls: list[dict[str, str]], home: Path, **environment: str) -> tuple[list[Any], str]:
    """What `read_items` gives for each of `calls` in a process of its own, and what that wrote as a log."""
    home.mkdir(exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", READ], input=json.dumps(calls), capture_output=True, text=True, cwd=home, timeout=120,
        check=False, env={**inherited, "HF_HOME": str(home), "HF_TOKEN": TOKEN, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


NOWHERE = (
    "neither a file or folder here nor a dataset of the hub that may be read; correct the name, or log in with "
    "`hf auth login` if it is private"
)
UNREACHABLE = (
    "no file or folder here, and the hub cannot be reached; correct the path, or check the connection and try again"
)


def rows(name: str, *values: Any) -> list[list[Any]]:
    return [[f"{name}: row {number}", value] for number, value in enumerate(values, 1)]


PLAIN = [{"text": f"é{number}"} for number in range(5)]
CASES: dict[str, tuple[dict[str, str], Any]] = {
    "whole": ({"path": "org/plain"}, rows("org/plain[train]", *PLAIN)),
    "test": ({"path": "org/plain", "split": "test[:50%]"}, rows("org/plain[test]", {"text": "t"})),
    "stream": ({"path": "org/plain", "split": "train[:2]"}, rows("org/plain[train]", *PLAIN)),
    "long stream": ({"path": "org/big", "split": "train[:9]"}, rows("org/big[train]", *[{"text": "0"}] * 9)),
    "old name": ({"path": "plain", "split": "test"}, rows("plain[test]", {"text": "t"})),
    "subset": ({"path": "org/configured", "subset": "fr"}, rows("org/configured[train]", {"text": "f"})),
    "nested": ({"path": "org/chats"}, rows("org/chats[train]", *CHATS)),
    "no split": (
        {"path": "org/plain", "split": "dev"},
        "DataError: org/plain: has no split \"dev\", but ['train', 'test']; correct --split",
    ),
    "no split of a stream": (
        {"path": "org/plain", "split": "dev[:9]"},
        "DataError: org/plain: has no split dev, but ['train', 'test']; correct --split",
    ),
    "no subset": (
        {"path": "org/configured"},
        "DataError: org/configured: has several configurations: ['en', 'fr']; choose one with --subset",
    ),
    "wrong subset": (
        {"path": "org/configured", "subset": "de"},
        "DataError: org/configured: has no configuration 'de', but ['en', 'fr']; correct --subset",
    ),
    "damaged": (
        {"path": "org/damaged"},
        "DataError: org/damaged: its files cannot be read (JSON parse error: Invalid value. in row 1); download them, "
        "mend them, and give --data those",
    ),
    "damaged stream": (
        {"path": "org/damaged", "split": "train[:9]"},
        "DataError: org/damaged: cannot be read (",
    ),
    "nothing": (
        {"path": "org/nothing"},
        "DataError: org/nothing: has no files that can be read; download what it has, make JSON lines of it, and give "
        "--data those",
    ),
    "missing": ({"path": "org/none"}, f"DataError: org/none: {NOWHERE}"),
    "missing old name": ({"path": "json"}, f"DataError: json: {NOWHERE}"),
    "gated": (
        {"path": "org/gated"},
        "DataError: org/gated: is gated; ask for access on its page on the hub, then log in with `hf auth login`",
    ),
    "private": ({"path": "org/private"}, f"DataError: org/private: {NOWHERE}"),
    "broken": ({"path": "org/broken"}, f"DataError: org/broken: {UNREACHABLE}"),
    "broken old name": ({"path": "broken"}, f"DataError: broken: {UNREACHABLE}"),
}


@pytest.fixture(scope="module")
def answers(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    found, log = read([call for call, _ in CASES.values()], home, HF_ENDPOINT=hub.address)
    print(log, *hub.asked, sep="\n")
    assert TOKEN not in json.dumps(found)
    return {**dict(zip(CASES, found, strict=True)), "home": home}


@pytest.mark.parametrize("case", CASES)
def test_datasets_of_the_hub(answers: dict[str, Any], case: str) -> None:
    expected, got = CASES[case][1], answers[case]
    if isinstance(expected, str):
        assert isinstance(got, str)
        assert got[: None if "; " in expected else len(expected)] == expected
        assert "\n" not in got
    else:
        assert got == expected


def test_a_stream_fetches_only_what_it_needs(hub: Hub, answers: dict[str, Any]) -> None:
    asked = [question for question in hub.asked if question.startswith("GET /datasets/org/big/resolve/")]
    assert any(question.endswith("train-0.jsonl") for question in asked)
    assert not any(question.endswith(("train-4.jsonl", "train-5.jsonl")) for question in asked)


def test_the_token_is_for_the_hub_only(hub: Hub, answers: dict[str, Any]) -> None:
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in json.dumps(answers, default=str)


def test_what_was_downloaded_is_there_without_a_connection(answers: dict[str, Any]) -> None:
    calls = [{"path": "org/plain"}, {"path": "org/none"}, {"path": "none"}]
    (plain, *others), log = read(calls, answers["home"], HF_HUB_OFFLINE="1")
    assert plain == rows("org/plain[train]", *PLAIN)
    assert "Using the latest cached version of the dataset" in log
    assert others == [f"DataError: org/none: {UNREACHABLE}", f"DataError: none: {UNREACHABLE}"]


def test_a_hub_that_is_nowhere(tmp_path: Path) -> None:
    (found,), log = read([{"path": "org/plain"}], tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:1")
    assert found == f"DataError: org/plain: {UNREACHABLE}"
    assert log == ""


@pytest.mark.parametrize("works", [True, False])
def test_logs_are_held_back_and_told_if_it_works(works: bool, capsys: pytest.CaptureFixture[str]) -> None:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    handler = logging.StreamHandler(sys.stderr)
    loggers[1].addHandler(handler)
    try:
        with contextlib.suppress(DataError), logs_if_it_works():
            logging.getLogger("datasets.load").warning("an older copy")
            assert capsys.readouterr().err == ""
            if not works:
                raise DataError("unreachable")
        assert capsys.readouterr().err == "an older copy\n" * works
    finally:
        loggers[1].removeHandler(handler)
    assert [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers] == before


def test_a_name_that_cannot_be_resolved_is_unreachable() -> None:
    assert _said_of_hub(OSError(-2, "Name or service not known")) == UNREACHABLE


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("a\n  b\tc", "a b c"),
        (f"no {TOKEN} there", "no … there"),
        ("see http://u:p@host/x?Signature=abc&Key=d now", "see http://…host/x?… now"),
        ("", "ValueError"),
        ("x" * 400, "x" * 299 + "…"),
    ],
)
def test_messages_of_libraries_are_one_line_without_secrets(said: str, shown: str) -> None:
    assert one_line(ValueError(said)) == shown


def test_columns_of_images_are_left_out(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    data = {"text": ["a", "b"], "picture": [{"bytes": b"no picture", "path": None}] * 2}
    datasets.Dataset.from_dict(data, features=features).save_to_disk(str(tmp_path / "d"))
    assert [item.value for item in read_items(str(tmp_path / "d"))] == [{"text": "a"}, {"text": "b"}]
    datasets.Dataset.from_dict(data, features=features).remove_columns("text").save_to_disk(str(tmp_path / "p"))
    with pytest.raises(DataError, match=r"has no rows of text \(but columns \['picture'\]\); give --data what has"):
        list(read_items(str(tmp_path / "p")))
