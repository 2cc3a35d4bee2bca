"""Examples as the model sees them, with what it does not learn set apart."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import groupby

from rich.console import Console
from rich.text import Text

from ..data.masking import Encoded
from ..data.tokenizer import Tokenizer

GREY = "grey50"
MARKS, PLAIN_MARKS = ("⟦", "⟧"), ("[[", "]]")
# What steers a terminal or turns the direction of writing, but for line breaks and tabs
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


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
        for is_learnt, pairs in groupby(zip(example.ids.tolist(), example.target.tolist(), strict=True), lambda p: p[1]):
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
