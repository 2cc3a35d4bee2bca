"""What `rwkv-peft doctor` tells: of this machine, of backends that are right, wrong or broken, and its exit code."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from rwkv_peft import doctor, ops
from rwkv_peft.cli import main
from rwkv_peft.config import DoctorConfig
from rwkv_peft.doctor import machine, run_doctor, selftest, speed
from rwkv_peft.errors import ConfigError
from rwkv_peft.ops import BACKENDS, Backend, chunked7, reference

CPU = torch.device("cpu")
QUICK = DoctorConfig("cpu", seconds=0)


@pytest.fixture
def report() -> Callable[..., tuple[bool, str]]:
    """Run the doctor, and return its verdict and what it printed."""

    def run(config: DoctorConfig = QUICK) -> tuple[bool, str]:
        file = io.StringIO()
        return run_doctor(config, Console(file=file)), file.getvalue()

    return run


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let these be all the backends."""

    def put(*backends: Backend) -> None:
        monkeypatch.setattr(ops, "BACKENDS", these := {backend.name: backend for backend in backends})
        monkeypatch.setattr(doctor, "BACKENDS", these)
        monkeypatch.setattr(selftest, "BACKENDS", these)

    return put


def backend(name: str, wkv7: Any = chunked7.wkv7, reason: str | None = None) -> Backend:
    return replace(BACKENDS["torch"], name=name, wkv7=wkv7, supports=lambda device, head_size: reason)


def half_decay(r: Tensor, w: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """A mistake in the last of its tokens alone."""
    w = torch.cat((w[:, :-1], w[:, -1:] + 0.05), 1)
    return chunked7.wkv7(r, w, *others)


def lost_gradient(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, iclr: Tensor, *others: Any) -> Any:
    return chunked7.wkv7(r, w, k, v, kk, iclr.detach() + 0 * iclr, *others)


def not_a_number(*inputs: Any) -> tuple[Tensor, Tensor]:
    y, final = chunked7.wkv7(*inputs)
    return y, final * math.nan


def does_not_compile(*inputs: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("Error building extension\n\nwkv7.cu(3): error: identifier is undefined\n1 error detected")


def refuses(*inputs: Any) -> tuple[Tensor, Tensor]:
    raise ConfigError("--op cuda: nvcc 11.0 is too old; install 12.4\nmore")


# --- the command


def test_the_command_on_this_machine() -> None:
    """As a user runs it, without Triton's interpreter; 15 seconds on an idle machine."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rwkv_peft", "doctor", "--seconds", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^\S.*$", done.stdout, re.MULTILINE)[0] == "Machine"
    assert "\x1b" not in done.stdout  # no colours in a pipe
    assert re.search(rf"^  torch +{re.escape(torch.__version__)}", done.stdout, re.MULTILINE)
    for version in (5, 6, 7):
        assert re.search(rf"^  RWKV-{version} +uses \w+, the fastest that runs here$", done.stdout, re.MULTILINE)
        assert re.search(rf"^  torch RWKV-{version} .*float32 OK \d", done.stdout, re.MULTILINE)
        assert re.search(rf"^  RWKV-{version} \w+ +[\d,]+ tokens/s", done.stdout, re.MULTILINE)
    assert "TFLOP/s" in done.stdout
    assert "GB/s" in done.stdout


@pytest.mark.parametrize(("right", "code"), [(True, 0), (False, 1)])
def test_the_exit_code(right: bool, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_peft.doctor.run_doctor", lambda config: right)
    assert main(["doctor"]) == code


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--device gpu", "--device gpu: unknown; allowed are auto"),
        ("--device cuda:99", "--device cuda:99: torch sees"),
        ("--seconds -1", "--seconds -1: must be from 0 to 3600"),
        ("--seconds soon", "--seconds soon: must be a finite number"),
    ],
)
def test_usage_errors(argv: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *argv.split()]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_colours_in_a_terminal() -> None:
    file = io.StringIO()
    assert run_doctor(QUICK, Console(file=file, force_terminal=True))
    assert "\x1b[32mOK" in file.getvalue()


# --- backends


def test_a_backend_that_is_right(only: Callable[..., None], report: Callable[..., tuple[bool, str]]) -> None:
    only(backend("good"), backend("absent", reason="nvcc is not installed; install CUDA"))
    right, text = report()
    assert right
    assert re.search(r"^  good +runs$", text, re.MULTILINE)
    assert re.search(r"^  absent +cannot run: nvcc is not installed; install CUDA$", text, re.MULTILINE)
    assert "absent RWKV" not in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (half_decay, r"float32 FAILED \([\w ]+ \d.\de-0[1-3], allowed 1e-04\)"),
        (lost_gradient, r"float32 FAILED \(gradient of iclr \d.\de\+?-?\d+, allowed 1e-04\)"),
        (not_a_number, r"float32 FAILED \(final state: NaN or Inf\)"),
        (does_not_compile, r"float32 FAILED \(RuntimeError: wkv7\.cu\(3\): error: identifier is undefined\)"),
        (refuses, r"float32 FAILED \(--op cuda: nvcc 11\.0 is too old; install 12\.4\)"),
    ],
)
def test_a_backend_that_is_wrong(
    wrong: Any, message: str, only: Callable[..., None], report: Callable[..., tuple[bool, str]]
) -> None:
    """Only the version that is wrong fails, and the line names a backend that is right."""
    only(backend("bad", wrong), backend("good"))
    right, text = report(DoctorConfig("cpu", seconds=0.01))
    assert not right
    assert re.search(rf"^  bad RWKV-7 +{message}; choose --op good$", text, re.MULTILINE)
    assert re.search(r"^  bad RWKV-6 +float32 OK", text, re.MULTILINE)
    assert text.count("FAILED") == 1
    assert "Traceback" not in text
    assert [line.split()[0] for line in text.splitlines() if "tokens/s" in line] == ["RWKV-5", "RWKV-6"]


def test_where_nothing_is_right(only: Callable[..., None], report: Callable[..., tuple[bool, str]]) -> None:
    only(backend("bad", not_a_number))
    right, text = report()
    assert not right
    assert "final state: NaN or Inf); no operator here is right: please report it" in text


@pytest.mark.parametrize("version", selftest.VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_of_every_output(version: int, dtype: torch.dtype) -> None:
    """The operators in plain PyTorch keep the limits in the 16 bits of a GPU too."""
    errors = selftest.errors_of("torch", version, dtype, CPU)
    assert len(errors) == len(selftest.INPUTS[version]) + 3
    assert min(errors.values()) > 0
    assert max(errors.values()) < selftest.LIMITS[dtype]


@pytest.mark.parametrize("version", selftest.VERSIONS)
def test_random_inputs_are_as_in_trained_models(version: int) -> None:
    inputs = dict(zip(selftest.INPUTS[version], selftest.random_inputs(version, 2, 30, 3, 64, CPU), strict=True))
    decay = torch.exp(-torch.exp(inputs["w"]))
    assert decay.min() < 0.6
    assert decay.max() > 0.99
    shapes = {name: tuple(x.shape) for name, x in inputs.items()}
    small = {5: {"w", "u"}, 6: {"u"}, 7: set()}[version]
    assert shapes == {name: (3, 64) if name in small else (2, 30, 3, 64) for name in inputs}
    if version == 7:
        torch.testing.assert_close(inputs["kk"].norm(dim=-1), torch.ones(2, 30, 3))
        assert 0 < inputs["iclr"].min() < inputs["iclr"].max() < 1


def test_relative_error() -> None:
    assert selftest.relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1
    assert selftest.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert selftest.relative_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf


def test_results_are_those_of_autograd() -> None:
    inputs = [x.double() for x in selftest.random_inputs(7, 1, 5, 1, 8, CPU)]
    dy = torch.ones(1, 5, 1, 8, dtype=torch.float64)
    y, final, *gradients = selftest.results(reference.wkv7, inputs, None, [dy])
    leaves = [x.requires_grad_() for x in inputs]
    want, want_final = reference.wkv7(*leaves)
    want.sum().backward()
    assert torch.equal(y, want)
    assert torch.equal(final, want_final)
    assert all(torch.equal(g, x.grad) for g, x in zip(gradients, leaves, strict=True) if x.grad is not None)


# --- machine and speed


def test_the_machine_is_told_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", {"absent": "no-such-package-anywhere"})
    monkeypatch.setattr(machine, "read", lambda path: "")
    monkeypatch.setenv("PATH", "")
    lines = dict(machine.describe(CPU))
    assert lines["absent"] == lines["driver"] == "not installed"
    assert torch.__version__ in lines["torch"]
    assert lines["memory"] == "not known on this system"
    assert "GiB free in " in lines["disk"]


def test_a_limit_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {32 * 2**20} kB",
        "/sys/fs/cgroup/memory.max": f"{8 * 2**30}\n",
    }
    monkeypatch.setattr(machine, "read", lambda path: files[path])
    assert machine.memory() == "64 GiB, 32 GiB free, 8 GiB for this container"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_a_driver_without_a_torch_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dict(machine.gpus(CPU)) == {"GPU": "none that torch sees"}
    monkeypatch.setattr(machine, "driver", lambda: "580.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "there is a driver: this torch is made without CUDA" in dict(machine.gpus(CPU))["GPU"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "the driver may be too old" in dict(machine.gpus(CPU))["GPU"]


def test_programs_that_are_missing_or_fail() -> None:
    assert machine.output("no-such-program-anywhere") == ""
    assert machine.output(sys.executable, "-c", "print(1); raise SystemExit(1)") == ""
    assert machine.output(sys.executable, "-c", "print(1)") == "1"


def test_seconds_per_call() -> None:
    took = speed.seconds_per_call(lambda: time.sleep(0.01), CPU, budget=0.1)
    assert 0.01 <= took < 0.03


def test_a_measurement_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(speed, "seconds_per_call", fails)
    lines = list(speed.speeds(CPU, [7], 1))
    assert [text for _, text in lines] == ["OutOfMemoryError: CUDA out of memory."] * 3
