"""The CUDA C++ backend: building its library with compilers that fail, wait or die, and on a GPU its numbers."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkv_peft.errors import ConfigError
from rwkv_peft.ops import cuda, reference
from rwkv_peft.ops.cuda import build as building
from rwkv_peft.ops.cuda.build import build, cache_folder, find_nvcc
from rwkv_peft.ops.cuda.library import Call, open_library
from test_ops import CPU, DOCUMENTS, cast, make_inputs, make_state, results

FORK = multiprocessing.get_context("fork")
GPU = torch.device("cuda")
REFERENCE = {5: reference.wkv5, 6: reference.wkv6, 7: reference.wkv7}
CUDA = {5: cuda.wkv5, 6: cuda.wkv6, 7: cuda.wkv7}

# Writes its process id for every library that it is asked for; fails or waits where a file of that name says so
NVCC = """#!/bin/sh
here=$(dirname "$0")
if [ "$1" = --version ]; then cat "$here/version"; exit; fi
echo $$ >> "$here/compiled"
if [ -e "$here/fails" ]; then cat "$here/fails" >&2; exit 1; fi
while [ "$1" != -o ]; do shift; done
if [ -e "$here/waits" ]; then echo half > "$2"; exec sleep "$(cat "$here/waits")"; fi
sleep 0.2
echo library > "$2"
"""


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler of shell, the first on PATH, and an empty cache."""
    folder = tmp_path / "compiler"
    folder.mkdir()
    (folder / "version").write_text("release 13.0")
    script = folder / "nvcc"
    script.write_text(NVCC)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return script


def compiled(nvcc: Path) -> list[int]:
    """The process of each compilation so far."""
    log = nvcc.with_name("compiled")
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def test_a_library_is_built_once_for_each_card_compiler_and_source(
    nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_nvcc() == str(nvcc)
    first = build(str(nvcc), "sm_90")
    assert first.read_text() == "library\n"
    assert build(str(nvcc), "sm_90") == first
    assert len(compiled(nvcc)) == 1
    made = {first, build(str(nvcc), "sm_80")}
    nvcc.with_name("version").write_text("release 13.1")
    made.add(build(str(nvcc), "sm_90"))
    monkeypatch.setattr(building, "SOURCES", tmp_path)
    (tmp_path / "wkv.cu").write_text("other kernels")
    made.add(build(str(nvcc), "sm_90"))
    assert len(made) == len(compiled(nvcc)) == 4
    assert {path.parent for path in made} == {cache_folder()} == {tmp_path / "cache" / "rwkv_peft"}


def test_of_several_processes_one_builds(nvcc: Path) -> None:
    with FORK.Pool(4) as pool:
        found = pool.starmap(build, [(str(nvcc), "sm_90")] * 4, chunksize=1)
    assert len(set(found)) == 1
    assert found[0].read_text() == "library\n"
    assert len(compiled(nvcc)) == 1


def test_a_killed_builder_holds_nobody_up(nvcc: Path) -> None:
    waits = nvcc.with_name("waits")
    waits.write_text("60")
    builder = FORK.Process(target=build, args=(str(nvcc), "sm_90"))
    builder.start()
    until(lambda: list(cache_folder().glob("*.tmp")))
    builder.kill()
    builder.join()
    waits.unlink()
    try:
        assert build(str(nvcc), "sm_90").read_text() == "library\n"
    finally:
        os.kill(compiled(nvcc)[0], signal.SIGKILL)
    assert not list(cache_folder().glob("*.tmp"))


def until(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_failed_build_is_one_line_and_leaves_nothing(nvcc: Path) -> None:
    nvcc.with_name("fails").write_text("In file common.cuh\nwkv6.cu(3): error: no such thing\nand more errors\n")
    with pytest.raises(ConfigError) as failure:
        build(str(nvcc), "sm_61")
    assert str(failure.value) == (
        f"--op cuda: {nvcc} cannot compile the kernels for sm_61: wkv6.cu(3): error: no such thing; "
        "choose --op triton or torch"
    )
    assert [path.suffix for path in cache_folder().iterdir()] == [".lock"]
    nvcc.with_name("fails").unlink()
    assert build(str(nvcc), "sm_61").exists()


def test_a_cache_that_cannot_be_written(nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"^--op cuda: cannot write .*/file.*; set XDG_CACHE_HOME to a folder"):
        build(str(nvcc), "sm_90")


@pytest.mark.parametrize(
    ("device", "head_size", "reason"),
    [
        (CPU, 64, "needs a GPU, and the model is on cpu"),
        (GPU, 32, "knows heads of 64 and 128, not of 32"),
        (GPU, 128, "nvcc was not found; install the CUDA toolkit"),
    ],
)
def test_it_says_why_it_cannot_run(
    device: torch.device, head_size: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "find_nvcc", lambda: None)
    assert cuda.supports(device, head_size) == reason


def test_inputs_that_the_kernels_do_not_know() -> None:
    inputs = make_inputs(1, 2, 1, 64)
    with pytest.raises(ValueError, match=r"r is torch.float64 \(1, 2, 1, 64\); must be float32"):
        cuda.wkv7(*inputs)
    inputs = cast(inputs, torch.float32)
    with pytest.raises(ValueError, match=r"k is torch.float32 \(1, 1, 1, 64\); must be .* \(1, 2, 1, 64\)"):
        cuda.wkv7(*inputs[:2], inputs[2][:, :1], *inputs[3:])
    with pytest.raises(ValueError, match=r"initial_state is \(2, 1, 64, 64\); must be \(1, 1, 64, 64\)"):
        cuda.wkv7(*inputs, make_state(2, 1, 64))


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
def test_the_real_compiler_builds_what_python_expects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = open_library(build(str(find_nvcc()), "sm_90"))
    assert library.call_size() == ctypes.sizeof(Call)


# --- on a GPU

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(find_nvcc() is None, reason="no nvcc"),
]


def on_gpu(version: int, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator as `results` calls it, on the CPU's tensors; w is float32 whatever the others are."""

    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, state, bounds = args
        moved = [x.to(GPU, torch.float32 if i == 1 else dtype) for i, x in enumerate(inputs)]
        y, final = CUDA[version](*moved, None if state is None else state.to(GPU, torch.float32), bounds)
        return y.cpu(), final.cpu()

    return call


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {n: float((got[n].double() - want[n]).norm() / want[n].norm().clamp(min=1e-30)) for n in want}


@pytest.mark.parametrize("version", REFERENCE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-3), (torch.float16, 6e-4)])
@pytest.mark.parametrize(("B", "T", "H", "N"), [(2, 70, 2, 64), (1, 33, 1, 128), (70, 3, 4, 64), (40, 5, 4, 128)])
class TestOnAGpu:
    """The largest grids have one block a head, the smallest several."""

    pytestmark = gpu

    def test_numbers(
        self,
        version: int,
        dtype: torch.dtype,
        tolerance: float,
        B: int,
        T: int,
        H: int,
        N: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(cuda, "_on_tensor_cores", lambda *args: False)
        inputs, state = make_inputs(B, T, H, N, version=version), make_state(B, H, N)
        inputs = [x if i == 1 else x.to(dtype).double() for i, x in enumerate(inputs)]
        found = errors(results(on_gpu(version, dtype), inputs, state), results(REFERENCE[version], inputs, state))
        assert max(found.values()) <= tolerance, found


@pytest.mark.parametrize("version", REFERENCE)
class TestMoreOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("bounds", DOCUMENTS.values(), ids=DOCUMENTS)
    def test_documents_that_a_gpu_holds_the_offsets_of(self, version: int, bounds: list[int]) -> None:
        inputs, state = make_inputs(1, bounds[-1], 2, 64, version=version), make_state(len(bounds) - 1, 2, 64)
        got = results(on_gpu(version, torch.float32), inputs, state, torch.tensor(bounds, device=GPU))
        found = errors(got, results(REFERENCE[version], inputs, state, torch.tensor(bounds)))
        assert max(found.values()) <= 1e-5, found

    def test_a_cuda_graph(self, version: int) -> None:
        """Captured and replayed on other numbers."""
        inputs = [x.to(GPU, torch.bfloat16).requires_grad_() for x in make_inputs(2, 40, 2, 64, version=version)]

        def step() -> list[Tensor]:
            y, final = CUDA[version](*inputs)
            return [y, *torch.autograd.grad(y.float().square().sum() + final.sum(), inputs)]

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # type: ignore[no-untyped-call]
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for x, other in zip(inputs, make_inputs(2, 40, 2, 64, version=version, seed=1), strict=True):
                x.copy_(other)
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
