"""Files of tensors, written one at a time: the same files as their own writers make, in little memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conftest import PypiRwkv, random_model, random_tokens
from rwkv_peft.checkpoint import read_tensors, stream_tensors, write_tensors
from rwkv_peft.errors import CheckpointError, OutputError
from rwkv_peft.mapped import LOCAL_HEADER, map_tensors

FORMS = (".pth", ".safetensors")
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn]


def tensors() -> dict[str, Tensor]:
    """Of every length and size of number, none of them a multiple of the other."""
    odd = {str(dtype): torch.arange(21).reshape(3, 7).to(dtype) for dtype in DTYPES}
    odd |= {"one": torch.tensor(3.0), "none": torch.zeros(0, 5), 'ä "\n': torch.ones(3, dtype=torch.bfloat16)}
    return random_model(dtype=torch.bfloat16) | odd


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal to the bit, in the same order."""
    return list(a) == list(b) and all(
        (a[n].dtype, a[n].shape, a[n].tolist()) == (b[n].dtype, b[n].shape, b[n].tolist()) for n in a
    )


# --- what is written


def test_a_safetensors_file_is_that_of_its_library(tmp_path: Path) -> None:
    """To the bit, but for the order of tensors whose numbers are of the same size but not of the same kind."""
    found = {n: t for n, t in tensors().items() if t.dtype not in (torch.int64, torch.bool, torch.float8_e4m3fn)}
    save_file(found, tmp_path / "theirs.safetensors", {"format": "pt"})
    write_tensors(tmp_path / "ours.safetensors", found, {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # its checksums are right
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def test_a_pth_file_has_the_entries_of_torchs(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "theirs.pth")
    write_tensors(tmp_path / "ours.pth", tensors())
    ours, theirs = entries_of(tmp_path / "ours.pth"), entries_of(tmp_path / "theirs.pth")
    assert ours == {name: theirs[name] for name in ours}
    assert {name for name in theirs.keys() - ours.keys() if not name.startswith(".")} == set()


@pytest.mark.parametrize("large", [False, True])
def test_a_pth_file_is_read_by_torch(large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose entries are too large for the headers of old zip files."""
    if large:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 40)
    path, want = tmp_path / "m.pth", tensors()
    write_tensors(path, want)
    for mapped in (False, True):
        assert same(torch.load(path, weights_only=True, mmap=mapped), want)
    del want["torch.float8_e4m3fn"]  # torch's index says otherwise where those are
    write_tensors(path, want)
    assert same(map_tensors(path), want)
    with zipfile.ZipFile(path) as archive:
        places = [(entry.header_offset, entry.file_size) for entry in archive.infolist()]
    for start, size in places:
        header = path.read_bytes()[start : start + LOCAL_HEADER]
        assert (int.from_bytes(header[18:22], "little") == 0xFFFFFFFF) == (large and size >= 40)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        assert (start + LOCAL_HEADER + names) % 64 == 0


def test_a_pth_file_is_read_by_pypi_rwkv(tmp_path: Path, pypi_rwkv: PypiRwkv) -> None:
    tokens = random_tokens(257, 9).tolist()
    torch.save(random_model(), tmp_path / "theirs.pth")
    write_tensors(tmp_path / "ours.pth", random_model())
    ours, theirs = (pypi_rwkv(tmp_path / f"{whose}.pth", tokens)[0] for whose in ("ours", "theirs"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_views_parameters_and_other_strides(form: str, tmp_path: Path) -> None:
    whole = torch.randn(6, 10)
    odd = {"turned": whole.T, "every": whole[::2, 1::3], "parameter": torch.nn.Parameter(whole), "wide": whole[:1, :1]}
    odd["wide"] = odd["wide"].expand(3, 4)
    write_tensors(tmp_path / f"m{form}", odd)
    found = read_tensors(tmp_path / f"m{form}")
    assert same({name: found[name] for name in odd}, odd)


# --- one at a time


@pytest.mark.parametrize("form", FORMS)
def test_what_fails_half_way_leaves_nothing(form: str, tmp_path: Path) -> None:
    def halves() -> Iterator[Tensor]:
        yield torch.zeros(3)
        raise CheckpointError("base.pth: is damaged")

    forms = {name: torch.empty(3, device="meta") for name in "ab"}
    with pytest.raises(CheckpointError, match=r"^base\.pth: is damaged$"):
        stream_tensors(tmp_path / f"m{form}", forms, halves())
    assert not list(tmp_path.iterdir())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [100, 10_000, 1_000_000])
def test_a_disk_that_fails(size: int, form: str, tmp_path: Path) -> None:
    path, old = tmp_path / f"m{form}", {"x": torch.arange(3.0)}
    write_tensors(path, old)
    new = {"a": torch.zeros(100), "b": torch.zeros(300_000)}
    with largest_file(size), pytest.raises(OutputError, match=rf"m\{form}: cannot be written \(File too large\); "):
        write_tensors(path, new)
    assert same(read_tensors(path), old)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# --- memory

LAYERS, WIDTH = 40, 512
MATRICES = ["att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"]
# of a small model, then of a large one: the most memory that the process has had, in MiB
MEASURE = """
import sys
import torch
from rwkv_peft.export.merge import merge
from rwkv_peft.export.quantised import export_quantised
torch.set_num_threads(1)
what, form, folder = sys.argv[1:]
for size in ("small", "large"):
    base = f"{folder}/{size}{form}"
    if what == "merge":
        merge(base, f"{folder}/{size}", f"{folder}/out{form}", overwrite=True)
    else:
        export_quantised(base, f"{folder}/out.safetensors", "fp8", overwrite=True)
    status = dict(line.split(":") for line in open("/proc/self/status"))
    print(int(status["VmHWM"].split()[0]) / 1024)  # getrusage counts what the parent had, too
"""


def deep_model(path: Path, layers: int) -> None:
    """Random, in bf16; all layers but the first are alike."""
    two = random_model(layers=2, width=WIDTH, dtype=torch.bfloat16)
    last = {name.removeprefix("blocks.1."): t for name, t in two.items() if name.startswith("blocks.1.")}
    deep = {f"blocks.{i}.{name}": tensor for i in range(2, layers) for name, tensor in last.items()}
    write_tensors(path, two | deep)


def lora_of_all(folder: Path, layers: int) -> None:
    """A LoRA of every matrix, as PEFT writes it."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": MATRICES}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    wide = 4 * WIDTH
    adapter = {}
    for name in (f"base_model.model.blocks.{i}.{matrix}" for i in range(layers) for matrix in MATRICES):
        adapter[f"{name}.lora_A.weight"] = torch.full((2, wide if name.endswith("ffn.value") else WIDTH), 0.1)
        adapter[f"{name}.lora_B.weight"] = torch.full((wide if name.endswith("ffn.key") else WIDTH, 2), 0.1)
    write_tensors(folder / "adapter_model.safetensors", adapter)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted otherwise")
@pytest.mark.parametrize(("what", "form"), [("merge", ".pth"), ("merge", ".safetensors"), ("export", ".pth")])
@pytest.mark.usefixtures("clean")
def test_memory_does_not_grow_with_the_model(what: str, form: str, tmp_path: Path) -> None:
    for size, layers in (("small", 2), ("large", LAYERS)):
        deep_model(tmp_path / f"{size}{form}", layers)
        lora_of_all(tmp_path / size, layers)
    assert (tmp_path / f"large{form}").stat().st_size > 240 * 2**20
    command = [sys.executable, "-c", MEASURE, what, form, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    small, large = map(float, done.stdout.split())
    assert large - small < 50, done.stdout
    if what == "merge":
        before, after = (read_tensors(tmp_path / f"{name}{form}") for name in ("large", "out"))
        name = f"blocks.{LAYERS - 1}.ffn.key.weight"
        assert torch.equal(after[name], (before[name].float() + 0.02).bfloat16())


@pytest.fixture
def clean(tmp_path: Path) -> Iterator[None]:
    """Large files do not stay in pytest's folder."""
    yield
    for path in (*tmp_path.glob("large.*"), *tmp_path.glob("out.*")):
        path.unlink()
