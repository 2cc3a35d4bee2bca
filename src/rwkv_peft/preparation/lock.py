"""A lock on PREFIX.partial, which the operating system releases however its process ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import ConfigError
from ..files import output_errors


@contextmanager
def locked(prefix: str) -> Iterator[str]:
    """Keep other commands out of PREFIX.partial; gives what should be told if the file system has no locks, or "".

    The folder is made, and removed at the end if nothing else is in it. Raises ConfigError if another command is at
    work in it, and OutputError if it cannot be made.
    """
    folder = Path(f"{prefix}.partial")
    with output_errors(folder):
        file, problem = _lock_file(folder)
    if file is None:
        raise ConfigError(
            f"--out {prefix}: another command is at work in {folder}; wait until it has ended, or choose another name"
        )
    try:
        yield problem and f"{folder}: has no lock ({problem}); let no other command write it at the same time"
    finally:
        if sys.platform == "win32":
            file.close()  # or it could not be removed
        with suppress(OSError):
            (folder / "lock").unlink()
            folder.rmdir()
        file.close()


def _lock_file(folder: Path) -> tuple[IO[bytes] | None, str]:
    """The open and locked file, None if another process has locked it; and what the system says if it has no locks."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("ab")
        try:
            _lock(file)
        except (BlockingIOError, PermissionError):
            file.close()
            return None, ""
        except OSError as error:
            return file, error.strerror or str(error)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (folder / "lock").stat()):
                return file, ""
        file.close()  # whoever had it locked has removed it: what is locked now is no longer in the folder


def _lock(file: IO[bytes]) -> None:
    """Raises BlockingIOError or PermissionError if another process has locked it."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
