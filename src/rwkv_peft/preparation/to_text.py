"""Binidx pairs back to text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path

from ..config import PrepareConfig
from ..data.binidx import Binidx, open_binidx
from ..data.sources import Split
from ..data.templates import find_template
from ..errors import ConfigError, DataError
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
        self.documents = self.left_out = self.broken = self.ended_inside = 0

    def texts(self, paths: list[str], split: str) -> Iterator[str]:
        """The text of each document that `split` chooses of all pairs together, its end token taken off.

        Raises DataError if a pair cannot be used, or if none is chosen.
        """
        pairs = [open_binidx(path, self.tokenizer.largest_id + 1) for path in paths]
        bounds = [0, *accumulate(len(pair.starts) for pair in pairs)]
        first, last, _ = Split.parse(split).of(bounds[-1]).indices(bounds[-1])
        if first >= last:
            raise DataError(f"--split {split}: none of the {bounds[-1]:,} documents; choose a wider one")
        self.left_out = bounds[-1] - (last - first)
        for pair, (begin, end) in zip(pairs, pairwise(bounds), strict=True):
            for number in range(max(first, begin), min(last, end)):
                self.documents += 1
                yield self._text(pair, number - begin)

    def _text(self, pair: Binidx, number: int) -> str:
        start, length = int(pair.starts[number]), int(pair.lengths[number])
        ids = pair.ids[start : start + length].tolist()
        if ids and ids[-1] in self.ends:
            ids.pop()
        self.ended_inside += self.tokenizer.end_token in ids
        try:
            data = self.tokenizer.decode_bytes(ids)
        except DataError as error:
            raise DataError(f"{pair.title}.bin: document {number + 1}: {error}") from None
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
    _refuse_idle(config)
    back = BackToText(Recipe.of(config))
    texts = back.texts(config.data, config.split)
    write_atomic(config.out, lambda path: _write(path, texts, config.out.suffix.lower(), config.separator))
    chosen = f"{back.documents:,}" + (f" of {back.documents + back.left_out:,}" if back.left_out else "")
    notes = [f"{config.out}: {chosen} documents, {config.out.stat().st_size / 1e6:,.1f} MB"]
    if back.broken:
        notes.append(f"{back.broken:,} hold bytes that are not UTF-8, written as U+FFFD")
    if back.ended_inside:
        notes.append(f"{back.ended_inside:,} hold token 0 before their end, which has no text")
    return "; ".join(notes)


def _refuse_idle(config: PrepareConfig) -> None:
    """Raise ConfigError if a setting was given that means nothing where text is made of tokens."""
    if (name := Split.parse(config.split).name) != "train":
        raise ConfigError(f"--split {config.split}: a pair of files has no split {name!r}; write train, or train[a:b]")
    ends = config.stop_token is None and find_template(config.template).stop is not None
    idle = {
        "--fields": config.fields is not None,
        "--template": config.template != PrepareConfig.template and not ends,
        "--subset": bool(config.subset),
        "--on-bad-line": config.on_bad_line != PrepareConfig.on_bad_line,
        "--separator": bool(config.separator) and config.out.suffix.lower() == ".jsonl",
    }
    for flag, is_given in idle.items():
        if is_given:
            raise ConfigError(f"{flag}: has no effect where tokens become {config.out.suffix} text; leave it out")


def _write(path: Path, texts: Iterator[str], suffix: str, separator: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, text in enumerate(texts):
            if suffix == ".jsonl":
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            else:
                file.write(((separator or BLANK_LINE) if number else "") + text)
