"""Files of tensors, mapped: the same tensors as their own readers give, without what these need for it."""

from __future__ import annotations

import json
import resource
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import random_model
from rwkv_peft.checkpoint import read_tensors
from rwkv_peft.errors import CheckpointError
from rwkv_peft.mapped import UnusualError, map_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64, torch.float8_e4m3fn]


def tensors() -> dict[str, Tensor]:
    found = {str(d): torch.arange(24).reshape(2, 3, 4).to(d) for d in DTYPES[:-1]}
    return random_model() | found | {"one": torch.tensor(3.0), "odd": torch.arange(7, dtype=torch.uint8)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape) == (b[n].dtype, b[n].shape) and torch.equal(a[n].double(), b[n].double()) for n in a
    )


def test_pth(tmp_path: Path) -> None:
    """Views of one storage, other strides, parameters and empty tensors too."""
    base = torch.arange(60.0).reshape(6, 10)
    odd = {"turned": base.T, "row": base[2], "every": base[::2, 1::3], "parameter": torch.nn.Parameter(base * 2)}
    torch.save(tensors() | odd, tmp_path / "m.pth")
    found = map_tensors(tmp_path / "m.pth")
    assert same(found, torch.load(tmp_path / "m.pth", weights_only=True))
    assert found["turned"].stride() == (1, 10)


def test_safetensors(tmp_path: Path) -> None:
    save_file(tensors() | {"fp8": torch.ones(3, 5).to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors", {"a": "b"})
    assert same(map_tensors(tmp_path / "m.safetensors"), load_file(tmp_path / "m.safetensors"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_changed_does_not_reach_the_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    torch.save({"x": torch.zeros(9)}, path) if suffix == ".pth" else save_file({"x": torch.zeros(9)}, path)
    before = path.read_bytes()
    map_tensors(path)["x"].add_(1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_larger_than_memory(suffix: str, tmp_path: Path) -> None:
    """It opens, and only what is used is read. (A file of holes, which takes no room.)"""
    rows = 2**20
    path = large_file(tmp_path / f"m{suffix}", rows)
    assert path.stat().st_size > 2**41
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = read_tensors(path)
    assert found["x"].shape == (rows, rows)
    assert not found["x"][7, :9].any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def large_file(path: Path, rows: int) -> Path:
    """One tensor x (rows, rows) of bf16 zeros."""
    size = 2 * rows * rows
    if path.suffix == ".safetensors":
        header = json.dumps({"x": {"dtype": "BF16", "shape": [rows, rows], "data_offsets": [0, size]}}).encode()
        header += b" " * (-len(header) % 8)
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with path.open("r+b") as file:
            file.truncate(8 + len(header) + size)
        return path
    one = path.with_name("one.pth")
    torch.save({"x": torch.zeros(2, 2, dtype=torch.bfloat16)}, one)
    with zipfile.ZipFile(one) as archive:
        names = archive.namelist()
        index = archive.read(next(name for name in names if name.endswith("data.pkl")))
    assert index.count(b"K\x02K\x02\x86") == 1  # its shape, and (2,1) its stride
    number = b"\x8a\x04" + rows.to_bytes(4, "little")
    index = index.replace(b"K\x02K\x02\x86", number + number + b"\x86")
    index = index.replace(b"K\x02K\x01\x86", number + b"K\x01\x86")
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr("m/data.pkl", index)
        archive.writestr("m/byteorder", "little")
        entry = zipfile.ZipInfo("m/data/0")
        with archive.open(entry, "w", force_zip64=True) as data:
            data.write(b"\0")
            start = file.tell() - 1
            file.seek(start + size)
            data._file_size = size  # type: ignore[attr-defined]
            archive.start_dir = start + size
    return path


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"emb.weight": Bomb(str(tmp_path / "ran"))}, tmp_path / "bomb.pth")
    with pytest.raises(UnusualError, match=r"\.system"):
        map_tensors(tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match="holds Python code"):
        read_tensors(tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(suffix: str, cut: float, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    torch.save(random_model(), path) if suffix == ".pth" else save_file(random_model(), path)
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    with pytest.raises(UnusualError):
        map_tensors(path)
    with pytest.raises(CheckpointError, match=r"cut off"):
        read_tensors(path)


def test_a_file_of_an_older_torch(tmp_path: Path) -> None:
    """Not a zip file: its own reader takes it, or says what is wrong."""
    torch.save(random_model(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UnusualError):
        map_tensors(tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match=r"is not a file of torch\.save's zip form"):
        read_tensors(tmp_path / "old.pth")
