"""Atomic writing: a file is there whole, or what was there before still is."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError


def write_atomic(path: Path, write: Callable[[Path], object], size: int = 0) -> None:
    """Let `write` fill a temporary file in the same folder, flush it to disk, and rename it to `path`.

    `size` bytes, if known, must be free on the disk beforehand. Raises OutputError if anything cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise OutputError(
                f"{path}: needs {size:,} bytes, the disk has {free:,} free; make room, or write elsewhere"
            )
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)  # as every new file has it; some writers make files that only their owner can read
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    data = text.encode()
    write_atomic(path, lambda temporary: temporary.write_bytes(data), len(data))


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder beside `folder`, and rename it; what was in `folder` before is replaced."""
    name = secrets.token_hex(4)
    temporary, before = (folder.with_name(f".{folder.name}.{name}.{what}") for what in ("tmp", "old"))
    with output_errors(folder):
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            if folder.exists():
                folder.rename(before)
            temporary.rename(folder)
        except OutputError as error:
            raise OutputError(str(error).replace(str(temporary), str(folder))) from error
        finally:
            if before.exists() and not folder.exists():
                before.rename(folder)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(before, ignore_errors=True)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system or a writer says of `path` into one clear OutputError."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        remedy = (
            "make room, or write elsewhere" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another place"
        )
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from error


def _flush(path: Path) -> None:
    with path.open("r+b") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())
