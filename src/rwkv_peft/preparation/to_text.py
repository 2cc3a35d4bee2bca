"""Binidx pairs back to text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..config import PrepareConfig
from ..data.binidx import Binidx, open_binidx
from ..errors import DataError
from ..files import write_atomic
from .encoding import BlockEncoder, Recipe

TEXT_SUFFIXES = (".jsonl", ".txt")
BLANK_LINE = "\n\n"


class BackToText:
    """The texts of documents, and a count of what in them is no text."""

    def __init__(self, recipe: Recipe) -> None:
        """Raises ConfigError if the tokenizer cannot be built, or the stop token is not in it."""
        encoder = BlockEncoder(recipe)
        self.tokenizer = encoder.tokenizer
        self.ends = (encoder.stop, self.tokenizer.end_token)
        self.documents = self.broken = self.ended_inside = 0

    def texts(self, path: str) -> Iterator[str]:
        """The text of each document, its end token taken off. Raises DataError if the pair cannot be used."""
        pair = open_binidx(path, self.tokenizer.largest_id + 1)
        for start, length in zip(pair.starts.tolist(), pair.lengths.tolist(), strict=True):
            self.documents += 1
            yield self._text(pair, start, length)

    def _text(self, pair: Binidx, start: int, length: int) -> str:
        ids = pair.ids[start : start + length].tolist()
        if ids and ids[-1] in self.ends:
            ids.pop()
        self.ended_inside += self.tokenizer.end_token in ids
        try:
            data = self.tokenizer.decode_bytes(ids)
        except DataError as error:
            raise DataError(f"{pair.title}.bin: document {self.documents}: {error}") from None
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.broken += 1
            return data.decode(errors="replace")


def write_back(config: PrepareConfig) -> str:
    """Write the text of the binidx pairs `config.data` to `config.out`, and return a line that says what was written.

    A `.jsonl` file has one {"text": …} a document, from which the same tokens can be prepared. A `.txt` file is for
    reading: documents are joined by --separator, or else by a blank line, which may be inside of them as well.

    Raises:
        ConfigError, DataError: the settings, or a pair, cannot be used.
        OutputError: the file cannot be written.
    """
    back = BackToText(Recipe.of(config))
    texts = (text for source in config.data for text in back.texts(source))
    write_atomic(config.out, lambda path: _write(path, texts, config.out.suffix.lower(), config.separator))
    notes = [f"{config.out}: {back.documents:,} documents, {config.out.stat().st_size / 1e6:,.1f} MB"]
    if back.broken:
        notes.append(f"{back.broken:,} hold bytes that are not UTF-8, written as U+FFFD")
    if back.ended_inside:
        notes.append(f"{back.ended_inside:,} hold token 0 before their end, which has no text")
    return "; ".join(notes)


def _write(path: Path, texts: Iterator[str], suffix: str, separator: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, text in enumerate(texts):
            if suffix == ".jsonl":
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            else:
                file.write(((separator or BLANK_LINE) if number else "") + text)
