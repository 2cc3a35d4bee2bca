"""Greedy longest match: bytes to the ids of a list of tokens, by our own code and by a compiled package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..packages import optional

if TYPE_CHECKING:
    if sys.version_info >= (3, 11):
        from importlib.resources.abc import Traversable
    else:
        from importlib.abc import Traversable

FAST_PACKAGE = "pyrwkv_tokenizer"
CACHED_PIECES = 1 << 16
CACHED_PIECE_BYTES = 64
STRETCH = 1 << 20  # characters of a text that are encoded at once
LOOK_AHEAD = 1 << 12  # characters among which a place to cut is looked for

FastEncoder = Callable[[str], "list[int]"]


class Matcher:
    """Matches a list of byte strings that holds every single byte, so that any bytes have ids: i+1 for the i-th."""

    def __init__(self, tokens: list[bytes]) -> None:
        self._ids = {token: index for index, token in enumerate(tokens, 1)}
        self._lengths = _lengths_by_start(tokens)
        self._boundary = _boundary_pairs(tokens)
        self._cached_match = lru_cache(CACHED_PIECES)(self._match)

    def encode(self, data: bytes) -> list[int]:
        """Ids of `data`."""
        # Pieces between boundaries do not influence each other and repeat (they are mostly words): remember their ids.
        ids: list[int] = []
        start = 0
        for end in (*self._cuts(data), len(data)):
            piece = data[start:end]
            ids += self._cached_match(piece) if len(piece) <= CACHED_PIECE_BYTES else self._match(piece)
            start = end
        return ids

    def stretches(self, text: str) -> Iterator[str]:
        """`text` in stretches of about a million characters, whose ids one behind the other are those of `text`."""
        start = 0
        while len(text) - start > STRETCH:
            end = self._next_cut(text, start + STRETCH)
            yield text[start:end]
            start = end
        yield text[start:]

    def _next_cut(self, text: str, start: int) -> int:
        """The first place from `start` on, in characters, where a token always ends; the end if there is none."""
        while start < len(text) - 1:
            data = text[start : start + LOOK_AHEAD].encode("utf-8", "surrogatepass")
            for cut in self._cuts(data):
                if data[cut] & 0xC0 != 0x80:  # not inside a character
                    return start + len(data[:cut].decode("utf-8", "surrogatepass"))
            start += LOOK_AHEAD - 1  # the last character and the next one have not been looked at together
        return len(text)

    def _cuts(self, data: bytes) -> list[int]:
        """Every place in `data` where a token always ends."""
        found: list[int] = (np.flatnonzero(self._boundary[_byte_pairs(data)]) + 1).tolist()
        return found

    def _match(self, data: bytes) -> tuple[int, ...]:
        """Ids of `data` by greedy longest match."""
        ids = []
        start = 0
        while start < len(data):
            for length in self._lengths.get(data[start : start + 2], (1,)):
                token = data[start : start + length]
                if token in self._ids:
                    break
            ids.append(self._ids[token])
            start += len(token)
        return tuple(ids)


def world_file() -> Traversable:
    """The World vocabulary, in the package: a line is `id literal length`, and the ids count from 1."""
    return files("rwkv_peft") / "assets" / "world" / "rwkv_vocab_v20230424.txt"


@cache
def fast_world() -> FastEncoder | None:
    """The encoder of a compiled package that reads our World vocabulary, or None where it is not installed."""
    try:
        package = optional(FAST_PACKAGE, "the World tokenizer")
    except ConfigError:
        return None
    with as_file(world_file()) as path:
        encode: FastEncoder = package.RWKVTokenizer(vocab_filepath=str(path)).tokenizer.encode
    return encode


def _lengths_by_start(tokens: list[bytes]) -> dict[bytes, tuple[int, ...]]:
    """First two bytes of a token → the lengths of all tokens that begin so, and 1; longest first."""
    lengths: dict[bytes, set[int]] = {}
    for token in tokens:
        if len(token) > 1:
            lengths.setdefault(token[:2], {1}).add(len(token))
    return {start: tuple(sorted(found, reverse=True)) for start, found in lengths.items()}


def _boundary_pairs(tokens: list[bytes]) -> npt.NDArray[np.bool_]:
    """(65536,) bool: whether no token contains this pair of bytes, so that a token always ends between the two."""
    last_bytes = np.cumsum([len(token) for token in tokens])[:-1] - 1
    boundary = np.ones(1 << 16, np.bool_)
    boundary[np.delete(_byte_pairs(b"".join(tokens)), last_bytes)] = False
    return boundary


def _byte_pairs(data: bytes) -> npt.NDArray[np.uint16]:
    """(len(data) - 1,): each byte with the next as one number, a view of `data` in which the pairs overlap."""
    return np.ndarray((max(len(data) - 1, 0),), np.uint16, data, strides=(1,))
