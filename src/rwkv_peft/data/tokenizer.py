"""Text to token ids and back: the World vocabulary of RWKV, and plain bytes."""

from __future__ import annotations

import ast
import codecs
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import cache, cached_property

from ..config import TokenizerName
from ..errors import ConfigError, DataError
from .matching import FAST_PACKAGE, FastEncoder, Matcher, fast_world, world_file

WORLD_VOCAB_SIZE = 65536
BYTE_VOCAB_SIZES = range(257, 513)
MOST_SHOWN = 60  # characters of a user's text in a message
ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([ntr0\\]))")
ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\"}


class Tokenizer:
    """Greedy longest match over a list of byte strings that holds every single byte, so that any text has ids.

    Token i of the list has id i+1; id 0 ends a document and has no text.
    """

    end_token = 0

    def __init__(self, name: str, tokens: list[bytes], vocab_size: int) -> None:
        """`vocab_size` is the number of ids in a model made for it, at least `len(tokens) + 1`."""
        self.name = name
        self.vocab_size = vocab_size
        self._plain = tokens
        self._tokens = [b"", *tokens]
        self._specials: dict[bytes, int] = {}

    @staticmethod
    @cache
    def world() -> Tokenizer:
        """The tokenizer of the public RWKV models; read from the package on first use."""
        # A line is `id literal length`; the ids count from 1. One literal for all lines is faster than one each.
        lines = world_file().read_text("utf-8").rstrip("\n").split("\n")
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

    @property
    def engine(self) -> str:
        """What finds the ids: the package `pyrwkv_tokenizer`, or `python`. It decides the speed, never the ids."""
        return FAST_PACKAGE if self._fast() else "python"

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end token. Raises `DataError` on a lone surrogate."""
        if self._specials:
            return self._around_specials(utf8(text), lambda piece: self._encode_plain(piece.decode()))
        return self._encode_plain(text)

    def stretches(self, text: str) -> Iterator[str]:
        """`text` in stretches, so that a long one takes less memory; their ids, side by side, are those of `text`.

        With special tokens, which may stand anywhere, it is one stretch.
        """
        return iter([text]) if self._specials else self._matcher.stretches(text)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes, UTF-8 or not; of UTF-8 they are those of its text."""
        return self._around_specials(data, self._matcher.encode)

    def with_special(self, texts: Sequence[str], vocab_size: int) -> Tokenizer:
        """A tokenizer for which each of `texts` is one token wherever it stands, with the ids after the largest one.

        Where several begin at one place, the longest counts. `vocab_size` is the number of ids of the model.

        Raises:
            ConfigError: no room for so many, a text that is one token already, or one that is empty or no text.
        """
        if not texts:
            return self
        tokenizer = copy(self)
        tokenizer._tokens, tokenizer._specials = [*self._tokens], {**self._specials}
        for text in texts:
            try:
                token = utf8(text)
            except DataError as error:
                raise ConfigError(f"--special-tokens: {error}") from None
            if len(self.encode(text)) == 1 or token in tokenizer._specials or not text:
                what = "is one token already" if text else "is empty"
                raise ConfigError(f"--special-tokens {_shown(text)}: {what}; leave it out")
            tokenizer._specials[token] = len(tokenizer._tokens)
            tokenizer._tokens.append(token)
        room = max(vocab_size - 1 - self.largest_id, 0)
        if len(texts) > room:
            raise ConfigError(
                f"--special-tokens: got {len(texts)}, the {self.name} vocabulary has room for {room} in a model of "
                f"{vocab_size} ids; leave out {len(texts) - room}"
            )
        tokenizer.vocab_size = max(self.vocab_size, len(tokenizer._tokens))
        return tokenizer

    def stop_id(self, value: str) -> int:
        r"""The id that --stop-token names: a whole number is an id, anything else a text that is exactly one token.

        So `5` is the id 5; `\x35` is the text "5". In a text, `\n`, `\t`, `\r`, `\0`, `\xHH`, `\uHHHH` and `\UHHHHHHHH`
        stand for the character that they mean in Python, and two backslashes for one.

        Raises:
            ConfigError: an id that is not in the vocabulary, a text of another number of tokens, or no text.
        """
        shown = _shown(value)
        if re.fullmatch(r"[+-]?[0-9]+", value):
            number = int(value) if len(value) < 20 else -1
            if 0 <= number <= self.largest_id:
                return number
            raise ConfigError(
                f"--stop-token {shown}: not in the {self.name} vocabulary, which has the ids 0 to {self.largest_id}; "
                "give one of them, or a text that is one token"
            )
        try:
            ids = self.encode(_unescape(value))
        except DataError as error:
            raise ConfigError(f"--stop-token {shown}: {error}") from None
        if len(ids) != 1:
            raise ConfigError(
                f"--stop-token {shown}: is {len(ids)} tokens of the {self.name} vocabulary, must be one; give an id or "
                "another text, or make it one token with --special-tokens"
            )
        return ids[0]

    def _around_specials(self, data: bytes, encode: Callable[[bytes], list[int]]) -> list[int]:
        """Ids of `data`: special tokens where they stand, and what `encode` makes of the stretches between them."""
        if not self._specials:
            return encode(data)
        longest_first = sorted(self._specials, key=len, reverse=True)
        ids: list[int] = []
        start = 0
        for match in re.finditer(b"|".join(map(re.escape, longest_first)), data):
            ids += encode(data[start : match.start()])
            ids.append(self._specials[match[0]])
            start = match.end()
        return ids + encode(data[start:])

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of `text`, special tokens left aside."""
        fast = self._fast()
        if fast is None:
            return self._matcher.encode(utf8(text))
        try:
            return fast(text)
        except UnicodeEncodeError:
            utf8(text)
            raise

    @cached_property
    def _matcher(self) -> Matcher:
        return Matcher(self._plain)

    def _fast(self) -> FastEncoder | None:
        return fast_world() if self.name == "world" else None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for. Raises `DataError` on an id that has no token."""
        known = list(ids)
        if known and (min(known) < 0 or max(known) > self.largest_id):
            wrong = next(index for index in known if not 0 <= index <= self.largest_id)
            raise DataError(
                f"token id {wrong}: not in the {self.name} vocabulary, which has 0 to {self.largest_id}; "
                "were these ids made by another tokenizer?"
            )
        return b"".join([self._tokens[index] for index in known])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises `DataError` on an id that has no token."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decoder(self) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self)


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


def _unescape(text: str) -> str:
    """`text` with its backslash escapes replaced by what they stand for; other backslashes stay."""

    def character(match: re.Match[str]) -> str:
        code = match[1] or match[2] or match[3]
        if code is None:
            return ESCAPED[match[4]]
        return chr(int(code, 16)) if int(code, 16) <= sys.maxunicode else match[0]

    return ESCAPE.sub(character, text)


def _shown(text: str) -> str:
    """`text` as a message shows it: on one line, and not for ever."""
    short = text[:MOST_SHOWN] + "…" * (len(text) > MOST_SHOWN)
    return short if short.isprintable() and short else repr(short)
