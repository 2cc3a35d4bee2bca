"""Examples to rows, rows to batches: which a step sees, and that none is lost, doubled or mixed with another."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rwkv_peft.config import InspectConfig, Overlong, PrepareConfig, TrainConfig
from rwkv_peft.data.batches import Batch, beside, padded
from rwkv_peft.data.corpus import Corpus, Spool
from rwkv_peft.data.dataset import Dataset, Windows, count_between, fit, hold_out, load_dataset, load_for_training
from rwkv_peft.data.epochs import prime_order, take
from rwkv_peft.data.masking import Encoded
from rwkv_peft.data.packing import best_fit
from rwkv_peft.data.sampling import Sampler
from rwkv_peft.data.sources import read_items, texts
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError, DataError, OutputError
from rwkv_peft.preparation import prepare

BYTE = Tokenizer.byte()
masks = st.lists(st.booleans(), min_size=2, max_size=60).filter(lambda mask: any(mask[1:]))


def dataset_of(
    documents: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]] | None = None,
    ctx_len: int = 16,
    overlong: Overlong = "split",
    shares: tuple[float, ...] = (),
    sources: Sequence[int] | None = None,
) -> Dataset:
    """A dataset of these ids, of one corpus a source."""
    sources = [0] * len(documents) if sources is None else sources
    corpora, parts = [], []
    for number in sorted(set(sources)):
        mine = [i for i, source in enumerate(sources) if source == number]
        lengths = np.array([len(documents[i]) for i in mine])
        starts = np.cumsum(lengths) - lengths
        ids = np.concatenate([np.array(documents[i], np.int32) for i in mine])
        target = None if masks is None else np.concatenate([np.array(masks[i]) for i in mine])
        corpora.append(Corpus(f"s{number}", ids, target, starts, lengths, 2**31 - 1))
        parts.append((np.full(len(mine), number), starts, lengths - 1))
    whole = Windows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    data = Dataset(
        corpora, whole, whole.corpus, whole, np.arange(len(whole) + 1), list(shares), ctx_len, overlong, "train",
        tokens=0, target_tokens=0, long=0, empty=0, lost=0, skipped=0, left_out=0, held_out=0, notes=[],
    )  # fmt: skip
    return fit(data, np.arange(len(whole)))


def numbered(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of so many inputs; every id tells its document."""
    return [[i + 1] * (length + 1) for i, length in enumerate(lengths)]


def documents_of(batches: Sequence[Batch]) -> list[int]:
    """The document of each stretch of equal ids in the batches' rows, padding left out."""
    found = []
    for batch in batches:
        bounds = [0, batch.tokens.numel()] if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
        if batch.cu_seqlens is None:
            bounds = list(range(0, batch.tokens.numel() + 1, batch.tokens.shape[1]))
        flat = batch.tokens.flatten()
        for begin, end in pairwise(bounds):
            ids = set(flat[begin:end].tolist()) - {0}
            assert len(ids) <= 1, ids
            found += [i - 1 for i in ids]
    return found


# --- packing


def slowly_best_fit(lengths: list[int], capacity: int) -> int:
    """Rows by the definition: the longest first, each into the fullest row that has room."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(free) if room >= length]
        if fitting:
            free[min(fitting, key=lambda i: free[i])] -= length
        else:
            free.append(capacity - length)
    return len(free)


@given(capacity=st.integers(1, 60), data=st.data())
def test_best_fit_is_best_fit(capacity: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=100))
    row_of, count = best_fit(np.array(lengths), capacity)
    filled = np.bincount(row_of, lengths, count)
    assert filled.max() <= capacity
    assert filled.min() > 0
    assert count == slowly_best_fit(lengths, capacity)


@pytest.mark.parametrize(
    ("mean", "sigma", "ctx_len"), [(5.5, 1.0, 1024), (6.2, 1.0, 1024), (6.5, 0.6, 4096), (4, 1.5, 512)]
)
def test_packing_wastes_less_than_3_percent(mean: float, sigma: float, ctx_len: int) -> None:
    lengths = np.random.default_rng(0).lognormal(mean, sigma, 10_000).astype(np.int64).clip(1, ctx_len)
    _, count = best_fit(lengths, ctx_len)
    assert 1 - lengths.sum() / (count * ctx_len) < 0.03


# --- pieces of long examples


def encoded_from(mask: list[bool]) -> Encoded:
    """Ids 1, 2, 3, …, so that an id tells its place."""
    return Encoded(np.arange(1, len(mask) + 1, dtype=np.int32), np.array([False, *mask[1:]]))


def fitted(mask: list[bool], ctx_len: int, overlong: Overlong) -> list[Encoded]:
    whole = encoded_from(mask)
    try:
        data = dataset_of([whole.ids.tolist()], [whole.target.tolist()], ctx_len, overlong)
    except DataError:
        return []
    pieces = [data.piece(i) for i in range(len(data.pieces))]
    assert data.target_tokens == sum(piece.targets for piece in pieces)
    assert data.lost == (data.target_tokens < whole.targets)
    assert data.long == (whole.inputs > ctx_len)
    return pieces


def predicted(rows: Sequence[Encoded]) -> list[int]:
    """Ids that are targets, in order, as training counts them."""
    return [int(index) for row in rows for index in row.ids[1:][row.target[1:]]]


@given(mask=masks, ctx_len=st.integers(1, 20))
def test_split_predicts_every_target_once(mask: list[bool], ctx_len: int) -> None:
    pieces = fitted(mask, ctx_len, "split")
    assert predicted(pieces) == predicted([encoded_from(mask)])
    assert all(1 <= piece.inputs <= ctx_len and piece.targets and not piece.target[0] for piece in pieces)
    assert all((piece.ids[0] - 1) % ctx_len == 0 for piece in pieces)


@given(mask=masks, ctx_len=st.integers(1, 20), overlong=st.sampled_from(["truncate", "drop"]))
def test_truncate_and_drop(mask: list[bool], ctx_len: int, overlong: Overlong) -> None:
    pieces = fitted(mask, ctx_len, overlong)
    kept = len(mask) <= ctx_len + 1 or overlong == "truncate"
    wanted = [index for index in predicted([encoded_from(mask)]) if index <= ctx_len + 1] if kept else []
    assert predicted(pieces) == wanted
    assert all(piece.inputs <= ctx_len and piece.targets for piece in pieces)


def test_pieces_overlap_by_one_id() -> None:
    pieces = fitted([True] * 10, 4, "split")
    assert [piece.ids.tolist() for piece in pieces] == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [9, 10]]


@given(data=st.data(), ctx_len=st.integers(1, 30))
def test_targets_are_counted_as_they_are_drawn(data: st.DataObject, ctx_len: int) -> None:
    drawn = data.draw(st.lists(masks, min_size=1, max_size=8))
    data_ = dataset_of([[i + 1] * len(mask) for i, mask in enumerate(drawn)], [[False, *m[1:]] for m in drawn], ctx_len)
    assert data_.target_tokens == sum(sum(mask[1:]) for mask in drawn)
    assert data_.target_tokens == sum(data_.piece(i).targets for i in range(len(data_.pieces)))


@given(data=st.data(), at_once=st.sampled_from([1, 5, 20, 10**6]))
def test_counting_between(data: st.DataObject, at_once: int) -> None:
    flags = np.array(data.draw(st.lists(st.booleans(), min_size=1, max_size=60)))
    edges = sorted(
        data.draw(st.sets(st.integers(0, len(flags)), min_size=2, max_size=20)) if len(flags) > 1 else [0, 1]
    )
    begin, end = np.array(edges[:-1]), np.array(edges[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rwkv_peft.data.dataset.COUNTED_AT_ONCE", at_once)
        got = count_between(flags, begin, end)
    assert got.tolist() == [int(flags[a:b].sum()) for a, b in zip(begin, end, strict=True)]


# --- epochs and steps

SAMPLINGS = ["pack", "pad", "only"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_two_epochs_see_every_example_twice_on_any_number_of_processes(sampling: Any, world_size: int) -> None:
    data = dataset_of(numbered(np.random.default_rng(1).integers(1, 40, 10_007).tolist()), ctx_len=64)
    sampler = Sampler(data, sampling, micro_batch=1 if sampling == "only" else 8, grad_accum=2, seed=5)
    total = sampler.total_steps(2, world_size)
    seen = [
        documents_of([batch for rank in range(world_size) for batch in sampler.step(step, rank, world_size)])
        for step in range(total)
    ]
    first = sampler.steps(0, world_size)
    for epoch in (seen[:first], seen[first:]):
        assert sorted(document for step in epoch for document in step) == list(range(10_007))
    assert seen[0] != seen[first]
    at = total // 3  # a new process that goes on there sees exactly what is left
    again = Sampler(data, sampling, micro_batch=1 if sampling == "only" else 8, grad_accum=2, seed=5)
    for step in (at, total - 1, first - 1, first):
        ranks = [batch for rank in range(world_size) for batch in again.step(step, rank, world_size)]
        assert documents_of(ranks) == seen[step]


@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=50), seed=st.integers(0, 2**40),
    sampling=st.sampled_from(SAMPLINGS), micro_batch=st.integers(1, 5), grad_accum=st.integers(1, 3),
)  # fmt: skip
def test_an_epoch_is_one_pass(lengths: list[int], seed: int, sampling: Any, micro_batch: int, grad_accum: int) -> None:
    sampler = Sampler(dataset_of(numbered(lengths)), sampling, micro_batch, grad_accum, seed)
    steps = [sampler.step(step) for step in range(sampler.steps(0))]
    assert sorted(document for step in steps for document in documents_of(step)) == list(range(len(lengths)))
    assert all(1 <= len(step) <= grad_accum for step in steps)
    assert sum(batch.inputs for step in steps for batch in step) == sum(lengths)
    if sampling != "pack":
        assert all(len(documents_of([batch])) <= micro_batch for step in steps for batch in step)
    assert all(batch.inputs <= micro_batch * 16 for step in steps for batch in step)


@pytest.mark.parametrize("sampling", ["pack", "pad"])
def test_a_step_sees_the_same_rows_however_it_is_cut(sampling: Any) -> None:
    data = dataset_of(numbered([1 + i * 7 % 13 for i in range(60)]))
    for step in range(4):
        [whole] = Sampler(data, sampling, 8, 1, seed=1).step(step)
        for micro_batch, grad_accum, world_size in ((4, 2, 1), (2, 4, 1), (4, 1, 2), (1, 4, 2)):
            sampler = Sampler(data, sampling, micro_batch, grad_accum, seed=1)
            parts = [batch for rank in range(world_size) for batch in sampler.step(step, rank, world_size)]
            assert sorted(documents_of(parts)) == sorted(documents_of([whole]))
            assert sorted(torch.cat([p.labels for p in parts]).tolist()) == sorted(whole.labels.tolist())
    if sampling == "pad":
        lengths = [int(b.positions.numel() / len(b.tokens)) for b in Sampler(data, "pad", 1, 8, seed=1).step(0)]
        assert lengths == sorted(lengths, reverse=True)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    data = dataset_of(numbered([5] * 100))
    orders = {}
    for seed in range(3):
        sampler = Sampler(data, "pad", 100, seed=seed)
        for epoch in range(3):
            orders[seed, epoch] = tuple(sampler.rows(epoch).members.tolist())
    assert len(set(orders.values())) == 9
    assert tuple(range(100)) not in orders.values()
    again = Sampler(data, "pad", 7, seed=2)
    assert tuple(again.rows(1).members.tolist()) == orders[2, 1]


def test_packed_rows_mix_other_examples_in_each_epoch() -> None:
    data = dataset_of(numbered([3, 4, 5] * 30), ctx_len=16)
    sampler = Sampler(data, "pack", 4, seed=0)
    epochs = [sampler.rows(epoch) for epoch in (0, 1)]
    together = [{frozenset(rows[row].tolist()) for row in range(len(rows))} for rows in epochs]
    assert len(together[0] & together[1]) < len(together[0]) / 4


def test_epochs_need_not_be_whole() -> None:
    sampler = Sampler(dataset_of(numbered([5] * 40)), "pad", 4)
    assert [sampler.total_steps(epochs) for epochs in (0.01, 0.5, 1, 2, 2.25)] == [1, 5, 10, 20, 22]


# --- shares of sources


def test_shares_decide_how_often_a_source_is_seen() -> None:
    """Of 40 + 160 examples with 0.7 and 0.3: 140 and 60 an epoch, each gone through in order of passes."""
    data = dataset_of(numbered([4] * 200), shares=(0.7, 0.3), sources=[0] * 40 + [1] * 160)
    sampler = Sampler(data, "pack", 4)
    seen: Counter[int] = Counter()
    for epoch in range(8):
        drawn = Counter(sampler.rows(epoch).members.tolist())
        assert sum(count for piece, count in drawn.items() if piece < 40) == 140
        assert sum(count for piece, count in drawn.items() if piece >= 40) == 60
        seen += drawn
    assert {count for piece, count in seen.items() if piece < 40} == {28}  # 8 · 140 / 40
    assert {count for piece, count in seen.items() if piece >= 40} == {3}  # 8 · 60 / 160
    assert Counter(sampler.rows(3).members.tolist()) == Counter(Sampler(data, "pack", 9).rows(3).members.tolist())


def test_the_pieces_of_a_drawn_example_come_together() -> None:
    data = dataset_of(numbered([40, 3, 20, 5]), ctx_len=8, shares=(0.5, 0.5), sources=[0, 0, 1, 1])
    for epoch in range(4):  # two examples of each source: both, or one twice
        drawn = Counter(Sampler(data, "pad", 1, seed=epoch).rows(0).members.tolist())
        for example in range(4):
            pieces = range(int(data.first[example]), int(data.first[example + 1]))
            assert len({drawn[piece] for piece in pieces}) == 1
        assert sum(drawn[int(data.first[example])] for example in range(4)) == 4


@given(count=st.integers(1, 30), quota=st.integers(1, 50))
def test_taking_goes_on_where_it_ended(count: int, quota: int) -> None:
    drawn = np.concatenate([take(count, quota, 0, 1, epoch) for epoch in range(5)])
    for begin in range(0, len(drawn) - count + 1, count):
        assert sorted(drawn[begin : begin + count].tolist()) == list(range(count))


# --- windows of the stream


def stream_of(lengths: list[int]) -> tuple[list[list[int]], list[int]]:
    """Documents whose ids count on, and all of them one behind the other."""
    ids = iter(range(1, sum(lengths) + 1))
    documents = [[next(ids) for _ in range(length)] for length in lengths]
    return documents, [i for document in documents for i in document]


@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=12), ctx_len=st.integers(1, 20))
def test_tiles_predict_every_token_of_the_stream_once(lengths: list[int], ctx_len: int) -> None:
    documents, stream = stream_of(lengths)
    sampler = Sampler(dataset_of(documents, ctx_len=ctx_len), "get", 2)
    labels: list[int] = []
    for step in range(sampler.steps(0)):
        for batch in sampler.step(step):
            labels += batch.labels.tolist()
            flat = batch.tokens.flatten()
            assert (flat[batch.positions] + 1).tolist() == batch.labels.tolist()
    assert sorted(labels) == stream[1:]


@pytest.mark.parametrize("windows", ["tiles", "random", "prime"])
def test_windows_without_a_target_are_no_rows(windows: Any) -> None:
    """Or a step of them would have nothing to learn, and no loss."""
    masks = [[False] * 90 + [True] * 10] * 6
    sampler = Sampler(dataset_of([[i + 1] * 100 for i in range(6)], masks, ctx_len=16), "get", 1, windows=windows)
    assert 0 < len(sampler.rows(0)) < 20
    assert all(len(batch.labels) for step in range(sampler.steps(0)) for batch in sampler.step(step))
    nothing = dataset_of([[1] * 100] * 6, [[False] * 100] * 5 + [[False] * 99 + [True]], ctx_len=8)
    if windows == "prime":  # whose tiles do not reach the end
        with pytest.raises(DataError, match="--sampling get: no window of --ctx-len 8 holds anything to be learnt"):
            Sampler(nothing, "get", 1, windows=windows).rows(0)


def test_text_and_the_binidx_made_of_it_learn_the_same(tmp_path: Path) -> None:
    """In a stream, what begins a document is learnt as well: something comes before it."""
    path = write(tmp_path, *({"text": f"document {i} of some length"} for i in range(30)))
    prepare(PrepareConfig([str(path)], tmp_path / "pair", tokenizer="byte"))
    for sampling in ("get", "pack"):
        one, two = (
            load_dataset(TrainConfig(Path("m"), [str(source)], Path("o"), sampling=sampling, ctx_len=32), BYTE)  # type: ignore[arg-type]
            for source in (path, tmp_path / "pair")
        )
        assert one.target_tokens == two.target_tokens
        for sampler in (Sampler(one, sampling, 4), Sampler(two, sampling, 4)):  # type: ignore[arg-type]
            learnt = sum(len(batch.labels) for step in range(sampler.steps(0)) for batch in sampler.step(step))
            assert learnt == one.target_tokens


def test_random_windows_are_whole_and_anywhere() -> None:
    documents, stream = stream_of([50] * 20)
    sampler = Sampler(dataset_of(documents, ctx_len=16), "get", 4, windows="random")
    rows = [sampler.stream.read(start) for epoch in range(9) for start in sampler.rows(epoch).members.tolist()]  # type: ignore[union-attr]
    assert all(row.inputs == 16 and row.targets == 16 for row in rows)
    begins = {int(row.ids[0]) for row in rows}
    assert len(begins) > 250
    assert min(begins) >= 1
    assert max(begins) <= len(stream) - 16


def test_prime_windows_are_rwkv_lms() -> None:
    """By its formula, for the largest prime p = 2 (mod 3) that fits."""
    documents, _ = stream_of([1000])
    sampler = Sampler(dataset_of(documents, ctx_len=16), "get", 4, windows="prime")
    prime = sampler.stream.prime  # type: ignore[union-attr]
    assert prime == 59
    factor = int(prime * (5**0.5 - 1) / 2)
    wanted = [(factor * i**3) % prime * 16 for i in range(1, 1 + prime)]
    assert sampler.rows(0).members.tolist() == wanted
    assert sorted(wanted) == [i * 16 for i in range(prime)]
    assert sorted(prime_order(prime, 7, 3).tolist()) == list(range(prime))


def test_large_primes_do_not_overflow() -> None:
    prime = 2_999_999
    order, factor = prime_order(prime, 0, 0), int(prime * (5**0.5 - 1) / 2)
    for i in (0, 1, 1_234_567, prime - 1):
        assert order[i] == factor * (i + 1) ** 3 % prime


@pytest.mark.parametrize(
    ("windows", "shares", "message"),
    [
        ("prime", (), "--windows prime: 8 tokens are too few for --ctx-len 16"),
        ("prime", (1.0,), "--windows prime: not where sources have shares"),
    ],
)
def test_windows_that_cannot_be(windows: Any, shares: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampler(dataset_of([[1] * 8], shares=shares), "get", windows=windows)


def test_windows_stay_inside_their_source() -> None:
    documents, _ = stream_of([30] * 4)
    data = dataset_of(documents, ctx_len=16, shares=(0.5, 0.5), sources=[0, 0, 1, 1])
    sampler = Sampler(data, "get", 1)
    for start in sampler.rows(0).members.tolist():
        ids = sampler.stream.read(start).ids  # type: ignore[union-attr]
        assert (ids.max() <= 60) == (ids.min() <= 60)
    assert len(sampler.rows(0)) == 8


# --- batches


ROWS = [
    Encoded(np.array([5, 6, 7, 0], np.int32), np.array([False, False, True, True])),
    Encoded(np.array([8, 9], np.int32), np.array([False, True])),
]


def test_beside() -> None:
    batch = beside(ROWS)
    assert batch.tokens.tolist() == [[5, 6, 7, 8]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 3, 4]
    assert (batch.positions.tolist(), batch.labels.tolist(), batch.inputs) == ([1, 2, 3], [7, 0, 9], 4)
    assert {t.dtype for t in (batch.tokens, batch.positions, batch.labels)} == {torch.int64}
    assert beside(ROWS[:1]).cu_seqlens is None


def test_padded() -> None:
    batch = padded(ROWS)
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert (batch.positions.tolist(), batch.labels.tolist(), batch.inputs) == ([1, 2, 3], [7, 0, 9], 4)
    assert batch.cu_seqlens is None
    left = padded(ROWS, "left")
    assert left.tokens.tolist() == [[5, 6, 7, 0, 0, 8]]
    assert left.cu_seqlens is not None
    assert left.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert (left.positions.tolist(), left.labels.tolist(), left.inputs) == ([1, 2, 5], [7, 0, 9], 4)
    assert padded(ROWS[:1] * 2, "left").tokens.shape == (2, 3)


@given(rows=st.lists(masks, min_size=1, max_size=5), side=st.sampled_from(["right", "left", "beside"]))
def test_every_target_is_kept(rows: list[list[bool]], side: str) -> None:
    encoded = [encoded_from(mask) for mask in rows]
    batch = beside(encoded) if side == "beside" else padded(encoded, side)
    assert batch.labels.tolist() == predicted(encoded)
    assert (batch.tokens.flatten()[batch.positions] + 1).tolist() == batch.labels.tolist()
    assert batch.inputs == sum(len(mask) - 1 for mask in rows)


# --- loading


def write(folder: Path, *lines: object, name: str = "d.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def load(path: Path, **settings: Any) -> Dataset:
    return load_dataset(TrainConfig(Path("m"), [str(path)], Path("o"), **settings), BYTE)


LINES = [{"text": "exactly8"}, {"prompt": "a question", "response": "yes"}, {"text": "abcdefghijklmnop"}]


@pytest.mark.parametrize(
    ("overlong", "summary"),
    [
        ("split", "3 examples, 32 tokens (29 trained on); 2 longer than --ctx-len 8: split into rows"),
        ("truncate", "3 examples, 16 tokens (16 trained on); 2 longer than --ctx-len 8: truncated (2 lost answer"),
        ("drop", "3 examples, 8 tokens (8 trained on); 2 longer than --ctx-len 8: dropped (2 lost answer tokens)"),
    ],
)
def test_the_summary_hides_no_loss(tmp_path: Path, overlong: Overlong, summary: str) -> None:
    data = load(write(tmp_path, *LINES, "{"), ctx_len=8, overlong=overlong, on_bad_line="skip")
    assert data.summary().startswith(summary)
    assert data.summary().endswith("; 1 bad line skipped")


def test_nothing_but_overlong_examples(tmp_path: Path) -> None:
    path = write(tmp_path, LINES[0])
    with pytest.raises(DataError, match=rf"^{path}: no row is left: with --ctx-len 3 and --overlong drop, .*; use"):
        load(path, ctx_len=3, overlong="drop")


@pytest.mark.parametrize("streaming", [None, True, False])
def test_tokens_in_a_file_are_the_same(tmp_path: Path, streaming: bool | None) -> None:
    data = load(write(tmp_path, *LINES), streaming=streaming)
    assert isinstance(data.corpora[0].ids, np.memmap) == bool(streaming)
    assert data.corpora[0].ids.dtype == np.uint16
    assert [BYTE.decode(data.piece(i).ids.tolist()) for i in range(3)] == [
        "exactly8", "User: a question\n\nAssistant: yes", "abcdefghijklmnop",
    ]  # fmt: skip


LONG = "User: what?\nAssistant: this\nand that。\n\nUser: 谁？\nAssistant: ich!\n" * 40


@pytest.mark.parametrize("mask", ["auto", "all", "pad", "qa", "se"])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_long_text_is_one_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: str, streaming: bool
) -> None:
    (tmp_path / "1.txt").write_text(LONG)
    (tmp_path / "2.txt").write_text("short")
    (tmp_path / "3.txt").write_text(LONG[5:])
    more = {"mask_id": '{"mask0": "User:", "mask1": "Assistant:"}'} if mask in ("qa", "se") else {}
    whole = load(tmp_path, mask=mask, streaming=streaming, **more)
    monkeypatch.setattr(texts, "PART", 50)
    parts = list(read_items(tmp_path))
    assert len(parts) > 50
    data = load(tmp_path, mask=mask, streaming=streaming, **more)
    for name in ("ids", "target", "starts", "lengths"):
        assert getattr(data.corpora[0], name).tolist() == getattr(whole.corpora[0], name).tolist()
    assert len(data.examples) == 3
    assert 0 < data.target_tokens < len(data.corpora[0].ids)
    assert data.summary() == whole.summary()
    assert load(tmp_path, mask=mask, split="train[:2]").examples.inputs.tolist() == whole.examples.inputs.tolist()[:2]


def test_a_long_text_is_inspected_and_refused_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1.txt").write_text(LONG)
    (tmp_path / "2.jsonl").write_text(json.dumps(LINES[1]))
    monkeypatch.setattr(texts, "PART", 50)
    data = load_dataset(InspectConfig([str(tmp_path)]), BYTE)
    record = data.corpora[0].record
    assert record is not None
    assert record.origins == [f"{tmp_path}/1.txt", f"{tmp_path}/2.jsonl:1"]
    assert record.forms == {"plain text": 1, "prompt + response": 1}
    message = "plain text has no answers: not with --mask answers; choose auto or all"
    with pytest.raises(DataError, match=f"^{tmp_path}/1.txt: {message}$"):
        load(tmp_path, mask="answers")
    data = load_dataset(InspectConfig([str(tmp_path)], mask="answers", on_bad_line="skip"), BYTE)
    record = data.corpora[0].record
    assert record is not None
    assert (data.skipped, record.problems) == (1, [(f"{tmp_path}/1.txt", message)])


@given(pieces=st.lists(st.lists(st.integers(0, 60_000), max_size=20), max_size=10), most=st.integers(0, 60))
def test_a_spool_is_what_was_put_in(pieces: list[list[int]], most: int) -> None:
    spool = Spool(np.uint16, None)
    spool.most = most
    for piece in pieces:
        spool.add(np.array(piece, np.int64))
    assert spool.array().tolist() == [i for piece in pieces for i in piece]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, *LINES)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: open("/dev/full", "w+b"))  # noqa: PTH123, SIM115
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\); make room"):
        load(path, streaming=True)


def test_held_out_examples_are_not_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path, *({"text": f"example {i}"} for i in range(50)))
    config = TrainConfig(Path("m"), [str(path)], Path("o"), eval_fraction=0.1, seed=3)
    train, held = load_for_training(config, BYTE)
    assert held is not None
    texts = [[BYTE.decode(d.piece(i).ids.tolist()) for i in range(len(d.pieces))] for d in (train, held)]
    assert (len(texts[0]), len(texts[1])) == (45, 5)
    assert sorted(texts[0] + texts[1]) == sorted(f"example {i}" for i in range(50))
    assert "5 held out" in train.summary()
    other = load_for_training(TrainConfig(Path("m"), [str(path)], Path("o"), eval_fraction=0.1, seed=4), BYTE)[1]
    assert other is not None
    assert other.examples.start.tolist() != held.examples.start.tolist()


def test_each_source_gives_its_part_to_be_held_out(tmp_path: Path) -> None:
    """So that none of those with a share is left without examples."""
    paths = [write(tmp_path, *({"text": f"{n} {i}"} for i in range(n)), name=f"{n}.jsonl") for n in (1, 9, 40)]
    data = [f"{path}:{share}" for path, share in zip(paths, (0.5, 0.25, 0.25), strict=True)]
    for seed in range(10):
        config = TrainConfig(Path("m"), data, Path("o"), eval_fraction=0.2, seed=seed)
        train, held = load_for_training(config, BYTE)
        assert held is not None
        assert np.bincount(train.source, minlength=3).tolist() == [1, 7, 32]
        assert np.bincount(held.source, minlength=3).tolist() == [0, 2, 8]
        assert len(Sampler(train, "pack", 4).rows(0)) > 0


def test_held_out_of_sources_of_one_example_each(tmp_path: Path) -> None:
    """And what was skipped or left out is told once, of what is trained on."""
    paths = [str(write(tmp_path, {"text": f"text {i}"}, "{", name=f"{i}.jsonl")) for i in range(5)]
    config = TrainConfig(
        Path("m"), paths, Path("o"), eval_fraction=0.25, split="train[:4]", on_bad_line="skip", ctx_len=64
    )
    train, held = load_for_training(config, BYTE)
    assert held is not None
    assert train.summary().startswith("3 of 5 examples (train[:4]), ")
    assert "1 held out" in train.summary() and "skipped" in train.summary()
    assert held.summary().startswith("1 example (train[:4]), ")
    assert "skipped" not in held.summary()


def test_a_share_of_nothing(tmp_path: Path) -> None:
    long, short = write(tmp_path, {"text": "x" * 50}, name="l.jsonl"), write(tmp_path, {"text": "y"}, name="s.jsonl")
    config = TrainConfig(Path("m"), [f"{long}:0.9", f"{short}:0.1"], Path("o"), ctx_len=8, overlong="drop")
    with pytest.raises(DataError, match="--data: source 1 has a share, but with --ctx-len 8 and --overlong drop none"):
        load_dataset(config, BYTE)


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    data = load(write(tmp_path, {"text": "one"}))
    with pytest.raises(ConfigError, match=r"^--eval-fraction 0.5: nothing of 1 example would be left to train on"):
        hold_out(data, 0.5, 0)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (("0.7", "0.2"), "the shares sum to 0.9; each must be above 0, and their sum 1"),
        (("0.7", "0.7"), "the shares sum to 1.4"),
        (("1.5", "-0.5"), "the shares sum to 1; each must be above 0"),
        (("0.7", ""), "only some have a share; give each one, or none"),
        (("nan", "nan"), "the shares sum to nan"),
    ],
)
def test_shares_that_cannot_be(tmp_path: Path, shares: tuple[str, str], message: str) -> None:
    paths = [write(tmp_path, {"text": "a"}, name=f"{i}.jsonl") for i in range(2)]
    data = [f"{path}:{share}" if share else str(path) for path, share in zip(paths, shares, strict=True)]
    with pytest.raises(ConfigError, match=rf"^--data {data[0]}.*: {message}"):
        load_dataset(TrainConfig(Path("m"), data, Path("o")), BYTE)


def test_a_source_with_a_colon_in_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "a"}, name="odd:0.5.jsonl")
    path = path.rename(tmp_path / "odd:0.5")
    with pytest.raises(DataError, match=r"odd:0.5"):  # its suffix is unknown, but it is not taken for a share
        load_dataset(TrainConfig(Path("m"), [str(path)], Path("o")), BYTE)
