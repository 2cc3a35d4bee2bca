"""The examples of a run, and what became of all others. D examples; P pieces, of at most --ctx-len inputs, of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from ..config import DataConfig, Overlong, ReadConfig, Sampling, TrainConfig, flag_of, shares_of
from ..errors import ConfigError, DataError
from .binidx import is_binidx
from .corpus import Corpus, read_corpora
from .masking import Encoded, Flags, encoder_for
from .sources import Split
from .templates import find_template
from .tokenizer import Tokenizer

Integers = npt.NDArray[np.int64]
HELD_OUT = 0x6865  # begins a seed of its own, so that what is held out has nothing to do with the order of training
COUNTED_AT_ONCE = 2**20  # tokens
DEEDS = {"split": "split into rows", "truncate": "truncated", "drop": "dropped"}


@dataclass(frozen=True, eq=False)
class Windows:
    """Stretches of the corpora: whole examples, or pieces of them."""

    corpus: Integers
    """(n,) which corpus each is of."""
    start: Integers
    """(n,) where it begins there."""
    inputs: Integers
    """(n,) tokens that the model reads; there is one id more, which is only predicted."""

    def __len__(self) -> int:
        return len(self.start)

    def of(self, chosen: Integers | npt.NDArray[np.bool_]) -> Windows:
        """Some of them, in the order of `chosen`."""
        return Windows(self.corpus[chosen], self.start[chosen], self.inputs[chosen])


@dataclass(frozen=True, eq=False)
class Dataset:
    """What is trained on, or measured on."""

    corpora: list[Corpus]
    examples: Windows
    """Each example, whole."""
    source: Integers
    """(D,) which entry of --data it comes from."""
    pieces: Windows
    """What of the examples fits the rows, in their order."""
    first: Integers
    """(D+1,) the pieces of example d are first[d] to first[d+1]."""
    shares: list[float]
    """Of each source; empty where no source has one."""
    ctx_len: int
    overlong: Overlong
    split: str
    tokens: int
    """Tokens that the model reads, if it sees every piece once."""
    target_tokens: int
    """Tokens that the model is trained to predict, if it sees every piece once."""
    long: int
    """Examples longer than the context length."""
    empty: int
    """Rows of them that are left out, since nothing in them is learnt."""
    lost: int
    """Examples of which some or all targets are not trained on, because they are too long."""
    skipped: int
    """Examples that could not be used."""
    left_out: int
    """Examples read that --split does not choose."""
    held_out: int
    """Examples kept for measuring the loss."""
    notes: list[str]
    """What else should be told."""

    def piece(self, index: int) -> Encoded:
        """Ids and targets of a piece; its first token is no target."""
        pieces = self.pieces
        piece = self.window(int(pieces.corpus[index]), int(pieces.start[index]), int(pieces.inputs[index]) + 1)
        piece.target[0] = False
        return piece

    def learns_first(self, corpus: int, starts: Integers) -> Flags:
        """(n,) whether the first tokens of the examples at `starts` are learnt in a stream, where one comes before.

        They are if the second ones are: so it is the same for text and for the binidx pair made of it.
        """
        target = self.corpora[corpus].target
        return np.ones(len(starts), np.bool_) if target is None else target[starts + 1]

    def window(self, corpus: int, start: int, length: int) -> Encoded:
        """`length` tokens of a corpus, as they are."""
        of = self.corpora[corpus]
        ids = of.ids[start : start + length]
        target = np.ones(len(ids), np.bool_) if of.target is None else of.target[start : start + length].copy()
        largest = int(ids.max(initial=0))
        if largest >= of.vocab_size:
            raise DataError(
                f"{of.title}: token {start + int(ids.argmax()):,} is {largest}, the vocabulary has {of.vocab_size:,}; "
                "prepare the text with this model's tokenizer"
            )
        return Encoded(ids, target)

    def summary(self) -> str:
        """One line that tells what is trained on and hides no loss."""
        examples = plural(len(self.examples), "example")
        if self.left_out:
            every = len(self.examples) + self.held_out + self.left_out
            examples = f"{len(self.examples):,} of {plural(every, 'example')}"
        if self.split != "train":
            examples += f" ({self.split})"
        parts = [f"{examples}, {plural(self.tokens, 'token')} ({self.target_tokens:,} trained on)"]
        if self.long:
            loss = f" ({self.lost:,} lost answer tokens)" if self.lost else ""
            parts.append(f"{self.long:,} longer than --ctx-len {self.ctx_len}: {DEEDS[self.overlong]}{loss}")
        if self.empty:
            parts.append(f"{plural(self.empty, 'row')} of prompt alone left out")
        if self.held_out:
            parts.append(f"{self.held_out:,} held out")
        if self.skipped:
            parts.append(f"{plural(self.skipped, 'bad line')} skipped")
        return "; ".join(parts)


def load_dataset(config: DataConfig, tokenizer: Tokenizer, vocab_size: int | None = None) -> Dataset:
    """Read, encode and fit all of `config.data`, for a model of `vocab_size` ids, or one made for the tokenizer.

    Raises:
        ConfigError: a setting that does not fit the data or the vocabulary.
        DataError: what reading raises, that --split chooses nothing, or that no example keeps a target.
    """
    whole = read(config, tokenizer, vocab_size)
    return fit(whole, every(whole), config.sampling)


def load_for_training(
    config: TrainConfig, tokenizer: Tokenizer, vocab_size: int | None = None
) -> tuple[Dataset, Dataset | None]:
    """What is trained on, and what the loss is measured on, if anything. Raises as `load_dataset` does."""
    whole = read(config, tokenizer, vocab_size)
    if config.eval_data:
        other = replace(
            config, data=list(config.eval_data), eval_data=(), eval_fraction=0.0, split="train", sampling="pack"
        )
        return fit(whole, every(whole), config.sampling), load_dataset(other, tokenizer, vocab_size)
    if not config.eval_fraction:
        return fit(whole, every(whole), config.sampling), None
    held, rest = hold_out(whole, config.eval_fraction, config.seed)
    train = fit(replace(whole, held_out=len(held)), rest, config.sampling)
    return train, fit(replace(whole, shares=[], notes=[], skipped=0, left_out=0), held)


def read(config: DataConfig, tokenizer: Tokenizer, vocab_size: int | None = None) -> Dataset:
    """Every example that --split chooses; their pieces are still the examples themselves."""
    split, shares = Split.parse(config.split), shares_of(config.data)
    template = find_template(config.template)
    encoder = encoder_for(config, tokenizer, template, vocab_size)
    corpora: list[Corpus] = []
    source_of: list[int] = []
    for number, (source, _) in enumerate(shares):
        found = list(read_corpora(source, config, template, encoder))
        corpora += found
        source_of += [number] * len(found)
    counts = [len(corpus.starts) for corpus in corpora]
    chosen = np.arange(sum(counts))[split.of(sum(counts))]
    if not len(chosen):
        raise DataError(f"--split {config.split}: none of the {plural(sum(counts), 'example')}; choose a wider one")
    of = np.repeat(np.arange(len(corpora)), counts)[chosen]
    lengths, starts = (np.concatenate([getattr(c, name) for c in corpora])[chosen] for name in ("lengths", "starts"))
    examples = Windows(of, starts, lengths - 1)
    sources = np.array(source_of)[of]
    for number, (name, share) in enumerate(shares):
        if share is not None and not (sources == number).any():
            raise DataError(
                f"{name}: has a share, but --split {config.split}, which counts through all sources together, leaves "
                "none of its examples; leave out one of the two"
            )
    return Dataset(
        corpora, examples, sources, examples, np.arange(len(examples) + 1), [share for _, share in shares if share],
        config.ctx_len, config.overlong, config.split, tokens=0, target_tokens=0, long=0, empty=0, lost=0,
        skipped=sum(corpus.skipped for corpus in corpora), left_out=sum(counts) - len(chosen), held_out=0,
        notes=[*(note for corpus in corpora for note in corpus.notes), *encoder.notes(), *without_effect(config)],
    )  # fmt: skip


def without_effect(config: DataConfig) -> list[str]:
    """A line for settings that mean nothing where the data are tokens already."""
    of_text = ("fields", "template", "stop_token", "subset", "separator")
    given = [flag_of(f.name) for f in fields(ReadConfig) if f.name in of_text and getattr(config, f.name) != f.default]
    if given and all(is_binidx(source) for source, _ in shares_of(config.data)):
        return [f"{' '.join(given)}: no effect, the data are tokens already"]
    return []


def hold_out(whole: Dataset, share: float, seed: int) -> tuple[Integers, Integers]:
    """Which examples are held out, and which are left, each in their order.

    Where sources have shares, each gives its part, so that none is left without examples. Raises ConfigError if either
    is none.
    """
    group = whole.source if whole.shares else np.zeros(len(whole.source), np.int64)
    counts = np.bincount(group)
    out = np.minimum(np.rint(share * counts).astype(np.int64), np.maximum(counts - 1, 0))
    if not out.any():
        out[counts.argmax()] = 1
    if round(share * counts.sum()) >= counts.sum() or (out >= counts)[counts > 0].any():
        raise ConfigError(
            f"--eval-fraction {share}: nothing of {plural(int(counts.sum()), 'example')} would be left to train on; "
            "name other examples with --eval-data"
        )
    random = np.random.default_rng([HELD_OUT, seed])
    held = [random.permutation(np.flatnonzero(group == i))[:n] for i, n in enumerate(out.tolist())]
    is_held = np.zeros(len(whole.examples), np.bool_)
    is_held[np.concatenate(held)] = True
    return np.flatnonzero(is_held), np.flatnonzero(~is_held)


def every(whole: Dataset) -> Integers:
    """The number of each example."""
    return np.arange(len(whole.examples))


def fit(whole: Dataset, chosen: Integers, sampling: Sampling = "pack") -> Dataset:
    """The `chosen` examples, cut into pieces of at most `ctx_len` inputs, each with a target.

    `split` keeps every target in exactly one piece: a piece begins with the last id of the one before. `truncate` keeps
    the first piece, `drop` none. For windows of the stream nothing is cut. Raises DataError if nothing is left.
    """
    examples, ctx_len = whole.examples.of(chosen), whole.ctx_len
    if sampling == "get":
        learnt = np.zeros(len(chosen), np.bool_)  # the first token of each example
        for i in range(len(whole.corpora)):
            mine = examples.corpus == i
            learnt[mine] = whole.learns_first(i, examples.start[mine])
        source = whole.source[chosen]
        begins = np.unique(source, return_index=True)[1] if whole.shares else np.array([0])  # nothing comes before
        learnt[begins] = False
        return replace(
            whole, examples=examples, source=source, pieces=examples, first=np.arange(len(chosen) + 1),
            tokens=int(examples.inputs.sum()) + len(chosen) - len(begins),
            target_tokens=int(count_targets(whole.corpora, examples).sum() + learnt.sum()),
        )  # fmt: skip
    long = examples.inputs > ctx_len
    count = np.ones(len(chosen), np.int64)
    if whole.overlong == "split":
        count = -(-examples.inputs // ctx_len)
    elif whole.overlong == "drop":
        count[long] = 0
    example = np.repeat(np.arange(len(chosen)), count)  # (P,) which each piece is of
    offset = (np.arange(len(example)) - np.repeat(np.cumsum(count) - count, count)) * ctx_len
    pieces = examples.of(example)
    inputs = np.minimum(pieces.inputs - offset, ctx_len)
    pieces = Windows(pieces.corpus, pieces.start + offset, inputs)
    targets = count_targets(whole.corpora, pieces)
    kept = targets > 0
    per_example = np.bincount(example, targets, len(chosen)).astype(np.int64)
    if not kept.any():
        names = ", ".join(corpus.title for corpus in whole.corpora)
        raise DataError(
            f"{names}: no row is left: with --ctx-len {ctx_len} and --overlong {whole.overlong}, no example keeps an "
            "answer token; use --overlong split or a longer --ctx-len"
        )
    for number in range(len(whole.shares)):
        if not (whole.source[chosen][example[kept]] == number).any():
            raise DataError(
                f"--data: source {number + 1} has a share, but with --ctx-len {ctx_len} and --overlong "
                f"{whole.overlong} none of its examples keeps an answer token; use split, or leave it out"
            )
    wanted = count_targets(whole.corpora, examples)
    first = np.concatenate(([0], np.bincount(example[kept], minlength=len(chosen)).cumsum()))
    return replace(
        whole, examples=examples, source=whole.source[chosen], pieces=pieces.of(kept), first=first,
        tokens=int(inputs[kept].sum()), target_tokens=int(targets.sum()), long=int(long.sum()),
        empty=int((~kept).sum()), lost=int((per_example < wanted).sum()),
    )  # fmt: skip


def count_targets(corpora: list[Corpus], windows: Windows) -> Integers:
    """(n,) targets of each window, its first token not counted; windows of a corpus must be in its order."""
    result = windows.inputs.copy()
    for number, corpus in enumerate(corpora):
        if corpus.target is not None:
            mine = np.flatnonzero(windows.corpus == number)
            begin = windows.start[mine] + 1
            result[mine] = count_between(corpus.target, begin, begin + windows.inputs[mine])
    return result


def count_between(flags: Flags, begin: Integers, end: Integers) -> Integers:
    """(n,) how many of `flags` are set in each stretch; the stretches rise and are not empty.

    Stretches that lie near each other are counted at once, long ones alone: memory does not grow with them.
    """
    counts = np.empty(len(begin), np.int64)
    at = 0
    while at < len(begin):
        stop = max(at + 1, int(np.searchsorted(end, begin[at] + COUNTED_AT_ONCE, "right")))
        near = flags[begin[at] : end[stop - 1]]
        if stop == at + 1:
            counts[at] = np.count_nonzero(near)
        else:
            bounds = np.stack((begin[at:stop], end[at:stop]), 1).ravel() - begin[at]
            # without the last one, up to which reduceat sums by itself
            counts[at:stop] = np.add.reduceat(near, bounds[:-1], dtype=np.int64)[::2]
        at = stop
    return counts


def plural(number: int, noun: str) -> str:
    """`1 row`, `1,204 rows`."""
    return f"{number:,} {noun}" + ("s" if number != 1 else "")
