"""An old command line, word by word."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import TrainConfig
from ..errors import ConfigError
from ..yaml_config import convert, settings_of, suggestion
from .table import COMING, TABLE

Values = dict[str, Any]
SWITCH = {"": True, "1": True, "true": True, "0": False, "false": False}
PAGE = "docs/migration.md"


@dataclass
class Old:
    """An old command line: the words behind each flag, and what there is to say about it."""

    given: dict[str, list[str]]
    version: str = ""
    """Of the model, as the line or the file has it."""
    notes: list[str] = field(default_factory=list)

    def __contains__(self, name: str) -> bool:
        return name in self.given

    def __getitem__(self, name: str) -> Any:
        """The value of a flag: its default, if it is not given. Raises ConfigError if it has another form."""
        row, words = TABLE[name], self.given.get(name)
        if row.form is bool:
            return self.switch(name)
        if row.form is dict:
            return read_json(name, row.default) | ({} if words is None else read_json(name, " ".join(words)))
        if row.form is list:
            return row.default.split() if words is None else words
        if words is not None and len(words) != 1:
            raise ConfigError(f"--{name} {' '.join(words)}".rstrip() + ": must be one value")
        return convert(row.default if words is None else words[0], row.form, f"--{name}")

    def switch(self, name: str) -> bool:
        """Whether a flag without a value is on. Raises ConfigError if it has one that is no 0 or 1."""
        word = " ".join(self.given.get(name, ["0"])).lower()
        if word not in SWITCH:
            raise ConfigError(f"{self.shown(name)}: is a flag without a value; leave out {word}, or the flag")
        return SWITCH[word]

    def said(self, name: str) -> Values:
        """The keys of a JSON flag that were given, with their values."""
        return read_json(name, " ".join(self.given[name])) if name in self.given else {}

    def shown(self, name: str) -> str:
        """The flag as it was given, in one line."""
        return " ".join(f"--{name} {' '.join(self.given.get(name, []))}".split())

    def note(self, name: str, text: str) -> None:
        self.notes.append(f"{self.shown(name)}: {text}")

    def choice(self, name: str, allowed: Mapping[str, str]) -> str:
        """What the value of a flag stands for. Raises ConfigError if it is none of `allowed`."""
        if self[name] not in allowed:
            raise ConfigError(f"{self.shown(name)}: allowed are {' '.join(filter(None, allowed))}")
        return allowed[self[name]]


def is_old(argv: Iterable[str]) -> bool:
    """Whether a command line is the original's: it has a flag that only the original has."""
    return only_old(argv) is not None


def only_old(argv: Iterable[str]) -> str | None:
    """The first flag that the original has, and today's line neither has nor will have."""
    ours = settings_of(TrainConfig).keys() | COMING
    return next((name for name in map(flag_name, argv) if name in TABLE and name not in ours), None)


def flag_name(word: str) -> str:
    """The name of a flag, from a word of the command line; empty for a value."""
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""


def read(argv: Sequence[str]) -> Old:
    """The words behind each flag; of several, the last holds. Raises ConfigError if one is not the original's."""
    given: dict[str, list[str]] = {}
    words: list[str] | None = None
    for word in argv:
        name = flag_name(word)
        if re.match(r"[-–—]+[A-Za-z]", word) and not name:
            meant = flag_name("--" + word.lstrip("-–—"))
            raise ConfigError(f"{word}: a flag begins with two hyphens{suggestion(meant, TABLE, '--')}")
        if name:
            check_flag(name, word, argv)
            words = given[name] = [word.partition("=")[2]] if "=" in word else []
        elif words is None:
            raise ConfigError(f"{word!r}: unexpected; a value stands behind its flag")
        else:
            words.append(word)
    return Old(given)


def check_flag(name: str, word: str, argv: Sequence[str]) -> None:
    """Raise ConfigError unless the original has this flag."""
    if name in TABLE:
        return
    flag = word.partition("=")[0]
    if name in settings_of(TrainConfig) or name == "config":
        raise ConfigError(
            f"--{only_old(argv)} is a flag of the original, {flag} one of today's: "
            f"write the line in one of the two; {PAGE} has both"
        )
    raise ConfigError(f"{flag}: no flag of the original{suggestion(flag, [f'--{known}' for known in TABLE])}")


def read_json(name: str, text: str) -> Values:
    """The JSON object behind a flag. Raises ConfigError if it is none."""
    text, example = " ".join(text.split()), f"'{TABLE[name].default}'"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--{name} {text}: broken JSON ({error}); write it as {example}, with these quotes"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"--{name} {text}: must be a JSON object; write it as {example}")
    return found
