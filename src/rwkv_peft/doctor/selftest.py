"""Every backend that runs here against the recurrence in float64.

Axes: B rows, T tokens, H heads, N head size, S documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RwkvPeftError
from ..ops import BACKENDS, Wkv, reference

VERSIONS = (5, 6, 7)
HEAD_SIZE = 64
INPUTS = {
    5: ("r", "w", "k", "v", "u"),
    6: ("r", "w", "k", "v", "u"),
    7: ("r", "w", "k", "v", "kk", "iclr"),
}
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 6e-3, torch.float16: 6e-3}
LOOSE = {("fla", torch.float32): 6e-3}  # its products of float32 are those of tf32
# two rows, and one row of documents of which one is empty and one a single token
CASES: tuple[tuple[int, int, list[int] | None], ...] = ((2, 50, None), (1, 100, [0, 37, 37, 38, 100]))


@dataclass(frozen=True)
class Check:
    """A backend's result for one version in one number format."""

    backend: str
    version: int
    dtype: torch.dtype
    error: float
    """The largest relative L2 error of an output or gradient; infinite for NaN, and where nothing came out."""
    where: str
    """Of what; or why nothing came out."""

    @property
    def limit(self) -> float:
        """The largest error that is right."""
        return LOOSE.get((self.backend, self.dtype), LIMITS[self.dtype])

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    def verdict(self) -> str:
        """For people."""
        number = name_of(self.dtype)
        if self.passed:
            return f"{number} OK {self.error:.1e}"
        if math.isinf(self.error):
            return f"{number} FAILED ({self.where})"
        return f"{number} FAILED ({self.where} {self.error:.1e}, allowed {self.limit:.0e})"


def name_of(dtype: torch.dtype) -> str:
    """For people."""
    return str(dtype).removeprefix("torch.")


def half_precision(device: torch.device) -> torch.dtype:
    """The 16 bits that a GPU can use."""
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def wkv_of(name: str, version: int) -> Wkv:
    """The operator of a version on the backend called `name`."""
    wkv: Wkv = getattr(BACKENDS[name], f"wkv{version}")
    return wkv


def random_inputs(version: int, B: int, T: int, H: int, N: int, device: torch.device, seed: int = 0) -> list[Tensor]:
    """An operator's inputs in float32, spread as in trained models: decays from hardly any to the strongest.

    Each is (B,T,H,N), except u of versions 5 and 6 and w of version 5, which are (H,N).
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    w0 = torch.linspace(-6.0, 1.0, N, device=device).expand(H, N)
    r, k, v = normal(B, T, H, N), normal(B, T, H, N), normal(B, T, H, N)
    if version == 5:
        return [r, w0 - 1, k, v, normal(H, N)]
    raw_w = w0 + 0.5 * normal(B, T, H, N)
    if version == 6:
        return [r, raw_w - 1, k, v, normal(H, N)]
    kk, iclr = F.normalize(normal(B, T, H, N), dim=-1), torch.sigmoid(normal(B, T, H, N))
    return [r, -F.softplus(-raw_w) - 0.5, k * (0.5 + 0.5 * iclr), v, kk, iclr]


def results(
    wkv: Wkv, inputs: Sequence[Tensor], state: Tensor | None, upstream: Sequence[Tensor], bounds: Tensor | None = None
) -> list[Tensor]:
    """y, the final state, and the gradients of the inputs and of the state, given those of y and the final state.

    With one tensor in `upstream`, the final state is not used.
    """
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    initial = None if state is None else state.detach().clone().requires_grad_()
    outputs = wkv(*leaves, initial, bounds)
    used = [y for y, _ in zip(outputs, upstream, strict=False)]
    asked = leaves if initial is None else [*leaves, initial]
    gradients = torch.autograd.grad(used, asked, [d.to(y.dtype) for d, y in zip(upstream, used, strict=True)])
    return [*(y.detach() for y in outputs), *gradients]


def relative_error(got: Tensor, want: Tensor) -> float:
    """The norm of the difference by the norm of what is wanted; infinite if it is no number."""
    difference, size = (x.double().norm().item() for x in (got.double() - want.double(), want))
    error = difference / size if size else difference
    return math.inf if math.isnan(error) else error


def check_backends(device: torch.device, tell: Callable[[str], None]) -> Iterator[Check]:
    """Test each backend that runs on `device` with each version; `tell` hears what comes next."""
    dtypes = [half_precision(device), torch.float32] if device.type == "cuda" else [torch.float32]
    for name, backend in BACKENDS.items():
        if backend.supports(device, HEAD_SIZE) is not None:
            continue
        for version in VERSIONS:
            for dtype in dtypes:
                tell(f"{name} with RWKV-{version} (what is used for the first time is compiled)")
                yield check(name, version, dtype, device)


def check(name: str, version: int, dtype: torch.dtype, device: torch.device) -> Check:
    """Test one backend. Whatever it raises is its result."""
    try:
        errors = errors_of(name, version, dtype, device)
    except Exception as error:  # a compiler's, a driver's, a library's: of any type
        return Check(name, version, dtype, math.inf, in_one_line(error))
    worst = max(errors, key=lambda where: errors[where])
    return Check(name, version, dtype, errors[worst], worst if errors[worst] < math.inf else f"{worst}: NaN or Inf")


def errors_of(name: str, version: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The relative error of every output and gradient."""
    outputs = ("y", "final state", *(f"gradient of {x}" for x in (*INPUTS[version], "the initial state")))
    errors = dict.fromkeys(outputs, 0.0)
    for B, T, offsets in CASES:
        H, N, S = 2, HEAD_SIZE, B if offsets is None else len(offsets) - 1
        generator = torch.Generator().manual_seed(1)
        state, dfinal, dy = (
            torch.randn(shape, generator=generator) for shape in ((S, H, N, N), (S, H, N, N), (B, T, H, N))
        )
        inputs = [x.to(dtype) for x in random_inputs(version, B, T, H, N, torch.device("cpu"))]
        dy = dy.to(dtype)
        bounds = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
        exact = [[x.double() for x in tensors] for tensors in (inputs, [state], [dy, dfinal])]
        want = results(getattr(reference, f"wkv{version}"), exact[0], exact[1][0], exact[2], bounds)
        here = [[x.to(device) for x in tensors] for tensors in (inputs, [state], [dy, dfinal])]
        got = results(wkv_of(name, version), here[0], here[1][0], here[2], bounds)
        for where, x, y in zip(outputs, got, want, strict=True):
            errors[where] = max(errors[where], relative_error(x.cpu(), y))
    return errors


def in_one_line(error: Exception) -> str:
    """What an error says, without the pages that compilers add."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["it says nothing"]
    if isinstance(error, RwkvPeftError):
        return lines[0]
    telling = next((line for line in lines if "error:" in line.lower()), lines[0])
    return f"{type(error).__name__}: {telling[:200]}"
