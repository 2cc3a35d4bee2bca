"""Text to token ids and back: the World vocabulary of RWKV, and plain bytes."""

from __future__ import annotations

import ast
import codecs
from collections.abc import Iterable
from functools import cache, lru_cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt

from ..config import TokenizerName
from ..errors import ConfigError, DataError

WORLD_VOCAB_SIZE = 65536
BYTE_VOCAB_SIZES = range(257, 513)
CACHED_PIECES = 1 << 16
CACHED_PIECE_BYTES = 64


class Tokenizer:
    """Greedy longest match over a list of byte strings that holds every single byte, so that any text has ids.

    Token i of the list has id i+1; id 0 ends a document and has no text.
    """

    end_token = 0

    def __init__(self, name: str, tokens: list[bytes], vocab_size: int) -> None:
        """`vocab_size` is the number of ids in a model made for it, at least `len(tokens) + 1`."""
        self.name = name
        self.vocab_size = vocab_size
        self._tokens = [b"", *tokens]
        self._ids = {token: index for index, token in enumerate(tokens, 1)}
        self._lengths = _lengths_by_start(tokens)
        self._boundary = _boundary_pairs(tokens)
        self._cached_match = lru_cache(CACHED_PIECES)(self._match)

    @staticmethod
    @cache
    def world() -> Tokenizer:
        """The tokenizer of the public RWKV models; read from the package on first use."""
        file = files("rwkv_peft").joinpath("assets", "world", "rwkv_vocab_v20230424.txt")
        # A line is `id literal length`; the ids count from 1. One literal for all lines is faster than one each.
        lines = file.read_text("utf-8").rstrip("\n").split("\n")
        literals = ast.literal_eval(f"[{','.join(line[line.index(' ') : line.rindex(' ')] for line in lines)}]")
        tokens = [token if isinstance(token, bytes) else token.encode() for token in literals]
        return Tokenizer("world", tokens, WORLD_VOCAB_SIZE)

    @staticmethod
    @cache
    def byte() -> Tokenizer:
        """One id a byte: byte b is id b+1, as in the World vocabulary."""
        return Tokenizer("byte", [bytes([byte]) for byte in range(256)], 257)

    @property
    def largest_id(self) -> int:
        """The largest id that has a text."""
        return len(self._tokens) - 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end token. Raises `DataError` on a lone surrogate."""
        data = utf8(text)
        ends = np.flatnonzero(self._boundary[_byte_pairs(data)]).tolist()
        # Pieces between boundaries do not influence each other and repeat (they are mostly words): remember their ids.
        ids: list[int] = []
        start = 0
        for end in (*ends, len(data)):
            piece = data[start : end + 1]
            ids += self._cached_match(piece) if len(piece) <= CACHED_PIECE_BYTES else self._match(piece)
            start = end + 1
        return ids

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

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for. Raises `DataError` on an id that has no token."""
        return b"".join(self._token(index) for index in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises `DataError` on an id that has no token."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decoder(self) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self)

    def _token(self, index: int) -> bytes:
        if not 0 <= index <= self.largest_id:
            raise DataError(
                f"token id {index}: not in the {self.name} vocabulary, which has 0 to {self.largest_id}; "
                "were these ids made by another tokenizer?"
            )
        return self._tokens[index]


class StreamDecoder:
    """Turns ids into text as they arrive and keeps back the bytes of a character that is not complete yet."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The text that is complete with this id, often a word, sometimes nothing.

        A model can sample one of the few ids that its vocabulary leaves unused: that is no reason to stop, and shows as
        U+FFFD.
        """
        unused = token_id > self._tokenizer.largest_id
        return self._utf8.decode("\ufffd".encode() if unused else self._tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """What was kept back, at the end of the text; the decoder is new again."""
        return self._utf8.decode(b"", final=True)


def tokenizer_for(name: TokenizerName, vocab_size: int) -> Tokenizer:
    """The tokenizer `name` for a model with `vocab_size` ids. Raises `ConfigError` if none fits."""
    if name == "auto":
        if vocab_size == WORLD_VOCAB_SIZE:
            return Tokenizer.world()
        if vocab_size in BYTE_VOCAB_SIZES:
            return Tokenizer.byte()
        raise ConfigError(
            f"--tokenizer auto: cannot tell for a vocabulary of {vocab_size}; it knows {WORLD_VOCAB_SIZE} (world) and "
            f"{BYTE_VOCAB_SIZES[0]} to {BYTE_VOCAB_SIZES[-1]} (byte); use such a model, or name the tokenizer if it is "
            "world or byte"
        )
    tokenizer = Tokenizer.world() if name == "world" else Tokenizer.byte()
    if tokenizer.largest_id >= vocab_size:
        raise ConfigError(
            f"--tokenizer {name}: its ids go up to {tokenizer.largest_id}, the model's only to {vocab_size - 1}; "
            "leave the setting out, or use another model"
        )
    return tokenizer


def utf8(text: str) -> bytes:
    """`text` as UTF-8. Raises `DataError` if half of a surrogate pair stands alone, which is no character."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"lone surrogate U+{ord(text[error.start]):04X}: only whole characters have tokens; remove it, or write "
            "the whole pair"
        ) from None


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
