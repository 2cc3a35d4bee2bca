"""The command line: from words to the settings of a command, and from errors to messages."""

from __future__ import annotations

import argparse
import ast
import io
import os
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import MISSING, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from . import __version__, config
from .commands import COMMANDS, INTERRUPTED, Command
from .config import ADVANCED, ESCAPES, flag_of
from .errors import ConfigError, RwkvPeftError, is_out_of_memory
from .yaml_config import build, convert, read_yaml, settings_of, suggestion

PROGRAM = "rwkv-peft"
FAILED, PIPE_CLOSED = 2, 141
POSITIONAL = "words"
HELP_FLAGS = ("-h", "--help", "--help-all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, and return its exit code. What a user can mend is one message on stderr, and code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks must not end a run
    try:
        code = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except RwkvPeftError as error:
        print(f"error: {as_typed(str(error), sys.argv[1:] if argv is None else argv)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it exits
        return PIPE_CLOSED
    except OSError as error:  # of a path that nobody could foresee, e.g. one that is too long
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; check the path", file=sys.stderr)
        return FAILED


def as_typed(message: str, argv: Sequence[str]) -> str:
    """A message in the words of the original's command line, if that was typed."""
    if list(argv[:1]) != ["train"]:
        return message
    from . import legacy

    return legacy.reworded(message, argv[1:]) if legacy.is_old(argv[1:]) else message


def run(argv: list[str]) -> int:
    """Find the command, read its settings, and run it."""
    name, *rest = argv or ["help"]
    if name in ("help", *HELP_FLAGS):
        print(overview())
        return 0
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"{name}: no such command{suggestion(name, COMMANDS)}\nsee: {PROGRAM} --help")
    command = COMMANDS[name]
    if any(flag in rest for flag in HELP_FLAGS):
        print(parser(name, everything="--help-all" in rest).format_help(), end="")
        return 0
    config = read_settings(name, rest)
    try:
        return command.run(config) or 0
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RwkvPeftError(f"out of memory; {command.if_memory_ends}") from error


# Reading the command line


def read_settings(name: str, argv: Sequence[str]) -> Any:
    """The settings of a command; `train` knows the command line of the original program too. Raises RwkvPeftError."""
    if name == "train":
        from . import legacy

        if legacy.is_old(argv):
            return legacy.config_of(argv)
    try:
        return parse(name, argv)
    except ConfigError as error:
        raise ConfigError(f"{error}\nsee: {PROGRAM} {name} --help") from error


def parse(name: str, argv: Sequence[str]) -> Any:
    """The settings of a command: from its flags, else from the file that --config names. Raises ConfigError."""
    command = COMMANDS[name]
    settings = settings_of(command.kind)
    dashed = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    found, strange = parser(name, everything=True).parse_known_intermixed_args(dashed)
    for word in strange:
        flag = word.partition("=")[0]
        if flag.startswith("--"):
            raise ConfigError(f"{flag}: unknown flag{suggestion(flag, map(flag_of, settings))}")
        raise ConfigError(f"{word!r}: unexpected; a value stands behind its flag")
    given = vars(found)
    place(command, given)
    file = given.pop("config", None)
    values = read_yaml(Path(file), command.kind) if file else {}
    for key, words in given.items():
        escapes = ESCAPES in settings[key].marks
        values[key] = convert(unescaped(words) if escapes else words, settings[key].hint, flag_of(key))
    missing = [flag_of(key) for key, setting in settings.items() if setting.default is MISSING and key not in values]
    if missing:
        raise ConfigError(f"{' '.join(missing)}: missing; give a value here, or in a --config file")
    return build(command.kind, values)


def place(command: Command, given: dict[str, Any]) -> None:
    """Give the words without a flag to the settings that may be given so; what is many takes all in the middle."""
    words, settings = given.pop(POSITIONAL, []), settings_of(command.kind)
    names = [name for name in command.positional if name not in given] if words else []
    if len(words) > len(names) and any(get_origin(settings[name].hint) is list for name in names):
        many = next(i for i, name in enumerate(names) if get_origin(settings[name].hint) is list)
        extra = len(words) - len(names)
        words[many : many + extra + 1] = [words[many : many + extra + 1]]
    if len(words) > len(names):
        raise ConfigError(f"{words[len(names)]!r}: unexpected; a value stands behind its flag")
    given |= dict(zip(names, words, strict=False))


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def parser(name: str, everything: bool) -> Parser:
    """The flags of a command; the help of the advanced ones only if `everything`."""
    command = COMMANDS[name]
    settings, docs = settings_of(command.kind), field_docs(command.kind)
    hidden = [] if everything else [key for key, setting in settings.items() if ADVANCED in setting.marks]
    more = "--help-all shows every setting; these are the ones that people use first. " if hidden else ""
    result = Parser(
        prog=f"{PROGRAM} {name}",
        usage=" ".join([PROGRAM, name, *map(str.upper, command.positional), "[settings]"]),
        description=command.kind.__doc__,
        epilog=more + command.hint,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
    )
    if command.positional:
        forms = " ".join(map(str.upper, command.positional))
        result.add_argument(POSITIONAL, nargs="*", metavar=forms, help="the same as the flags of these names")
    required_first = sorted(settings.items(), key=lambda item: item[1].default is not MISSING)
    for key, setting in required_first:
        text = f"{docs[key]} {default_text(setting.default)}".strip().replace("%", "%%")
        shown = argparse.SUPPRESS if key in hidden else text.replace("`", "")
        if bool in (setting.hint, *get_args(setting.hint)):
            result.add_argument(flag_of(key), action=argparse.BooleanOptionalAction, help=shown)
        else:
            result.add_argument(flag_of(key), help=shown, **value_form(setting.hint))
    result.add_argument("--config", metavar="FILE", help="Read settings from a YAML file; flags override it.")
    return result


def value_form(hint: Any) -> dict[str, Any]:
    """How argparse takes the value of a setting: the words it is of, and what stands for them in the help."""
    origin, inner = get_origin(hint), get_args(hint)
    if type(None) in inner:
        return value_form(inner[0])
    if origin is Literal:
        return {"metavar": "|".join(inner)}
    if origin in (list, tuple):
        one = value_form(inner[0])["metavar"]
        many = origin is list or inner[-1] is Ellipsis
        return {"metavar": one, "nargs": "+", "action": "extend"} if many else {"metavar": one, "nargs": len(inner)}
    return {"metavar": {int: "N", float: "X", Path: "PATH"}.get(hint, "TEXT")}


@cache
def class_docs() -> dict[str, dict[str, str]]:
    """The docstrings that stand under the fields of the settings, by class and field."""
    docs: dict[str, dict[str, str]] = defaultdict(dict)
    files = sorted(Path(config.__file__).parent.glob("*.py"))
    for kind in (kind for file in files for kind in ast.parse(file.read_text(encoding="utf-8")).body):
        for pair in pairwise(getattr(kind, "body", ())):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[kind.name][name] = doc  # type: ignore[attr-defined]
    return docs


def field_docs(kind: type[Any]) -> dict[str, str]:
    """The docstring of each setting of a dataclass, of those it inherits, and of those nested in it."""
    nested = [hint for hint in get_type_hints(kind).values() if isinstance(hint, type) and is_dataclass(hint)]
    return {name: doc for owner in (*nested, *kind.__mro__[::-1]) for name, doc in class_docs()[owner.__name__].items()}


def unescaped(words: str | list[str]) -> str | list[str]:
    """With a line break for each backslash and n."""
    return words.replace("\\n", "\n") if isinstance(words, str) else [word.replace("\\n", "\n") for word in words]


def default_text(default: Any) -> str:
    """The end of a setting's help; where the default is no plain value, the docstring says what it means."""
    if default is MISSING:
        return "(required)"
    if default is None or default is False or default in ("auto", "same", "", (), [], ("auto",)):
        return ""
    values = default if isinstance(default, tuple) else (default,)
    text = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return "[" + text.replace("\n", "\\n") + "]"


def overview() -> str:
    """The help of the program itself."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    return f"""usage: {PROGRAM} COMMAND [settings]

Fine-tune RWKV language models.

{chr(10).join(lines)}

{PROGRAM} COMMAND --help shows the settings of a command, {PROGRAM} --version the version."""
