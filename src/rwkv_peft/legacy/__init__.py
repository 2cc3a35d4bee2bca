"""The command line of the original program (RWKV-PEFT) works here too: `table.py` says what each of its flags means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..config import TrainConfig
from ..yaml_config import build, convert, settings_of
from .claims import check_claims, version_of
from .line import is_old
from .table import SECTIONS, TABLE
from .translate import Translation, translate
from .words import reworded

__all__ = ["SECTIONS", "TABLE", "Translation", "check_claims", "config_of", "is_old", "reworded", "translate"]


def config_of(argv: Sequence[str], say: Callable[[str], None] = print) -> TrainConfig:
    """Today's settings for an old command line; prints what there is to say, and checks it against the files.

    Raises ConfigError, CheckpointError.
    """
    translation = translate(argv, version_of)
    hints = settings_of(TrainConfig)
    values = {name: convert(value, hints[name].hint, f"--{name}") for name, value in translation.values.items()}
    config = build(TrainConfig, values)
    for note in translation.notes + check_claims(translation.claims, config.model):
        say(f"note   {note}")
    return config
