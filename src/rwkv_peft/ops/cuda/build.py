"""The kernels' shared library: compiled by nvcc for the card that is there when it is first needed, then cached.

The file's name holds a hash of everything that it is made from, so that it never has to be told to build again. Of
several processes one builds and the others wait. The lock is the kernel's own and dies with its holder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ...errors import ConfigError

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", "--threads=2")


def find_nvcc() -> str | None:
    """The compiler on PATH, else that of CUDA_HOME, else that of /usr/local/cuda."""
    folders = [
        os.environ.get("PATH"),
        *(f"{home}/bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home),
    ]
    return next((found for folder in folders if (found := shutil.which("nvcc", path=folder))), None)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv_peft"


def build(nvcc: str, architecture: str) -> Path:
    """The shared library for `architecture` ("sm_90"), compiled if it is not in the cache.

    Raises ConfigError if it cannot be compiled or the cache cannot be written.
    """
    folder = cache_folder()
    target = folder / f"cuda-{architecture}-{_key(nvcc, architecture)}.so"
    if target.exists():
        return target
    try:
        import fcntl  # not on Windows

        folder.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(nvcc, architecture, target)
    except OSError as error:
        place = error.filename or target
        raise ConfigError(
            f"--op cuda: cannot write {place}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return target


def _key(nvcc: str, architecture: str) -> str:
    version = _run([nvcc, "--version"], architecture)
    digest = hashlib.sha256("\n".join((version, architecture, *FLAGS)).encode())
    for path in _sources("*.cu*"):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _sources(pattern: str) -> list[Path]:
    return sorted(SOURCES.glob(pattern))


def _compile(nvcc: str, architecture: str, target: Path) -> None:
    """Only under the lock; what a killed builder left is removed. Says so, as it takes half a minute."""
    print(f"compiling CUDA kernels for {architecture}; they are kept in {target.parent}", file=sys.stderr, flush=True)
    for left in target.parent.glob(f"{target.stem}.*.tmp"):
        left.unlink(missing_ok=True)
    made = target.with_suffix(f".{os.getpid()}.tmp")
    card = f"-gencode=arch={architecture.replace('sm_', 'compute_')},code={architecture}"
    try:
        _run([nvcc, *FLAGS, card, "-o", str(made), *map(str, _sources("*.cu"))], architecture)
        made.replace(target)
    finally:
        made.unlink(missing_ok=True)


def _run(command: list[str], architecture: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return done.stdout
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    told = next((line for line in lines if "error" in line.lower() or "fatal" in line.lower()), None)
    reason = told or (lines[-1] if lines else f"exit code {done.returncode}")
    raise ConfigError(
        f"--op cuda: {command[0]} cannot compile the kernels for {architecture}: {reason}; choose --op triton or torch"
    )
