"""Examples as the model sees them, with what it does not learn set apart."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text

from ..data.dataset import plural
from ..data.masking import Encoded
from ..data.tokenizer import Tokenizer
from .data import View

GREY = "bright_black"
MARKS, PLAIN_MARKS = ("⟦", "⟧"), ("[[", "]]")
# What steers a terminal or turns the direction of writing, but for line breaks and tabs
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def show_examples(view: View, console: Console) -> None:
    """Write --show examples, spread evenly, or windows where training sees these."""
    writer = Writer(console, view.tokenizer, {view.tokenizer.end_token, view.encoder.stop})
    for title, example in windows(view) if view.sampler.stream else examples(view):
        console.print(f"\n--- {title}", style="bold", highlight=False, markup=False, soft_wrap=True)
        if example is not None:
            writer.write(example)


def examples(view: View) -> Iterator[tuple[str, Encoded | None]]:
    """Some examples, in the pieces that fit a row, with what stands above each; None if none is left."""
    data = view.data
    for number in spread(len(data.examples), view.config.show):
        first, end = int(data.first[number]), int(data.first[number + 1])
        if first == end:
            yield f"{view.origin(number)}: {plural(int(data.examples.inputs[number]), 'token')}, not trained on", None
        for index in range(first, end):
            piece = data.piece(index)
            part = f", row {index - first + 1} of {end - first}" if end - first > 1 else ""
            yield f"{view.origin(number)}{part}: {counted(piece)}", piece


def windows(view: View) -> Iterator[tuple[str, Encoded]]:
    """Some windows of the stream of all tokens, by their place in it, with what stands above each."""
    stream = view.sampler.stream
    assert stream is not None
    places = np.sort(view.sampler.rows(0).members)
    for number in spread(len(places), view.config.show):
        window = stream.read(int(places[number]))
        yield f"from token {places[number]:,} of all: {counted(window)}", window


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` things, evenly, from the first on."""
    wanted = min(count, wanted)
    return [number * count // wanted for number in range(wanted)]


def counted(example: Encoded) -> str:
    """How long an example is, and how much of it is learnt."""
    return f"{plural(example.inputs, 'token')}, {example.targets:,} trained on"


class Writer:
    """Writes examples: what is learnt as it is, what is masked in grey, or where there is no colour between marks."""

    def __init__(self, console: Console, tokenizer: Tokenizer, ends: Collection[int]) -> None:
        """`ends` are the tokens that end an answer or a document, which are shown as their ids."""
        self.console, self.tokenizer, self.ends = console, tokenizer, ends
        self.colour = console.color_system is not None and not console.no_color
        self.marks = MARKS if can_write(console, "".join(MARKS)) else PLAIN_MARKS

    def write(self, example: Encoded) -> None:
        """Write the tokens of an example; an id in angle brackets is a token that ends something, or has no text."""
        text = Text()
        for is_learnt, pairs in groupby(
            zip(example.ids.tolist(), example.target.tolist(), strict=True), lambda p: p[1]
        ):
            shown = "".join(self._pieces([token for token, _ in pairs]))
            if is_learnt or self.colour:
                text.append(shown, None if is_learnt else GREY)
            else:
                text.append(shown.join(self.marks))
        if self.colour:
            self.console.print(text, highlight=False, soft_wrap=True)
        else:  # rich would write spaces for a tab
            self.console.file.write(text.plain + "\n")

    def _pieces(self, ids: list[int]) -> Iterator[str]:
        """The text of tokens that are masked or learnt alike: their bytes together, so that characters stay whole."""
        for is_mark, tokens in groupby(ids, self._is_mark):
            if is_mark:
                yield from (f"<{token}>" for token in tokens)
            else:
                yield harmless(self.tokenizer.decode_bytes(tokens).decode("utf-8", errors="backslashreplace"))

    def _is_mark(self, token: int) -> bool:
        return token in self.ends or token > self.tokenizer.largest_id


def can_write(console: Console, text: str) -> bool:
    """Whether the encoding of the output has all of these letters."""
    try:
        text.encode(console.encoding)
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def harmless(text: str) -> str:
    """Text in which control characters are written as their codes."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
