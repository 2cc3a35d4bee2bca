"""Text and bytes ↔ ids: the World vocabulary as others have it, bytes, special tokens, and the stop token."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_peft.data import matching
from rwkv_peft.data.tokenizer import Tokenizer, tokenizer_for
from rwkv_peft.errors import ConfigError, DataError

WORLD = Tokenizer.world()
BYTE = Tokenizer.byte()

HARD_TEXTS = [
    "",
    "a",
    " ",
    "Hello, world! It's 2024-01-01.",
    "  \t \n\n\r\n \r x\n\n\n\ny" + " " * 300 + "\n" * 200,
    "User: hi\n\nAssistant: hello\n\nUser:",
    "def f(x):\n\treturn {k: v for k, v in x.items()}\r\n\r\n",
    "我们来谈谈人工智能，以及RWKV。这是一个没有空格的很长的句子然后继续继续继续继续继续继续继续继续继续继续继续继续",
    "日本語のテキスト、한국어 텍스트、Русский текст, نص عربي, हिन्दी",
    "👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪 e\u0301 \u200b\u2028\ufeff\x00\x7f\x85 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "Z̷̧̢̛a̸̱͝l̶̨̛g̵̡͘ǫ̴̛ \u0300\u0301\u0302 नि ก็ ﷽ \u202eabc\u202c",
    "\x00\x00a\x00\n\x00" * 30,
    "aaaaaaaaaaaaaaaaaaaaaaaaa ========================= ------------- ..........",
    "0123456789" * 20 + "deadbeef" * 20,
]
MEGABYTE = 1_000_000


def random_text(characters: int, seed: int) -> str:
    """Characters of all planes, without the surrogates, which are none."""
    codes = np.random.default_rng(seed).integers(0, 0x110000 - 0x800, characters)
    return "".join(map(chr, np.where(codes < 0xD800, codes, codes + 0x800).tolist()))


LONG_TEXTS = {
    "one letter": "a" * MEGABYTE,
    "spaces": " " * MEGABYTE,
    "NUL": "\0" * MEGABYTE,
    "letters": "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=MEGABYTE)),
    "words": "The quick brown fox, 我们 and 42 others. " * (MEGABYTE // 40),
    "all planes": random_text(MEGABYTE // 4, seed=2),
}

# Whitespace, letters, punctuation, CJK and emoji next to each other, where tokens compete; and everything else.
texts = st.one_of(st.text(st.sampled_from("  \n\n\r\tab.Thé,'\"=-09我们的，。👍🏽é")), st.text())


@pytest.fixture(scope="module")
def trie() -> Any:
    import rwkv.rwkv_tokenizer as oracle

    return oracle.TRIE_TOKENIZER(str(Path(oracle.__file__).with_name("rwkv_vocab_v20230424.txt")))


# --- World: the compiled package, our own matching and the rwkv package


def test_the_tests_compare_two_engines() -> None:
    assert (WORLD.engine, BYTE.engine) == ("pyrwkv_tokenizer", "python")


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_world_ids_are_those_of_the_rwkv_package(trie: Any, text: str) -> None:
    assert WORLD.encode(text) == WORLD.encode_bytes(text.encode()) == trie.encode(text)


@given(text=texts)
def test_world_ids_are_those_of_the_rwkv_package_on_any_text(trie: Any, text: str) -> None:
    assert WORLD.encode(text) == WORLD.encode_bytes(text.encode()) == trie.encode(text)


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_world_ids_of_a_megabyte_on_one_line(trie: Any, text: str) -> None:
    ids = WORLD.encode(text)
    assert ids == WORLD.encode_bytes(text.encode()) == trie.encode(text)
    assert WORLD.decode(ids) == text


def test_every_world_token_encodes_as_in_the_rwkv_package(trie: Any) -> None:
    assert all(WORLD.decode_bytes([index]) == token for index, token in trie.idx2token.items())
    assert all(WORLD.encode_bytes(token) == [index] for index, token in trie.idx2token.items())
    text = "".join(token.decode("utf-8", errors="ignore") for token in trie.idx2token.values())
    assert WORLD.encode(text) == WORLD.encode_bytes(text.encode()) == trie.encode(text)


@given(data=st.binary())
def test_world_ids_of_any_bytes_are_those_of_the_rwkv_package(trie: Any, data: bytes) -> None:
    assert WORLD.encode_bytes(data) == trie.encodeBytes(data)


def test_without_the_compiled_package_ids_are_the_same() -> None:
    script = (
        "import sys; sys.modules['pyrwkv_tokenizer'] = None\n"
        "from rwkv_peft.data.tokenizer import Tokenizer\n"
        "world = Tokenizer.world()\n"
        "print(world.engine, world.encode('Hello 我们 👍🏽\\n\\n'))"
    )
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"python {WORLD.encode('Hello 我们 👍🏽' + chr(10) * 2)}\n"


def test_the_compiled_package_is_loaded_at_first_need() -> None:
    script = (
        "import sys\n"
        "from rwkv_peft.data.tokenizer import Tokenizer\n"
        "Tokenizer.byte().encode('a'); world = Tokenizer.world()\n"
        "print('pyrwkv_tokenizer' in sys.modules); world.encode('a'); print('pyrwkv_tokenizer' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


# --- there and back


@given(text=texts, tokenizer=st.sampled_from([WORLD, BYTE]))
def test_round_trip(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0, *ids, 0]) == text


@given(data=st.one_of(st.binary(), st.binary(min_size=50, max_size=500)), tokenizer=st.sampled_from([WORLD, BYTE]))
def test_decoding_is_the_inverse_of_encoding_on_any_bytes(data: bytes, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_every_pair_of_bytes_comes_back() -> None:
    data = b"".join(bytes([first, second]) for first in range(256) for second in range(256))
    for tokenizer in (WORLD, BYTE):
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_byte_ids_are_one_more_than_the_byte() -> None:
    assert BYTE.encode("Aé\n") == [66, 0xC3 + 1, 0xA9 + 1, 11]
    assert all(WORLD.decode_bytes([index]) == BYTE.decode_bytes([index]) for index in range(257))


def test_names_and_sizes() -> None:
    assert (WORLD.name, WORLD.vocab_size, WORLD.end_token) == ("world", 65536, 0)
    assert (BYTE.name, BYTE.vocab_size, BYTE.end_token) == ("byte", 257, 0)
    assert Tokenizer.world() is WORLD


@pytest.mark.parametrize(("tokenizer", "index"), [(WORLD, 65530), (WORLD, 70000), (WORLD, -1), (BYTE, 257)])
def test_ids_without_a_token(tokenizer: Tokenizer, index: int) -> None:
    with pytest.raises(
        DataError, match=rf"^token id {index}: not in the {tokenizer.name} vocabulary, which has 0 to .*;"
    ):
        tokenizer.decode([1, index])


@pytest.mark.parametrize("tokenizer", [WORLD, BYTE, WORLD.with_special(["<x>"], 65536)], ids=["world", "byte", "more"])
@pytest.mark.parametrize(
    ("text", "code"), [("ab\ud83d", "D83D"), ("\udc00 é", "DC00"), ("x" * 99 + "\ud800\ud800", "D800")]
)
def test_lone_surrogate(tokenizer: Tokenizer, text: str, code: str) -> None:
    with pytest.raises(DataError, match=rf"^lone surrogate U\+{code}: .*; remove it.*$"):
        tokenizer.encode(text)


# --- stretches of a long text


@pytest.mark.parametrize("text", [*HARD_TEXTS, *(text[:5000] for text in LONG_TEXTS.values())])
@pytest.mark.parametrize("stretch", [1, 7, 100])
def test_stretches_are_the_text_and_have_its_ids(monkeypatch: pytest.MonkeyPatch, text: str, stretch: int) -> None:
    monkeypatch.setattr(matching, "STRETCH", stretch)
    monkeypatch.setattr(matching, "LOOK_AHEAD", 3)
    for tokenizer in (WORLD, BYTE):
        found = list(tokenizer.stretches(text))
        assert "".join(found) == text
        assert [index for piece in found for index in tokenizer.encode(piece)] == tokenizer.encode(text)
        if len(text) > 5 * stretch and len(set(text)) > 1 and len(tokenizer.encode(text)) > 200:
            assert len(found) > 1
    assert len(list(BYTE.stretches("ab" * 500))) >= 1000 // (stretch + 2)


def test_stretches_of_a_long_text_are_short() -> None:
    found = [len(piece) for piece in WORLD.stretches(LONG_TEXTS["words"] * 5)]
    assert len(found) == 5
    assert max(found) < matching.STRETCH + 100


# --- special tokens


def test_special_tokens_take_the_ids_after_the_largest() -> None:
    more = WORLD.with_special(["<|im_start|>", "<|im|>", "ẞ-ẞ"], 65536)
    assert (more.largest_id, more.vocab_size, WORLD.largest_id) == (65532, 65536, 65529)
    ids = more.encode("a<|im_start|><|im|> ẞ-ẞb")
    assert ids == [*WORLD.encode("a"), 65530, 65531, *WORLD.encode(" "), 65532, *WORLD.encode("b")]
    assert more.encode_bytes("a<|im_start|><|im|> ẞ-ẞb".encode()) == ids
    assert more.decode(ids) == "a<|im_start|><|im|> ẞ-ẞb"
    assert more.encode_bytes(b"\xff<|im|>\xff") == [256, 65531, 256]
    assert more.decoder().feed(65532) == "ẞ-ẞ"


@pytest.mark.parametrize("order", [["<a>", "<a><b>", "b><"], ["b><", "<a><b>", "<a>"], ["<a><b>", "b><", "<a>"]])
def test_the_longest_special_token_that_begins_first_wins(order: list[str]) -> None:
    more = BYTE.with_special(order, 300)
    id_of = {text: 257 + index for index, text in enumerate(order)}
    assert more.encode("<a><b><b>") == [id_of["<a><b>"], *BYTE.encode("<b>")]
    assert more.encode("<a><c><b><") == [id_of["<a>"], *BYTE.encode("<c><"), id_of["b><"]]


@given(text=st.text(st.sampled_from("ab<|> é")), tokenizer=st.sampled_from([WORLD, BYTE]))
def test_special_tokens_come_back(text: str, tokenizer: Tokenizer) -> None:
    more = tokenizer.with_special(["<|a|>", "|>é", "<<|"], 65536)
    ids = more.encode(text)
    assert more.decode(ids) == text
    assert ids == more.encode_bytes(text.encode())
    assert ids == [index for piece in more.stretches(text) for index in more.encode(piece)]


def test_no_special_tokens_change_nothing() -> None:
    assert WORLD.with_special((), 65536) is WORLD
    assert WORLD.with_special((), 100) is WORLD


def test_special_tokens_can_be_added_to() -> None:
    twice = WORLD.with_special(["<x>"], 65536).with_special(["<x><y>"], 65536)
    assert twice.encode("<x><x><y>") == [65530, 65531]


SIX = [f"<{i}>" for i in range(6)]


@pytest.mark.parametrize(
    ("tokenizer", "specials", "vocab_size", "message"),
    [
        (WORLD, [*SIX, "<6>"], 65536, "--special-tokens: got 7, the world vocabulary has room for 6 in a model of "),
        (WORLD, ["<0>"], 65530, "--special-tokens: got 1, the world vocabulary has room for 0 in a model of 65530 "),
        (BYTE, SIX, 260, "--special-tokens: got 6, the byte vocabulary has room for 3 in a model of 260 ids; "),
        (WORLD, [" the"], 65536, "--special-tokens  the: is one token already; leave it out"),
        (BYTE, ["a"], 512, "--special-tokens a: is one token already; leave it out"),
        (WORLD, ["<0>", "<0>"], 65536, "--special-tokens <0>: is one token already; leave it out"),
        (WORLD, [""], 65536, "--special-tokens '': is empty; leave it out"),
        (WORLD, ["<\ud800>"], 65536, "--special-tokens: lone surrogate U+D800"),
    ],
)  # fmt: skip
def test_special_tokens_that_cannot_be(
    tokenizer: Tokenizer, specials: list[str], vocab_size: int, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        tokenizer.with_special(specials, vocab_size)
    assert str(error.value).startswith(message)
    assert str(error.value).isprintable()


def test_all_the_room_can_be_used() -> None:
    assert WORLD.with_special(SIX, 65536).encode("<5><0>") == [65535, 65530]


# --- the stop token


@pytest.mark.parametrize(
    ("value", "stop_id"),
    [
        ("0", 0), ("5", 5), ("65529", 65529), ("+23", 23),
        ("\x17", 24), (r"\x17", 24), ("\n", 11), (r"\n", 11), (r"\t", 10), (r"\r", 14), (r"\0", 1), (r"\\", 93),
        (r"\x35", 54), (r"\u0041", 66), (r"\U00000041", 66), ("\n\n", 261), (r"\n\n", 261), (r"\n\x0a", 261),
        (" the", WORLD.encode(" the")[0]), (" 5", WORLD.encode(" 5")[0]), ("我", WORLD.encode("我")[0]),
        (r"\u6211", WORLD.encode("我")[0]),
    ],
)  # fmt: skip
def test_stop_token(value: str, stop_id: int) -> None:
    assert WORLD.stop_id(value) == stop_id


def test_stop_token_may_be_a_special_one() -> None:
    more = BYTE.with_special(["<|stop|>"], 258)
    assert more.stop_id("<|stop|>") == more.stop_id("257") == 257


@pytest.mark.parametrize(
    ("tokenizer", "value", "message"),
    [
        (WORLD, "65530", "--stop-token 65530: not in the world vocabulary, which has the ids 0 to 65529; give"),
        (WORLD, "-1", "--stop-token -1: not in the world vocabulary"),
        (BYTE, "257", "--stop-token 257: not in the byte vocabulary, which has the ids 0 to 256"),
        (WORLD, "9" * 5000, f"--stop-token {'9' * 60}…: not in the world vocabulary"),
        (WORLD, "", "--stop-token '': is 0 tokens of the world vocabulary, must be one; "),
        (WORLD, "<|endoftext|>", "--stop-token <|endoftext|>: is 7 tokens of the world vocabulary, must be one; give"),
        (BYTE, "ab", "--stop-token ab: is 2 tokens of the byte vocabulary, must be one; "),
        (BYTE, r"\n\n", r"--stop-token \n\n: is 2 tokens"),
        (BYTE, "\n\n", r"--stop-token '\n\n': is 2 tokens"),
        (BYTE, r"\x", r"--stop-token \x: is 2 tokens"),
        (BYTE, "1.5", "--stop-token 1.5: is 3 tokens"),
        (WORLD, r"\ud800", r"--stop-token \ud800: lone surrogate U+D800"),
        (WORLD, r"\UFFFFFFFF", r"--stop-token \UFFFFFFFF: is "),
    ],
)  # fmt: skip
def test_stop_tokens_that_cannot_be(tokenizer: Tokenizer, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        tokenizer.stop_id(value)
    assert str(error.value).startswith(message)
    assert str(error.value).isprintable()


# --- ids one by one


@given(ids=st.lists(st.integers(0, 256)))
def test_streaming_gives_the_same_text_even_for_broken_utf8(ids: list[int]) -> None:
    decoder = BYTE.decoder()
    assert "".join(map(decoder.feed, ids)) + decoder.flush() == BYTE.decode(ids)


def test_streaming_keeps_half_characters_back() -> None:
    decoder = BYTE.decoder()
    assert [decoder.feed(index) for index in BYTE.encode("é👍.")] == ["", "é", "", "", "", "👍", "."]
    assert decoder.feed(BYTE.encode("é")[0]) == ""
    assert (decoder.flush(), decoder.flush(), decoder.feed(66)) == ("\ufffd", "", "A")


@pytest.mark.parametrize(("tokenizer", "unused"), [(WORLD, 65530), (BYTE, 300)])
def test_streaming_survives_an_unused_id(tokenizer: Tokenizer, unused: int) -> None:
    assert tokenizer.decoder().feed(unused) == "\ufffd"


# --- which one a model has


@pytest.mark.parametrize(
    ("name", "vocab_size", "expected"),
    [
        ("auto", 65536, WORLD), ("auto", 257, BYTE), ("auto", 512, BYTE),
        ("world", 65536, WORLD), ("world", 65530, WORLD), ("byte", 65536, BYTE), ("byte", 257, BYTE),
    ],
)  # fmt: skip
def test_tokenizer_for(name: Any, vocab_size: int, expected: Tokenizer) -> None:
    assert tokenizer_for(name, vocab_size) is expected


@pytest.mark.parametrize(
    ("name", "vocab_size"), [("auto", 256), ("auto", 513), ("auto", 50277), ("world", 65529), ("byte", 256)]
)
def test_tokenizer_that_does_not_fit(name: Any, vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"^--tokenizer {name}: .*; .*$"):
        tokenizer_for(name, vocab_size)
