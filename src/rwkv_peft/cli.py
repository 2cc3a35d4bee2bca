"""The commands. Whatever is heavy is imported by the command that needs it, so that --help is instant."""

from __future__ import annotations

import io
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from . import __version__
from .config import ADVANCED, ESCAPES, ChatConfig, DemoConfig, GenerateConfig, MergeConfig, TrainConfig
from .errors import ConfigError, RwkvPeftError
from .yaml_config import Setting, build, convert, read_yaml, settings_of, suggestion

PROGRAM = "rwkv-peft"
FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
HELP_FLAGS = ("-h", "--help", "--help-all")


@dataclass(frozen=True)
class Command:
    """One word after `rwkv-peft`."""

    help: str
    kind: type[Any]
    """The dataclass of its settings."""
    run: Callable[[Any], int | None]
    """Returns the exit code; None is 0."""
    positional: tuple[str, ...] = ()
    """Settings that may be given without their flag, in this order."""
    if_memory_ends: str = "choose a smaller model, or another --device"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, and return its exit code. What a user can mend is one message on stderr, and code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks must not end a run
    try:
        code = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except RwkvPeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it exits
        return PIPE_CLOSED


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
        print_help(name, command, everything="--help-all" in rest)
        return 0
    try:
        config = parse(command, rest)
    except ConfigError as error:
        raise ConfigError(f"{error}\nsee: {PROGRAM} {name} --help") from error
    try:
        return command.run(config) or 0
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RwkvPeftError(f"out of memory; {command.if_memory_ends}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the GPU or here; torch has a type of its own only for the GPU."""
    kind = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    return isinstance(error, MemoryError | kind) or "can't allocate memory" in str(error)


# Reading the command line. tyro draws the help but does not read the flags: it tells of mistakes in boxes that depend
# on the terminal, refuses values that begin with a dash, and forgets all but the last of several --data.


def parse(command: Command, argv: list[str]) -> Any:
    """The settings of a command: from its flags, else from the file that --config names. Raises ConfigError."""
    settings = settings_of(command.kind)
    flags = read_flags(argv, settings | {"config": Setting("config", Path, (), None)}, command.positional)
    file = flags.pop("config", None)
    values = (read_yaml(file, command.kind) if file else {}) | flags
    missing = [as_flag(name) for name, setting in settings.items() if setting.default is MISSING and name not in values]
    if missing:
        raise ConfigError(f"{' '.join(missing)}: missing; give a value here, or in a --config file")
    return build(command.kind, values)


def read_flags(argv: list[str], settings: Mapping[str, Setting], positional: Sequence[str]) -> dict[str, Any]:
    """The value of every setting on the command line, converted to its type. Raises ConfigError."""
    values: dict[str, Any] = {}
    for name, texts in split_flags(argv, settings, positional).items():
        setting = settings[name]
        plain = [text.replace("\\n", "\n") for text in texts] if ESCAPES in setting.marks else texts
        values[name] = convert(plain if arity(setting.hint) > 1 else plain[0], setting.hint, as_flag(name))
    return values


def split_flags(argv: list[str], settings: Mapping[str, Setting], positional: Sequence[str]) -> dict[str, list[str]]:
    """The texts that the command line gives for each setting; of a flag given twice the last, of a list all."""
    texts: dict[str, list[str]] = {}
    free: list[str] = []
    rest = argv[::-1]
    while rest:
        token = rest.pop()
        if not is_flag(token):
            free.append(token)
            continue
        flag, equals, text = token.partition("=")
        name = flag[2:].replace("-", "_")
        switch = name.removeprefix("no_")
        if not equals and switch in settings and settings[switch].hint is bool:
            texts[switch] = [str(switch == name)]
            continue
        if name not in settings:
            raise ConfigError(f"{flag}: unknown flag{suggestion(as_flag(name), map(as_flag, settings))}")
        most = arity(settings[name].hint)
        given = [text] if equals else []
        while not equals and rest and len(given) < most and not is_flag(rest[-1]):
            given.append(rest.pop())
        if not given:
            raise ConfigError(f"{flag}: needs a value; one that begins with two dashes is written {flag}=--value")
        texts[name] = texts.get(name, []) + given if most == math.inf else given
    places = [name for name in positional if name not in texts]
    if len(free) > len(places):
        raise ConfigError(f"{free[len(places)]!r}: unexpected; a value stands behind its flag")
    return texts | {name: [text] for name, text in zip(places, free, strict=False)}


def is_flag(token: str) -> bool:
    """Whether a word of the command line is a flag, and no value."""
    return re.match("--[a-zA-Z]", token) is not None


def as_flag(name: str) -> str:
    """A setting's flag."""
    return "--" + name.replace("_", "-")


def arity(hint: Any) -> float:
    """How many values a setting of this type takes on the command line, at most."""
    inner = get_args(hint)
    if type(None) in inner:
        return arity(inner[0])
    if get_origin(hint) is tuple and inner[-1] is not Ellipsis:
        return len(inner)
    return math.inf if get_origin(hint) in (list, tuple) else 1


def overview() -> str:
    """The help of the program itself."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    return f"""usage: {PROGRAM} COMMAND [settings]

Fine-tune RWKV language models.

{chr(10).join(lines)}

{PROGRAM} COMMAND --help shows the settings of a command, {PROGRAM} --version the version."""


def print_help(name: str, command: Command, everything: bool) -> None:
    """A command's settings, drawn by tyro; the advanced ones only if `everything`."""
    import tyro

    text = f"{command.kind.__doc__}\n--config FILE reads settings from a YAML file; flags override it."
    if not everything and any(ADVANCED in setting.marks for setting in settings_of(command.kind).values()):
        text += "\n--help-all shows every setting; these are the ones that people use first."
    page = help_page(command.kind, command.positional, everything)
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    try:
        tyro.cli(page, prog=f"{PROGRAM} {name}", description=text, args=["--help"], config=markers)
    except SystemExit:  # which is how tyro ends a help
        return


def help_page(kind: type[Any], positional: Sequence[str], everything: bool) -> type[Any]:
    """A subclass of `kind` whose types tell tyro how to show them; order and docstrings are those of `kind`."""
    import tyro

    settings, hints = settings_of(kind), get_type_hints(kind)
    shown: list[tuple[str, Any, Any]] = []
    for part in fields(kind):
        if part.name not in settings:
            inner = help_page(hints[part.name], (), everything)
            shown.append((part.name, inner, field(default_factory=inner)))
            continue
        setting = settings[part.name]
        label = part.name.upper() if part.name in positional else metavar(setting.hint)
        marks = [tyro.conf.arg(metavar=label, help_behavior_hint=default_text(setting.default))]
        if part.name in positional:
            marks.append(tyro.conf.Positional)
        if ADVANCED in setting.marks and not everything:
            marks.append(tyro.conf.Suppress)
        shown.append((part.name, Annotated[(setting.hint, *marks)], field(default=setting.default)))
    return make_dataclass(kind.__name__, shown, bases=(kind,))


def metavar(hint: Any) -> str | None:
    """What stands for the value of a flag in the help; nothing for a switch."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "|".join(inner)
    if type(None) in inner:
        return metavar(inner[0])
    if origin in (list, tuple):
        many = origin is list or inner[-1] is Ellipsis
        return f"{metavar(inner[0])}..." if many else " ".join(str(metavar(kind)) for kind in inner)
    return {int: "N", float: "X", Path: "PATH", str: "TEXT"}.get(hint)


def default_text(default: Any) -> str:
    """The end of a setting's help; where the default is no plain value, the docstring says what it means."""
    if default is MISSING:
        return "(required)"
    if default is None or default is False or default in ("auto", "same", "", ()):
        return ""
    values = default if isinstance(default, tuple) else (default,)
    text = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return "[" + text.replace("\n", "\\n") + "]"


# Running a command


def train(config: TrainConfig) -> int:
    """Fine-tune; a run that was stopped by hand has saved its adapter, but is not done."""
    from .training.run import train

    return INTERRUPTED if train(config).interrupted else 0


def demo(config: DemoConfig) -> None:
    """Tune the tiny model."""
    from .demo import run_demo

    run_demo(config)


def merge(config: MergeConfig) -> None:
    """Merge, and say where the file is."""
    from .export.merge import merge

    print(merge(config.base, config.adapter, config.out, config.dtype, config.overwrite))


def generate(config: GenerateConfig) -> None:
    """Continue a prompt."""
    from .inference import run_generate

    run_generate(config)


def chat(config: ChatConfig) -> None:
    """Talk."""
    from .chat_repl import run_chat

    run_chat(config)


COMMANDS = {
    "demo": Command("tune the tiny model that comes with the program, in two minutes", DemoConfig, demo),
    "train": Command(
        "fine-tune a model on examples and write an adapter",
        TrainConfig,
        train,
        if_memory_ends="try --grad-checkpoint, a smaller --micro-batch or a smaller --ctx-len",
    ),
    "merge": Command("add an adapter to its base: BASE ADAPTER OUT", MergeConfig, merge, ("base", "adapter", "out")),
    "generate": Command("continue a prompt", GenerateConfig, generate),
    "chat": Command("talk with a model", ChatConfig, chat),
}
