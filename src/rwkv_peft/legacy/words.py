"""Messages that name today's flags, in the words of the old line that was typed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..config import TrainConfig
from ..errors import ConfigError
from ..yaml_config import settings_of
from .line import PAGE, Old, read
from .method import KEYS
from .table import TABLE

FLAG = re.compile(r"(?<![\w/.-])--[a-z]+(?:-[a-z]+)*(?![\w-])")


def reworded(message: str, argv: Sequence[str]) -> str:
    """The message, in one line, with the old names of today's flags; it says where to find those that have none."""
    message = message.replace("\n", " ")
    try:
        names = old_names(read(argv))
    except ConfigError:  # which is then what the message is about
        return message
    typed, ours, strange = {word.partition("=")[0] for word in argv}, settings_of(TrainConfig), []

    def replace(found: re.Match[str]) -> str:
        name = found[0][2:].replace("-", "_")
        if name not in ours or found[0] in typed:
            return found[0]
        if name not in names:
            strange.append(found[0])
        return names.get(name, found[0])

    text = FLAG.sub(replace, message)
    return f"{text} ({' '.join(dict.fromkeys(strange))}: of today's line, {PAGE})" if strange else text


def old_names(old: Old) -> dict[str, str]:
    """The old flag, or key of a JSON config, of each of today's settings that has one."""
    names: dict[str, str] = {}
    for flag, row in TABLE.items():
        if row.kind == "mapped" and (row.form is not dict or row.settings == (flag,)):
            names.setdefault(row.settings[0], f"--{flag}")
    for config, keys in KEYS.items():
        if config in old:
            names |= {setting: f"--{config} {key}" for key, setting in keys.items() if key not in old}
    if "peft_config" in old:
        names |= {"rank": "--peft_config r", "peft_config": "--peft_config"}
    return names
