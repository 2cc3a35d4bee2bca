"""Every Triton kernel that training launches compiles for an H100: its interpreter takes what its compiler refuses."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

OPERATOR = {"x070": {"local", "scan", "scan_back"}, "x060": {"scan", "output"}, "x052": {"scan", "output"}}
OPERATOR["x070a"] = OPERATOR["x070"]
COMMON = {"norm_mix_forward", "norm_mix_backward", "gradients", "rows_kernel", "adamw_kernel"}
COMMON |= {"dense_8_kernel", "dense_4_kernel", "fp8_rows_kernel", "turn_kernel", "embedding_kernel"}


@pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("version", OPERATOR)
def test_kernels_compile(version: str, precision: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), version, precision]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) >= COMMON | OPERATOR[version]
