"""What a source is: a file, a folder of files, or a dataset; and which of it a split chooses."""

from __future__ import annotations

import os
import re
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError
from . import hub
from .streams import PACKERS

TEXTS = (".txt", ".text", ".md")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", *TEXTS)
SPLIT = re.compile(r"([A-Za-z_][\w.-]*)(?:\[(?:(-?\d{1,18})(%?))?:(?:(-?\d{1,18})(%?))?\])?")
# Words in the names of files and folders, as the hub understands them
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
LONGEST_SHOWN = 60  # letters of a split in a message
PAPERS = ("readme", "license", "licence")  # files that tell of a folder's data and are none


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
            shown = text if text.isprintable() and len(text) <= LONGEST_SHOWN else reprlib.repr(text)
            raise ConfigError(
                f"--split {shown}: no known form; write train, train[:1000], train[1000:] or train[10%:90%]"
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
    unknown: list[Path]
    """Files of no known form."""

    def notes(self, folder: str | Path) -> list[str]:
        """What should be told of the files in `folder` that are not read: a line for each kind of them."""
        kinds = []
        if self.left_out:
            kinds.append(f"{_count(self.left_out)} of other splits left out")
        if self.unknown:
            kinds.append(f"{_count(self.unknown)} of no known form left out, the first {_first(self.unknown, folder)}")
        if self.papers:
            kinds.append(f"{_count(self.papers)} about the data left out, the first {_first(self.papers, folder)}")
        return [f"{folder}: {kind}" for kind in kinds]


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn what the operating system says of a source into one clear DataError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{name}: no such file; give --data the path of a file or folder, or a dataset's name"
        ) from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error}); give --data what can be") from None


def kind_of(path: str) -> str:
    """Whether a source is a `file`, a `folder`, `saved` by datasets, or on the `hub`. Raises `DataError` if none."""
    place = Path(path)
    with readable(path):
        if not path or "\0" in path:
            raise DataError(f"--data {path!r}: names nothing; give the path of a file or folder, or a dataset's name")
        if hub.NAME.fullmatch(path) and not form_of(place) and not place.exists():
            return "hub"
        if not stat.S_ISDIR(place.stat().st_mode):
            return "file"
        return "saved" if hub.is_saved(place) else "folder"


def form_of(path: Path) -> str:
    """The suffix that tells a file's form, without that of its packer; "" if it is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKERS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def has_texts(path: str | Path, split: str = "train") -> bool:
    """Whether a source is, or holds, a file of plain text. Raises what `kind_of` and `files_of` do."""
    kind = kind_of(os.fspath(path))
    files = files_of(path, split).files if kind == "folder" else [Path(path)] if kind == "file" else []
    return any(form_of(file) in TEXTS for file in files)


def files_of(folder: str | Path, split: str = "train") -> Files:
    """The files in a folder and the folders in it, without hidden and half-written (`.partial`) ones.

    The nearest word such as train, test or val in a file's path below `folder`, between anything but letters, says
    which split it is of, as on the hub; files without one are of train, unless others have the word train.

    Raises:
        ConfigError: there is no file of that split.
        DataError: there is no file to be read.
    """
    top, name = Path(folder), Split.parse(split).name
    with readable(str(top)):
        if hub.is_saved(top):
            return Files([], [], [], [], [])
    data, papers, unknown = _sorted_out(_walk(top))
    if not data:
        raise DataError(f"{folder}: {_nothing_in(top, papers, unknown)}")
    splits = {path: _split_word(path.relative_to(top), name) for path in data}
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
        unknown=unknown,
    )


def _sorted_out(files: list[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """Of the files in a folder those to be read, a binidx pair as its .idx; those that tell of it; and unknown ones."""
    data: list[Path] = []
    papers: list[Path] = []
    unknown: list[Path] = []
    tokens = {path.with_suffix(".bin") for path in files if path.suffix == ".idx"}
    for path in files:
        if path.name.lower().partition(".")[0] in PAPERS:
            papers.append(path)
        elif form_of(path) or path.suffix == ".idx":
            data.append(path)
        elif path not in tokens:
            unknown.append(path)
    return data, papers, unknown


def _nothing_in(folder: Path, papers: list[Path], unknown: list[Path]) -> str:
    """What is said of a folder of which no file is read."""
    allowed = f"allowed are {', '.join(SUFFIXES)}, also packed"
    if unknown:
        return f"holds no file to be read, but {_first(unknown, folder)} of no known form; {allowed}"
    if papers:
        return (
            f"holds no file to be read, but {_first(papers, folder)}, as what tells of the data is called; rename it, "
            "or give --data the file itself"
        )
    return f"holds no file to be read; {allowed}"


def _count(files: list[Path]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files):,} files"


def _first(files: list[Path], folder: str | Path) -> str:
    name = str(files[0].relative_to(folder))
    return name if name.isprintable() else repr(name)


def _walk(top: Path) -> list[Path]:
    """Files in a folder, sorted, hidden ones left away; a folder that links lead to several times is entered once."""
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()

    def failed(error: OSError) -> None:
        raise error

    with readable(str(top)):
        for place, folders, files in os.walk(top, onerror=failed, followlinks=True):
            here = Path(place).stat()
            if (here.st_dev, here.st_ino) in entered:
                folders.clear()
                continue
            entered.add((here.st_dev, here.st_ino))
            folders[:] = sorted(filter(_seen, folders))
            found += [Path(place, name) for name in files if _seen(name)]
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
    kind = kind_of(path)
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
    with readable(path):
        known = [(str(file), file.stat()) for file in files]
    return {"files": [[name, stats.st_size, stats.st_mtime_ns] for name, stats in known]}


def size_of(path: str | Path, split: str = "train") -> int | None:
    """The bytes of a source's files as they lie on the disk; None if it is not read from such. Raises as above."""
    if kind_of(os.fspath(path)) not in ("file", "folder"):
        return None
    return sum(int(size) for _, size, _ in fingerprint(path, split)["files"])
