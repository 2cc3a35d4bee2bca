"""Binidx pairs: read whole or refused in one line, however they are damaged; and written to the letter."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.data import binidx
from rwkv_peft.data.binidx import BinidxWriter, is_binidx, magic_prime, open_binidx, put_in_place
from rwkv_peft.errors import DataError

CODES = {"uint8": (1, "B"), "int32": (4, "i"), "int64": (5, "q"), "uint16": (8, "H")}
DOCUMENTS = [[1, 2, 3, 0], [0], [], [65529, 7, 0]]


def pack(documents: list[list[int]], dtype: str = "uint16") -> tuple[bytes, bytes]:
    """The bytes of .bin and .idx, written number by number as the format is described."""
    code, letter = CODES[dtype]
    tokens, sizes, pointers = b"", b"", b""
    for document in documents:
        pointers += struct.pack("<q", len(tokens))
        sizes += struct.pack("<i", len(document))
        for index in document:
            tokens += struct.pack("<" + letter, index)
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(documents)) + struct.pack("<Q", len(documents) + 1)
    index += sizes + pointers
    for number in range(len(documents) + 1):
        index += struct.pack("<q", number)
    return tokens, index


def write_pair(folder: Path, tokens: bytes, index: bytes) -> str:
    """The prefix of a pair."""
    (folder / "d.bin").write_bytes(tokens)
    (folder / "d.idx").write_bytes(index)
    return str(folder / "d")


def documents_of(prefix: str) -> list[list[int]]:
    pair = open_binidx(prefix)
    return [pair.ids[s : s + n].tolist() for s, n in zip(pair.starts, pair.lengths, strict=True)]


# --- reading


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("end", ["", ".bin", ".idx"])
def test_reading(tmp_path: Path, dtype: str, end: str) -> None:
    documents = [[1, 2, 3, 0], [0], [], [200, 7, 0]]
    prefix = write_pair(tmp_path, *pack(documents, dtype))
    pair = open_binidx(prefix + end, vocab_size=201)
    assert (pair.title, pair.ids.dtype.name, pair.starts.dtype, pair.lengths.dtype) == (
        prefix,
        dtype,
        np.int64,
        np.int64,
    )
    assert isinstance(pair.ids, np.memmap)
    assert pair.ids.tolist() == [1, 2, 3, 0, 0, 200, 7, 0]
    assert (pair.starts.tolist(), pair.lengths.tolist()) == ([0, 4, 5, 5], [4, 1, 0, 3])
    assert documents_of(prefix) == documents


def test_documents_may_stand_in_another_order(tmp_path: Path) -> None:
    tokens, _ = pack([[1, 2], [3, 4, 5]])
    index = binidx.HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, 3, 1)
    index += struct.pack("<3i", 3, 2, 1) + struct.pack("<3q", 4, 0, 0) + struct.pack("<q", 0)
    assert documents_of(write_pair(tmp_path, tokens, index)) == [[3, 4, 5], [1, 2], [1]]


def test_what_names_a_pair(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path, *pack(DOCUMENTS))
    (tmp_path / "text.jsonl").write_text("{}")
    (tmp_path / "half.bin").write_bytes(b"")
    (tmp_path / "whole").write_text("no pair")
    (tmp_path / "whole.bin").write_bytes(b"")
    assert all(
        map(is_binidx, [prefix, f"{prefix}.bin", f"{prefix}.idx", str(tmp_path / "half"), str(tmp_path / "half.bin")])
    )
    others = [str(tmp_path), str(tmp_path / "text.jsonl"), str(tmp_path / "whole"), "", "org/name", "\0", "x" * 5000]
    assert not any(map(is_binidx, others))


# --- damage

BIN, IDX = pack(DOCUMENTS)
HEAD = 34  # bytes of an index before its sizes
SIZES, POINTERS = HEAD, HEAD + 4 * len(DOCUMENTS)


def put(index: bytes, place: int, form: str, value: int) -> bytes:
    new = struct.pack(form, value)
    return index[:place] + new + index[place + len(new) :]


DAMAGE: dict[str, tuple[Any, Any, str]] = {
    "no .bin": (None, IDX, r"d\.bin: no such file; a binidx pair is PREFIX\.bin and PREFIX\.idx, "),
    "no .idx": (BIN, None, r"d\.idx: no such file; a binidx pair is "),
    "empty .idx": (BIN, b"", r"d\.idx: is no binidx index, which begins with MMIDIDX; "),
    "other magic": (BIN, b"MMIDIDY" + IDX[7:], r"d\.idx: is no binidx index"),
    "half a header": (BIN, IDX[:20], r"d\.idx: ends within its first 34 bytes; "),
    "version": (BIN, put(IDX, 9, "<Q", 2), r"d\.idx: is of version 2, must be 1; "),
    "dtype float32": (BIN, put(IDX, 17, "<B", 6), r"d\.idx: its dtype is float32, must be uint8, uint16, "),
    "dtype int16": (BIN, put(IDX, 17, "<B", 3), r"d\.idx: its dtype is int16, must be "),
    "dtype 77": (BIN, put(IDX, 17, "<B", 77), r"d\.idx: its dtype is of unknown code 77, must be "),
    "too many items": (BIN, put(IDX, 18, "<Q", 2**64 - 1), r"d\.idx: has 122 bytes, .*: it is cut off"),
    "too few items": (BIN, put(IDX, 18, "<Q", 1), r"d\.idx: has 122 bytes, its header says 86: something is behind it"),
    "too many documents": (BIN, put(IDX, 26, "<Q", 2**60), r"d\.idx: .*: it is cut off; "),
    "truncated sizes": (BIN, IDX[: SIZES + 3], r"d\.idx: has 37 bytes, its header says 122: it is cut off; "),
    "truncated": (BIN, IDX[:-1], r"d\.idx: has 121 bytes, its header says 122: it is cut off; "),
    "longer": (BIN, IDX + b"\0", r"d\.idx: has 123 bytes, its header says 122: something is behind it; "),
    "negative size": (BIN, put(IDX, SIZES + 4, "<i", -1), r"d\.bin: by its index, document 2 has a negative "),
    "odd pointer": (BIN, put(IDX, POINTERS + 8, "<q", 7), r"d\.bin: .* document 2 begins within a token of 2 bytes"),
    "negative pointer": (BIN, put(IDX, POINTERS, "<q", -2), r"d\.bin: .* document 1 begins before the file"),
    "far pointer": (BIN, put(IDX, POINTERS, "<q", 2**63 - 2), r"d\.bin: .* document 1 ends behind the 8 tokens"),
    "large size": (BIN, put(IDX, SIZES, "<i", 2**31 - 1), r"d\.bin: .* document 1 ends behind the 8 tokens"),
    "shorter .bin": (BIN[:-2], IDX, r"d\.bin: .* document 4 ends behind the 7 tokens of the file; "),
    "odd .bin": (BIN[:-1], IDX, r"d\.bin: has 15 bytes, must be a multiple of 2 \(uint16\); "),
    "longer .bin": (BIN + b"\1\0", IDX, r"d\.bin: has 9 tokens, its index knows of 8; "),
    "empty .bin": (b"", IDX, r"d\.bin: .* document 1 ends behind the 0 tokens of the file; "),
    "no documents": (b"", pack([])[1], r"d\.idx: has no documents; "),
    "no tokens": (b"", pack([[], []])[1], r"d\.bin: has no tokens; "),
}  # fmt: skip


@pytest.mark.parametrize(("tokens", "index", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_pair_is_one_clear_line(tmp_path: Path, tokens: Any, index: Any, message: str) -> None:
    for end, data in (("bin", tokens), ("idx", index)):
        if data is not None:
            (tmp_path / f"d.{end}").write_bytes(data)
    with pytest.raises(DataError, match=f"^{tmp_path}/{message}") as error:
        open_binidx(str(tmp_path / "d"))
    assert str(error.value).isprintable()
    assert "; " in str(error.value)


def test_a_folder_is_no_half_of_a_pair(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path, BIN, IDX)
    Path(f"{prefix}.bin").unlink()
    Path(f"{prefix}.bin").mkdir()
    with pytest.raises(DataError, match=r"d\.bin: is not a regular file; "):
        open_binidx(prefix)


def test_an_index_that_promises_much_takes_no_memory(tmp_path: Path) -> None:
    index = put(IDX, 18, "<Q", 2**40)
    prefix = write_pair(tmp_path, BIN, index)
    with pytest.raises(DataError, match=r"its header says 13,194,139,533,386: it is cut off"):
        open_binidx(prefix)


@settings(max_examples=300)
@given(
    places=st.lists(st.tuples(st.integers(0, len(IDX) - 1), st.integers(0, 255)), max_size=4),
    cut=st.one_of(st.none(), st.integers(0, len(IDX))),
    bin_cut=st.one_of(st.none(), st.integers(0, len(BIN))),
)
def test_random_damage_is_told_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]], cut: int | None, bin_cut: int | None
) -> None:
    index = bytearray(IDX)
    for place, value in places:
        index[place] = value
    prefix = write_pair(tmp_path_factory.getbasetemp(), BIN[:bin_cut], bytes(index[:cut]))
    try:
        pair = open_binidx(prefix, 65536)
    except DataError as error:
        assert str(error).startswith(prefix)
        assert str(error).isprintable()
    else:
        assert (pair.starts >= 0).all()
        assert (pair.lengths >= 0).all()
        assert int((pair.starts + pair.lengths).max()) == len(pair.ids)


# --- ids beyond the vocabulary


@pytest.mark.parametrize(
    ("dtype", "documents", "vocab_size", "message"),
    [
        ("uint16", [[1, 0], [5, 300, 301]], 257, "d.bin: document 2: token id 300 is not in the vocabulary"),
        ("int32", [[70000]], 65536, "d.bin: document 1: token id 70000 is not in the vocabulary, which has 0 to 65535"),
        ("int32", [[1], [], [2, -1]], 65536, "d.bin: document 3: token id -1 is not in the vocabulary"),
        ("int64", [[2**62]], 65536, f"d.bin: document 1: token id {2**62} is not in"),
        ("uint8", [[200]], 200, "d.bin: document 1: token id 200 is not in the vocabulary, which has 0 to 199; "),
    ],
)  # fmt: skip
def test_ids_beyond_the_vocabulary(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    documents: list[list[int]],
    vocab_size: int,
    message: str,
) -> None:
    prefix = write_pair(tmp_path, *pack(documents, dtype))
    for chunk in (1, 2, 2**20):
        monkeypatch.setattr(binidx, "CHUNK", chunk)
        with pytest.raises(DataError) as error:
            open_binidx(prefix, vocab_size)
        assert str(error.value).startswith(f"{tmp_path}/{message}")
    assert documents_of(prefix) == documents


def test_only_the_first_part_of_a_large_file_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binidx, "CHUNK", 4)
    monkeypatch.setattr(binidx, "MOST_CHECKED", 16)
    prefix = write_pair(tmp_path, *pack([[1] * 8 + [300]]))
    open_binidx(prefix, 257)
    prefix = write_pair(tmp_path, *pack([[1] * 7 + [300]]))
    with pytest.raises(DataError, match="token id 300"):
        open_binidx(prefix, 257)


# --- writing


def written(folder: Path, documents: list[list[int]], dtype: str = "uint16") -> str:
    prefix = str(folder / "w")
    writer = BinidxWriter(prefix, dtype)
    for document in documents:
        writer.add(np.array(document, dtype), np.array([len(document)], np.int32))
    writer.flush()
    writer.close()
    assert (writer.documents, writer.tokens) == (len(documents), sum(map(len, documents)))
    return prefix


@pytest.mark.parametrize("dtype", CODES)
def test_writing_is_the_format_to_the_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    documents = [[1, 2, 3, 0], [0], [], [200, 7, 0]] * 5
    for chunk in (1, 3, 2**20):
        monkeypatch.setattr(binidx, "CHUNK", chunk)
        prefix = written(tmp_path, documents, dtype)
        assert put_in_place(prefix, dtype=dtype) == 40
        tokens, index = pack(documents, dtype)
        assert Path(f"{prefix}.bin").read_bytes() == tokens
        assert Path(f"{prefix}.idx").read_bytes() == index


@pytest.mark.parametrize(("first", "last"), [(0, 4), (0, 2), (1, 3), (2, 4), (3, 4), (2, 3)])
@pytest.mark.parametrize("chunk", [1, 3, 2**20])
def test_a_part_of_the_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, last: int, chunk: int
) -> None:
    monkeypatch.setattr(binidx, "CHUNK", chunk)
    prefix = written(tmp_path, DOCUMENTS)
    for _ in range(2):  # as another run does where one was broken off
        assert put_in_place(prefix, first, last) == sum(map(len, DOCUMENTS[first:last]))
        tokens, index = pack(DOCUMENTS[first:last])
        assert (Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()) == (tokens, index)


def test_going_on_cuts_off_what_does_not_count(tmp_path: Path) -> None:
    prefix = written(tmp_path, [*DOCUMENTS[:2], [9, 9, 9, 9], [8]])
    writer = BinidxWriter(prefix, documents=2, tokens=5)
    for document in DOCUMENTS[2:]:
        writer.add(np.array(document, np.uint16), np.array([len(document)], np.int32))
    writer.flush()
    put_in_place(prefix)
    assert Path(f"{prefix}.bin").read_bytes() == BIN
    assert Path(f"{prefix}.idx").read_bytes() == IDX


def test_going_on_where_less_is_there_is_refused(tmp_path: Path) -> None:
    prefix = written(tmp_path, DOCUMENTS)
    for documents, tokens in ((4, 9), (5, 8)):
        with pytest.raises(
            DataError, match=r"w\.partial/(ids|sizes): is shorter than it was; remove .*w\.partial, or use"
        ):
            BinidxWriter(prefix, documents=documents, tokens=tokens)


def test_an_old_index_never_stands_beside_new_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = written(tmp_path, DOCUMENTS)
    put_in_place(prefix)
    written(tmp_path, [[5, 0]])

    def broken(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(binidx, "_write_index", broken)
        put_in_place(prefix)
    assert Path(f"{prefix}.bin").exists()
    assert not Path(f"{prefix}.idx").exists()
    put_in_place(prefix)
    assert documents_of(prefix) == [[5, 0]]


# --- RWKV-LM's prime


def rwkv_lm_prime(tokens: int, ctx_len: int) -> int | None:
    """As RWKV-LM's make_data.py finds it: downwards, if there are three windows."""
    if tokens >= ctx_len * 3:
        for n in range(int(tokens // ctx_len) - 1, 0, -1):
            if n % 3 == 2 and n > 1 and not any(n % d == 0 for d in range(2, n)):
                return n
    return None


def test_magic_prime_is_that_of_rwkv_lm() -> None:
    for tokens in range(1, 800):
        for ctx_len in (1, 2, 7, 10, 64):
            assert magic_prime(tokens, ctx_len) == rwkv_lm_prime(tokens, ctx_len)


@pytest.mark.parametrize(
    ("tokens", "ctx_len", "prime"), [(1498226207, 512, 2926181), (200499, 4096, 47), (0, 512, None)]
)
def test_magic_primes_that_others_tell(tokens: int, ctx_len: int, prime: int | None) -> None:
    assert magic_prime(tokens, ctx_len) == prime
