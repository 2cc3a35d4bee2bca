"""Where examples come from: a file, a folder of files, or a dataset, read one item after the other.

`read_items` yields what stands there, each with its origin; what it means is for `examples.py`. Only a block or batch
is in memory at a time, whatever the size of the source.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError
from . import hub
from .formats import Found, csv_file, json_file, json_lines, text_file
from .streams import PACKERS, DamagedError, blocks_of, text_blocks

TEXTS = (".txt", ".text", ".md")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", *TEXTS)
SPLIT = re.compile(r"([A-Za-z_][\w.-]*)(?:\[(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?\])?")
# Words in the names of files and folders, as the hub understands them
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
PAPERS = ("readme", "license", "licence")  # files that tell of a folder's data and are none


@dataclass(frozen=True, slots=True)
class Item:
    """One thing read, before it is an example."""

    origin: str
    """Where it stands: `chats.jsonl:12`, `list.json: item 3`, `t.csv: row 7`, `org/name[train]: row 4`."""
    value: dict[str, Any] | str | DataError
    """An object, the text of a document, or why it cannot be used (without the origin)."""


@dataclass(frozen=True)
class Split:
    """Which part of a source: a name and bounds, in Hugging Face's form."""

    name: str
    bounds: tuple[tuple[str | None, str | None], tuple[str | None, str | None]] = ((None, None), (None, None))
    """Number and `%` of the first example and of the one behind the last."""

    @classmethod
    def parse(cls, text: str) -> Split:
        """Read `train`, `train[:1000]`, `train[10%:90%]`, `test[-50:]`. Raises ConfigError if it has another form."""
        form = SPLIT.fullmatch(text.strip())
        if form is None:
            raise ConfigError(
                f"--split {text}: no known form; write train, train[:1000], train[1000:] or train[10%:90%]"
            )
        return cls(form[1], ((form[2], form[3]), (form[4], form[5])))

    def of(self, count: int) -> slice:
        """Which of `count` examples. Shares are rounded to the nearest; what is beyond the last one is left away."""
        return slice(*(None if not n else round(int(n) * count / 100) if share else int(n) for n, share in self.bounds))

    @property
    def most(self) -> int | None:
        """How many examples it can need at most, counted from the first; None if that depends on how many there are."""
        (start, share), (stop, stop_share) = self.bounds
        counted = stop is not None and not share and not stop_share and int(start or 0) >= 0 and int(stop) >= 0
        return int(stop or 0) if counted else None


@dataclass(frozen=True)
class Files:
    """What a folder holds."""

    files: list[Path]
    """Files of the wanted split, sorted by path."""
    pairs: list[str]
    """Prefixes of its binidx pairs (PREFIX.bin, PREFIX.idx), which `read_items` does not read."""
    left_out: list[Path]
    """Files of other splits."""
    papers: list[Path]
    """Files that tell of the data and are none: README and LICENSE."""


def read_items(path: str | Path, split: str = "train", subset: str = "", separator: str = "") -> Iterator[Item]:
    """Read a file, a folder of files, a folder of `save_to_disk`, or a dataset of the hub, in this order.

    `split` is a name; bounds behind it are for the caller. Only folders and datasets have other splits than train.
    `subset` is a configuration of a dataset on the hub, and `separator` stands between the documents of a text file,
    which is one document without it.

    An item that cannot be used has a `DataError` as its value, so that the caller may skip and count it.

    Raises:
        ConfigError: `split` has no known form or is not there, or a package is not installed.
        DataError: there is no such source, or it is empty, damaged or unreadable from some place on.
    """
    part = Split.parse(split)
    name, path = part.name, os.fspath(path)
    kind = _kind(path)
    if kind == "hub":
        yield from _items(path, lambda: hub.hub_rows(path, name, subset, whole=part.most is None))
    elif kind == "saved":
        yield from _items(path, lambda: hub.saved_rows(Path(path), name))
    elif kind == "folder":
        files = files_of(path, name)
        if not files.files:
            raise DataError(f"{path}: holds only binidx files; give --data their prefixes, e.g. {files.pairs[0]}")
        for file in files.files:
            yield from read_file(file, separator)
    else:
        if name != "train":
            raise ConfigError(
                f"--split {split}: {path} is one file, which has no splits; write train, or cut train[a:b]"
            )
        yield from read_file(Path(path), separator)


def read_file(path: Path, separator: str = "") -> Iterator[Item]:
    """Read one file by its suffix. Raises what `read_items` does."""
    form = _form(path)
    if not form:
        suffix = "".join(path.suffixes[-2:] if path.suffix.lower() in PACKERS else path.suffixes[-1:])
        raise DataError(
            f"{path}: {f'unknown suffix {suffix!r}' if suffix else 'has no suffix'}; rename it to what it is: "
            f"{', '.join(SUFFIXES)}, each also with {' or '.join(PACKERS)} behind it"
        )
    with _readable(str(path)):
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: is not a regular file; write what it gives into one, and give --data that")
    yield from _items(str(path), lambda: _reader(path, form, separator))


def _reader(path: Path, form: str, separator: str) -> Found:
    if form == ".parquet":
        return hub.parquet_rows(path)
    blocks = text_blocks(blocks_of(path))
    if form in (".csv", ".tsv"):
        return csv_file(blocks, "\t" if form == ".tsv" else ",")
    if form in TEXTS:
        return text_file(blocks, separator)
    return json_file(blocks) if form == ".json" else json_lines(blocks)


def _items(name: str, read: Callable[[], Found]) -> Iterator[Item]:
    """The items of a source, and its name in front of what ends the reading."""
    place = ""
    with _readable(name):
        try:
            for place, value in read():
                yield Item(name + place, value)
        except DamagedError as error:
            reason, _, remedy = str(error).rpartition("; ")
            last = place.strip(": ")
            after = f" after {'line ' if last.isdigit() else ''}{last}" if last else " from its beginning"
            raise DataError(f"{name}: {reason}{after}; {remedy}") from None
        except DataError as error:
            raise DataError(f"{name}: {error}") from None


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what the operating system says of a source into one clear DataError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{name}: no such file; give --data the path of a file or folder, or a dataset's name"
        ) from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error}); give --data what can be") from None


def _kind(path: str) -> str:
    """Whether a source is a `file`, a `folder`, `saved` by datasets, or on the `hub`. Raises `DataError` if none."""
    place = Path(path)
    with _readable(path):
        if not path or "\0" in path:
            raise DataError(f"--data {path!r}: names nothing; give the path of a file or folder, or a dataset's name")
        if hub.NAME.fullmatch(path) and not _form(place) and not place.exists():
            return "hub"
        if not stat.S_ISDIR(place.stat().st_mode):
            return "file"
        return "saved" if hub.is_saved(place) else "folder"


def _form(path: Path) -> str:
    """The suffix that tells a file's form, without that of its packer; "" if it is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKERS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def files_of(folder: str | Path, split: str = "train") -> Files:
    """The files of known suffixes in a folder and the folders in it, without hidden and half-written (`.partial`) ones.

    The nearest word such as train, test or val in a file's path below `folder`, between anything but letters, says
    which split it is of, as on the hub; files without one are of train, unless others have the word train.

    Raises:
        ConfigError: there is no file of that split.
        DataError: there is no file to be read.
    """
    top, name = Path(folder), Split.parse(split).name
    with _readable(str(top)):
        if hub.is_saved(top):
            return Files([], [], [], [])
    splits: dict[Path, str] = {}
    papers: list[Path] = []
    for path in _walk(top):
        if path.stem.lower().partition(".")[0] in PAPERS:
            papers.append(path)
        else:
            splits[path] = _split_word(path.relative_to(top), name)
    if not splits:
        raise DataError(f"{folder}: holds no file to be read; allowed are {', '.join(SUFFIXES)}, also packed")
    wanted = _canonical(name)
    if wanted == "train" and wanted not in splits.values():
        wanted = ""
    chosen = [path for path, word in splits.items() if word == wanted]
    if not chosen:
        there = ", ".join(sorted({word or "train" for word in splits.values()}))
        raise ConfigError(f"--split {split}: {folder} has only files of {there}; choose one")
    return Files(
        files=[path for path in chosen if path.suffix != ".idx"],
        pairs=[str(path.with_suffix("")) for path in chosen if path.suffix == ".idx"],
        left_out=[path for path, word in splits.items() if word != wanted],
        papers=papers,
    )


def _walk(top: Path) -> list[Path]:
    """Files in a folder that can be read, sorted; a folder that links lead to several times is entered once."""
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()

    def failed(error: OSError) -> None:
        raise error

    with _readable(str(top)):
        for place, folders, files in os.walk(top, onerror=failed, followlinks=True):
            here = Path(place).stat()
            if (here.st_dev, here.st_ino) in entered:
                folders.clear()
                continue
            entered.add((here.st_dev, here.st_ino))
            folders[:] = sorted(filter(_seen, folders))
            paths = [Path(place, name) for name in files if _seen(name)]
            found += [path for path in paths if _form(path) or path.suffix == ".idx"]
    return sorted(found)


def _seen(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(".partial")


def _split_word(path: Path, wanted: str) -> str:
    """The split that the path of a file tells, "" if none: the first such word of the nearest part that has one."""
    words = {wanted.lower(), *(word for words in SPLIT_WORDS.values() for word in words)}
    longest_first = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    for part in reversed(path.parts):
        found = re.search(rf"(?<![^\W\d_])(?:{longest_first})(?![^\W\d_])", part.lower())
        if found:
            return _canonical(found[0])
    return ""


def _canonical(word: str) -> str:
    """The name of the split that a word stands for."""
    return next((split for split, words in SPLIT_WORDS.items() if word.lower() in words), word.lower())


def fingerprint(path: str | Path, split: str = "train") -> dict[str, Any]:
    """What tells whether a source has changed, as JSON can hold it: `files` is a list of [path, size, mtime_ns].

    Of a dataset on the hub there is only its name, as `hub`. Raises what `read_items` does.
    """
    path = os.fspath(path)
    kind = _kind(path)
    if kind == "hub":
        return {"files": [], "hub": path}
    if kind == "folder":
        found = files_of(path, split)
        pairs = [Path(f"{prefix}.{end}") for prefix in found.pairs for end in ("bin", "idx")]
        files = [*found.files, *pairs]
    elif kind == "saved":
        files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    else:
        files = [Path(path)]
    with _readable(path):
        known = [(str(file), file.stat()) for file in files]
    return {"files": [[name, stats.st_size, stats.st_mtime_ns] for name, stats in known]}
