"""How far a run of `prepare` has come, kept in PREFIX.partial/state.json so that another can go on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import PrepareConfig
from ..data.binidx import BinidxWriter, prefix_of
from ..data.sources import Split, fingerprint
from ..errors import ConfigError, DataError
from ..files import output_errors, write_text
from .encoding import Block, Counts, Recipe

ID_BYTES = 2
MOST_TOKENS = 2**31 - 1  # of a document, in the format
SAVED_EVERY = 2.0  # seconds
FORMAT = 2  # of state.json and what it means


@dataclass(frozen=True)
class State:
    """How far a run has come."""

    settings: dict[str, Any]
    """All that decides the tokens, see `settings_of`."""
    documents: int
    tokens: int
    """Of the documents, and of one of which there is more."""
    counts: Counts
    begun: int = 0
    """Tokens of the document of which there is more."""
    is_whole: bool = False
    """Whether all is done, and only the pair is to be put in its place."""
    most: int | None = None
    """If that is because --split needs no more than so many documents: how many."""

    def is_enough(self, most: int | None) -> bool:
        """Whether it can be gone on from where --split needs `most` documents, or all if that is None."""
        return self.most is None or (most is not None and most <= self.documents)


def settings_of(config: PrepareConfig, recipe: Recipe, stop: int) -> dict[str, Any]:
    """All that decides the tokens, as JSON: the recipe, the sources, and what tells whether they have changed.

    The bounds of --split are not among it, since they are applied at the end. Raises what `fingerprint` does.
    """
    name = Split.parse(config.split).name
    template = Path(recipe.template)
    settings = asdict(recipe) | {
        "format": FORMAT,
        "stop": stop,
        "template_file": hashlib.sha256(template.read_bytes()).hexdigest() if template.is_file() else "",
        "data": config.data,
        "split": name,
        "subset": config.subset,
        "separator": config.separator,
        "sources": [fingerprint(source, name) for source in config.data],
    }
    del settings["on_bad_line"]  # what is done is the same, whatever becomes of a bad line that comes later
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def find_state(config: PrepareConfig, prefix: str, settings: dict[str, Any]) -> State:
    """The state to go on from, which is of the same settings and sources, or a new one.

    Raises ConfigError if there is one of others, or if the pair is there already, unless all may be overwritten.
    """
    found = _read(prefix)
    same = found is not None and found.settings == settings and found.is_enough(Split.parse(config.split).most)
    if not config.overwrite:
        # A run that ended between its last two steps has left a .bin, and no .idx.
        mine = found is not None and found.is_whole and same
        for path in (Path(f"{prefix}.idx"), *([] if mine else [Path(f"{prefix}.bin")])):
            refuse_existing(path)
    if found is not None and same:
        return found
    if found is not None and not config.overwrite:
        changed = [name for name, value in settings.items() if found.settings and found.settings.get(name) != value]
        changed += ["split"] * (found.settings == settings)
        raise ConfigError(
            f"--out {prefix}: {prefix}.partial is of a run with other settings or sources "
            f"({', '.join(changed) or 'its state.json cannot be read'}); remove that folder, or use --overwrite"
        )
    return State(settings, 0, 0, Counts())


def refuse_existing(path: Path) -> None:
    """Raise ConfigError if there is something in the place of an output."""
    if path.exists():
        raise ConfigError(f"--out {path}: is there already; choose another name, or use --overwrite")


def refuse_folders(out: Path) -> None:
    """Raise ConfigError if a folder, or no name at all, stands where a file is to be written for --out."""
    if "\0" in str(out):
        raise ConfigError(f"--out {str(out)!r}: is no name that a file can have; choose another one")
    prefix = prefix_of(str(out))
    with output_errors(out):
        if out.is_dir():
            raise ConfigError(f"--out {out}: is a folder; name a prefix in it, e.g. {out / 'data'}")
        for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
            if path.is_dir():
                raise ConfigError(f"--out {out}: {path} is a folder; choose another name")


class Partial:
    """The folder PREFIX.partial while a run fills it. Whatever cannot be written is an OutputError."""

    def __init__(self, prefix: str, state: State) -> None:
        """Go on from `state`; what was written after it is cut off."""
        self.prefix, self.state = prefix, state
        self.writer = BinidxWriter(prefix, documents=state.documents, tokens=state.tokens)
        self._saved_at = float("-inf")

    def add(self, block: Block) -> None:
        """Add documents; now and then they are brought to the disk. Raises DataError if one is too long."""
        sizes = block.sizes.astype(np.int64)
        begun = len(block.ids) - int(sizes.sum())
        if len(sizes):
            sizes[0] += self.state.begun
        else:
            begun += self.state.begun
        if max(int(sizes.max(initial=0)), begun) > MOST_TOKENS:
            number = self.state.documents + int(np.argmax([*sizes, begun])) + 1
            raise DataError(
                f"document {number:,} has more than {MOST_TOKENS:,} tokens, which binidx cannot hold; "
                "name what is between two documents with --separator, or split the file"
            )
        self.writer.add(block.ids, sizes)
        state = self.state
        # One assignment: wherever a signal ends the run, the state is that of one place in the sources.
        self.state = replace(
            state,
            documents=self.writer.documents,
            tokens=self.writer.tokens,
            counts=state.counts.plus(block.counts),
            begun=begun,
        )
        if time.monotonic() - self._saved_at >= SAVED_EVERY:
            self.save()

    def finish(self, most: int | None) -> None:
        """Save that all is done; of a document that was begun, nothing is wanted. See `State` for `most`."""
        tokens = self.state.tokens - self.state.begun
        self.state = replace(self.state, tokens=tokens, begun=0, is_whole=True, most=most)
        self.save()

    def save(self) -> None:
        """Bring everything to the disk, and then the state."""
        self.writer.flush()
        write_text(_file(self.prefix), json.dumps(asdict(self.state)))
        self._saved_at = time.monotonic()

    def keep(self) -> bool:
        """Save what is done; if that is nothing, the folder is removed. Returns whether there is something."""
        if self.state.tokens:
            self.save()
            return True
        self.writer.close()
        remove(self.prefix)
        return False


def cut_off(prefix: str, tokens: int) -> None:
    """Remove what was written behind so many tokens, unless all are in their place already. Raises OutputError."""
    path = Path(f"{prefix}.partial", "ids")
    with output_errors(path), suppress(FileNotFoundError):
        os.truncate(path, tokens * ID_BYTES)


def remove(prefix: str) -> None:
    """Remove PREFIX.partial, but nothing in it that is not ours. Raises OutputError."""
    folder = Path(f"{prefix}.partial")
    with output_errors(folder):
        for path in (_file(prefix), folder / "sizes", folder / "ids"):  # the state first: without it, nothing counts
            path.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def _file(prefix: str) -> Path:
    return Path(f"{prefix}.partial", "state.json")


def _read(prefix: str) -> State | None:
    """The state that another run has left, if any; one that cannot be read is of no settings."""
    try:
        found = json.loads(_file(prefix).read_text("utf-8"))
        return State(**found | {"counts": Counts(**found["counts"])})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError):
        return State({}, 0, 0, Counts())
