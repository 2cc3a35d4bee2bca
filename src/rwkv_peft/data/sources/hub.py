"""Rows of Arrow tables: Parquet files, folders of datasets' `save_to_disk`, and datasets of the Hugging Face hub."""

from __future__ import annotations

import json
import logging
import logging.handlers
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...errors import ConfigError, DataError
from ...packages import optional
from .formats import Found
from .streams import PACKERS, DamagedError, Watch, blocks_of

NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
BATCH = 1 << 24  # bytes of rows that are made Python objects at once
MOST_ROWS = 1024  # of them
SECRET = re.compile(r"\bhf_\w+|(?<=[?&])\S+|(?<=://)[^/\s@]+@")  # tokens, and what signs an address
LOGGERS = ("huggingface_hub", "datasets", "httpx")

# What the libraries say of a dataset on the hub → what we say of it, and the remedy
SAID = {
    r"doesn't exist on the Hub|Repository Not Found": (
        "neither a file or folder here nor a dataset of the hub that may be read",
        "correct the name, or log in with `hf auth login` if it is private",
    ),
    r"is a gated dataset": ("is gated", "ask for access on its page on the hub, then log in with `hf auth login`"),
    r"Config name is missing.*?(\[.*?\])": (r"has several configurations: \1", "choose one with --subset"),
    r"BuilderConfig (.*?) not found.*?(\[.*?\])": (r"has no configuration \1, but \2", "correct --subset"),
    r"[Uu]nknown split (.*?)\. .*?(\[.*?\])": (r"has no split \1, but \2", "correct --split"),
    r"Bad split: (.*?)\. .*?(\[.*?\])": (r"has no split \1, but \2", "correct --split"),
    r"(?i:couldn't reach|locate the file|offline|connection|timed out|server error|name or service|name resolution)": (
        "no file or folder here, and the hub cannot be reached",
        "correct the path, or check the connection and try again",
    ),
    r"doesn't contain any data files|No \(supported\) data files": (
        "has no files that can be read",
        "download what it has, make JSON lines of it, and give --data those",
    ),
    r"scripts are no longer supported": (
        "needs a script of its own to be run",
        "download the files that it would read",
    ),
    r"namespace/name": ("has no owner in its name", "write it as OWNER/NAME"),
}


def parquet_rows(path: Path, watch: Watch | None = None) -> Found:
    """The rows of a Parquet file, a batch in memory at a time; `watch` hears of the bytes of the file behind them.

    Raises:
        DataError: it is none, or damaged; without its name.
    """
    if path.suffix.lower() not in PACKERS:
        with path.open("rb") as file:
            yield from _parquet(file, path, watch)
        return
    with tempfile.TemporaryFile() as unpacked:  # Parquet is read from its end
        for block in blocks_of(path, watch):
            unpacked.write(block)
        yield from _parquet(unpacked, path, None)


def _parquet(file: BinaryIO, path: Path, watch: Watch | None) -> Found:
    parquet = optional("pyarrow.parquet", str(path))
    number = told = 0
    try:
        # Without buffers of its own, reading keeps a whole column of a row group in memory.
        table = parquet.ParquetFile(file, buffer_size=1 << 20, page_checksum_verification=True)
        _all_different(table.schema_arrow.names)
        groups = [table.metadata.row_group(index) for index in range(table.num_row_groups)]
        behind = _bytes_behind(groups, path.stat().st_size)
        longest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
        for batch in table.iter_batches(batch_size=max(1, min(MOST_ROWS, int(BATCH / max(longest, 1))))):
            for value in _objects(batch):
                number += 1
                yield f": row {number}", value
            if watch is not None:
                watch(behind(number) - told)
                told = behind(number)
    except DataError:
        raise
    except Exception as error:  # Damage shows as errors of many kinds, such as those of decoding text.
        raise DamagedError(f"is no Parquet file, or a damaged one ({one_line(error)}); copy it anew") from None
    if not number:
        raise DataError("has no rows; write one example a row")


def _bytes_behind(groups: list[Any], size: int) -> Callable[[int], int]:
    """How much of a file of `size` bytes lies before the end of a row, by the share that each row group has of it."""
    rows = np.cumsum([0, *(group.num_rows for group in groups)])
    bounds = np.cumsum([0, *(group.total_byte_size for group in groups)])
    return lambda row: int(np.interp(row, rows, bounds * (size / max(bounds[-1], 1))))


def _all_different(names: Iterable[str]) -> None:
    names = list(names)
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"names the column {name!r} twice; rename one")


def _objects(batch: Any) -> Iterator[dict[str, Any] | DataError]:
    """The rows of a batch as Python objects; a row with a value that Python cannot hold is an error of its own."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            yield DataError(f"a value cannot be read ({one_line(error)}); write it as UTF-8 text")
            return
    for index in range(len(batch)):
        yield from _objects(batch.slice(index, 1))


def is_saved(folder: Path) -> bool:
    """Whether `folder` was written by `save_to_disk` of a dataset or of a dictionary of them."""
    one = (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def saved_rows(folder: Path, split: str) -> Found:
    """The rows of a folder that `save_to_disk` has written; they stay on the disk but for a batch.

    Raises:
        ConfigError: it has no such split, or datasets is not installed.
        DataError: it cannot be read.
    """
    datasets = optional("datasets", str(folder))
    dictionary, place = folder / "dataset_dict.json", ""
    try:
        if dictionary.is_file():
            splits = json.loads(dictionary.read_text(encoding="utf-8"))["splits"]
            if split not in splits:
                raise ConfigError(f"--split {split}: {folder} has the splits {', '.join(splits)}; choose one")
            folder, place = folder / split, f"[{split}]"
        found = datasets.load_from_disk(str(folder))
    except ConfigError:
        raise
    except Exception as error:
        raise DataError(f"cannot be loaded ({one_line(error)}); save it anew with save_to_disk") from None
    if not place and split not in ("train", str(found.split)):
        raise ConfigError(f"--split {split}: {folder} holds one dataset, whose split is {found.split or 'train'}")
    yield from _rows(found, place)


def hub_rows(name: str, split: str, subset: str, whole: bool = True) -> Found:
    """The rows of a dataset on the hub. Nothing of a dataset is executed.

    The `whole` dataset is downloaded once, and stays on the disk but for a batch; where only its first rows are wanted,
    they are fetched each time, and the rest is not. Columns of images and sounds are left out.

    Raises:
        DataError: whatever is wrong with the name, subset, split, connection or files, or that datasets is missing;
            without the name.
    """
    try:
        datasets = optional("datasets", name)
    except ConfigError:
        raise DataError(
            "no such file or folder; give --data one that exists, or, if it is a dataset on the hub, "
            "pip install 'rwkv-peft[data]'"
        ) from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        with logs_if_it_works():
            if "/" not in name:
                # `load_dataset` takes json, csv and the like for the readers of that name, and reads the current folder
                name = str(optional("huggingface_hub", name).HfApi().dataset_info(name).id)
            found = datasets.load_dataset(name, subset or None, split=split, streaming=not whole)
    except Exception as error:
        raise DataError(_said_of_hub(error)) from None
    yield from _rows(found, f"[{split}]")


@contextmanager
def logs_if_it_works() -> Iterator[None]:
    """Hold back what the libraries log, such as each time that they try again: an error says all of it in one line.

    If it works after all, what was logged is written then, since it may say that an older copy is used.
    """
    held = logging.handlers.MemoryHandler(sys.maxsize, logging.CRITICAL + 1)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [held], False
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
    for record in held.buffer:
        logging.getLogger(record.name).callHandlers(record)


def _rows(dataset: Any, split: str) -> Found:
    """The rows of a dataset that is on the disk or comes in a stream."""
    media = [name for name, kind in (dataset.features or {}).items() if _is_media(kind)]
    if media:
        dataset = dataset.remove_columns(media)
    size = MOST_ROWS
    if hasattr(dataset, "data") and len(dataset):
        size = max(1, min(size, BATCH * len(dataset.data) // max(dataset.data.nbytes, 1)))
    number = 0
    try:
        for batch in dataset.iter(batch_size=size):
            for row in zip(*batch.values(), strict=True):
                yield f"{split}: row {number + 1}", dict(zip(batch, row, strict=True))
                number += 1
    except Exception as error:
        raise DamagedError(f"cannot be read ({one_line(error)}); load or save it anew") from None
    if not number:
        raise DataError(f"has no rows of text{f' (but columns {media})' if media else ''}; give --data what has")


def _is_media(kind: Any) -> bool:
    """Whether a column holds files to be decoded, such as images."""
    return hasattr(kind, "decode_example") and type(kind).__name__ != "Json"


def _said_of_hub(error: Exception) -> str:
    """What a library says of a dataset, with a remedy, on one line."""
    said = one_line(error)
    if "while generating" in said and error.__cause__ is not None:
        return (
            f"its files cannot be read ({one_line(error.__cause__)}); download them, mend them, and give --data those"
        )
    for pattern, (what, remedy) in SAID.items():
        if form := re.search(pattern, said):
            return f"{form.expand(what)}; {remedy}"
    return f"cannot be loaded ({said}); check it on the hub, or download its files and give --data those"


def one_line(error: BaseException) -> str:
    """The message of another library's error: on one line, not too long, and without anything secret."""
    text = SECRET.sub("…", " ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"
