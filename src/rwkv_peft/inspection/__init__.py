"""`rwkv-peft inspect`: what a file or a folder holds, for people."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from ..config import InspectConfig, shares_of
from ..errors import ConfigError

LABEL = 13  # letters before what a line tells


def run_inspect(config: InspectConfig, console: Console | None = None) -> None:
    """Tell what each model, adapter or state among `config.data` is, and then what the data among them would train.

    Raises:
        CheckpointError: a model, adapter or state that is damaged or unknown.
        ConfigError: a setting that does not fit the data.
        DataError: a source of data that cannot be read at all; what is wrong with its examples is only told.
        OutputError: the picture cannot be written.
    """
    from .weights import is_best, is_run, is_weights

    config.check()
    if config.picture and "\0" in str(config.picture):
        raise ConfigError(f"--picture {str(config.picture)!r}: is no name that a file can have; choose another one")
    if config.picture and config.picture.suffix.lower() != ".png":
        raise ConfigError(f"--picture {config.picture}: must end in .png, which it will be; rename it")
    console = console or Console()
    weights = [
        source for source, _ in shares_of(config.data) if is_weights(source) or is_run(source) or is_best(source)
    ]
    data = [source for source in config.data if source not in weights]
    for number, path in enumerate(weights):
        say(console, *[""] * (number > 0))
        inspect_weights(path, console)
    if data:
        say(console, *[""] * bool(weights))
        inspect_data(replace(config, data=data, on_bad_line="skip"), console)


def inspect_weights(path: str, console: Console) -> None:
    """Tell what a model, adapter or state is, or each of those that a run has written."""
    from .weights import is_best, is_weights, weights_of_run, weights_rows

    every = [path]
    if is_best(path):
        every = weights_of_run(path)
        say(console, f"{path} is taken for the best of a run")
    elif not is_weights(path):
        every = weights_of_run(path)
        say(console, f"{path} is taken for the folder of a run")
    for place in every:
        for number, (label, text) in enumerate(weights_rows(place)):
            if not number:
                say(console, place)
            say(console, labelled(label, text))


def inspect_data(config: InspectConfig, console: Console) -> None:
    """Tell what data is, with the lengths of its examples and some of them in full."""
    from ..data.corpus import NoneLeftError
    from .data import layout_row, problem_rows, rows_of, tokenizer_of, view_of
    from .examples import can_write, show_examples
    from .lengths import FULL, draw, histogram

    tokenizer = tokenizer_of(config)
    try:
        with console.status("reading"):
            view = view_of(config, tokenizer)
    except NoneLeftError as error:
        for label, text in problem_rows([error.record] if error.record else []):
            say(console, labelled(label, text))
        say(console, labelled("rows", f"none: {error}"))
        return
    for label, text in rows_of(view):
        say(console, labelled(label, text))
    lengths = view.data.examples.inputs
    for line in histogram(lengths, plain=not can_write(console, FULL)):
        say(console, labelled("", line))
    say(console, labelled(*layout_row(view)))
    if config.picture:
        draw(config.picture, lengths, config.ctx_len)
        say(console, labelled("picture", str(config.picture)))
    show_examples(view, console)


def labelled(label: str, text: str) -> str:
    """A line of what is told, under the one before."""
    return f"{label:<{LABEL}}{text}"


def say(console: Console, *lines: str) -> None:
    """Print lines as they are, however long."""
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
