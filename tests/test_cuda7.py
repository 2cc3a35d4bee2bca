"""RWKV-7 on tensor cores: the kernels' own source run on the CPU through cuda_emulation.h, and on a GPU its numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emulation import ORDERS, compiled, emulate, needs_compiler
from rwkv_peft.ops import cuda, reference
from rwkv_peft.ops.cuda import chunked7
from rwkv_peft.ops.cuda.build import find_nvcc
from rwkv_peft.ops.raw import Saved
from test_ops import make_inputs, make_state, results

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("chunked7", tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(chunked7, library, monkeypatch)


def rounded(B: int, T: int, H: int, dtype: torch.dtype, w: float | None = None) -> list[Tensor]:
    return [x.to(dtype) for x in make_inputs(B, T, H, 64, w=w)]


def errors(
    wkv: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    state: Tensor | None = None,
    bounds: list[int] | None = None,
) -> dict[str, float]:
    """Of every result and gradient against float64: the norm of the difference by the norm."""
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    got = results(wkv, inputs, None if state is None else state.float(), cu_seqlens)
    want = results(reference.wkv7, [x.double() for x in inputs], state, cu_seqlens)
    return {n: float((got[n].double() - want[n]).norm() / want[n].norm().clamp(min=1e-30)) for n in want}


def assert_close(found: dict[str, float], tolerance: float = TOLERANCE) -> None:
    assert max(found.values()) <= tolerance, found


@needs_compiler
def test_python_and_the_kernels_have_the_same_arguments(library: ctypes.CDLL) -> None:
    assert library.chunked7_size() == ctypes.sizeof(chunked7.Call)


@needs_compiler
@pytest.mark.usefixtures("emulated")
class TestEmulated:
    @pytest.mark.parametrize("T", [15, 64, 65, 130])
    @pytest.mark.parametrize("dtype", [BF16, FP16])
    def test_any_number_of_tokens(self, T: int, dtype: torch.dtype) -> None:
        assert_close(errors(chunked7.wkv7, rounded(2, T, 1, dtype), make_state(2, 1, 64)))

    def test_one_token(self) -> None:
        """Some sums then have one term, whose rounding is all that there is."""
        assert_close(errors(chunked7.wkv7, rounded(1, 1, 2, BF16), make_state(1, 2, 64)), 8e-3)

    @pytest.mark.parametrize("w", [-0.5, -4.0, -20.0])
    def test_strong_and_weak_decay(self, w: float) -> None:
        assert_close(errors(chunked7.wkv7, rounded(1, 128, 1, BF16, w=w), make_state(1, 1, 64)))

    @pytest.mark.parametrize("bounds", [[0, 1, 17, 80, 150], [0, 0, 64, 64, 149, 150, 150]])
    def test_documents(self, bounds: list[int]) -> None:
        S = len(bounds) - 1
        assert_close(errors(chunked7.wkv7, rounded(1, 150, 1, BF16), make_state(S, 1, 64), bounds))

    def test_more_chunks_in_the_table_than_there_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As if the offsets were on a GPU."""
        from rwkv_peft.ops import chunks

        table = chunks._on_device
        monkeypatch.setattr(chunked7, "table", lambda bounds, B, T, C, device: table(bounds, T, C))
        assert_close(errors(chunked7.wkv7, rounded(1, 130, 1, BF16), make_state(2, 1, 64), [0, 65, 130]))

    @pytest.mark.parametrize("order", ORDERS)
    def test_no_thread_goes_before_another_is_ready(self, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EMULATION_ORDER", str(order))
        inputs, state = rounded(1, 128, 1, BF16), make_state(1, 1, 64)
        got = results(chunked7.wkv7, inputs, state.float())
        monkeypatch.setenv("EMULATION_ORDER", "0")
        for name, x in results(chunked7.wkv7, inputs, state.float()).items():
            assert torch.equal(got[name], x), name

    @pytest.mark.parametrize("sequences", [1, 64, 192])
    def test_any_size_of_a_scans_block(self, sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """One, two or four warps, as if there were so many sequences."""
        parts = chunked7.parts(sequences)
        chunked7._known.cache_clear()
        monkeypatch.setattr(chunked7, "parts", lambda _: parts)
        assert_close(errors(chunked7.wkv7, rounded(1, 256, 1, BF16), make_state(1, 1, 64)))
        chunked7._known.cache_clear()

    @pytest.mark.parametrize("T", [64, 70])
    def test_a_second_backward(self, T: int) -> None:
        """The first one's gradients are changed in place, which may have the memory of what was saved."""
        inputs = [x.requires_grad_() for x in rounded(1, T, 1, BF16)]
        y, final = chunked7.wkv7(*inputs)
        total = y.float().square().sum() + final.sum()
        first = torch.autograd.grad(total, inputs, retain_graph=True)
        kept = [x.clone() for x in first]
        for x in first:
            x.fill_(float("nan"))
        for got, want in zip(torch.autograd.grad(total, inputs), kept, strict=True):
            assert torch.equal(got, want)

    @pytest.mark.parametrize("T", [64, 70])
    def test_gradients_added_to_others(self, T: int) -> None:
        inputs = rounded(1, T, 2, BF16)
        dy, *given = (x.clone() for x in inputs[:4])
        want, got = (
            chunked7.wkv7_backward(_saved(inputs), *(*inputs, dy, None, *others))
            for others in ((), [x.clone() for x in given])
        )
        for i, more in zip((0, 2, 3), given, strict=True):
            total = want[i].float() + more.float()
            assert float((got[i].float() - total).norm() / total.norm()) <= 4e-3
        for i in (1, 4, 5, 6):
            assert torch.equal(got[i], want[i])

    @pytest.mark.parametrize("w", [-3.0, -6.0])
    def test_one_token_over_and_over(self, w: float) -> None:
        """Large sums then cancel; inputs rounded to bf16 alone are 5% to 20% off."""
        r, _, k, v, _, iclr = (x[:, :1].expand(1, 128, 1, 64) for x in rounded(1, 128, 1, FP16))
        kk = torch.nn.functional.normalize(k.float(), dim=-1)
        inputs = [x.to(BF16).contiguous() for x in (r, torch.full_like(r, w), k, v, kk, torch.ones_like(iclr))]
        with torch.no_grad():
            y, _ = chunked7.wkv7(*inputs)
        want, _ = reference.wkv7(*(x.double() for x in inputs))
        assert float((y.double() - want).norm() / want.norm()) <= 0.03

    def test_without_a_backward_to_come(self) -> None:
        inputs = rounded(1, 130, 1, BF16)
        with torch.no_grad():
            y, final = chunked7.wkv7(*inputs)
        want = reference.wkv7(*(x.double() for x in inputs))
        for got, exact in zip((y, final), want, strict=True):
            assert float((got.double() - exact).norm() / exact.norm()) <= TOLERANCE


def _saved(inputs: list[Tensor]) -> Saved:
    saved = chunked7.wkv7_forward(*(*inputs, None, None, True))[2]  # type: ignore[arg-type]
    assert saved is not None
    return saved


# --- on a GPU


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(find_nvcc() is None, reason="no nvcc"),
]


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize(("B", "T", "H"), [(1, 512, 2), (2, 15, 2), (2, 65, 2), (35, 70, 4), (50, 64, 4)])
    @pytest.mark.parametrize("dtype", [BF16, FP16])
    def test_numbers(self, B: int, T: int, H: int, dtype: torch.dtype) -> None:
        """The scans' blocks have one warp, two and four."""
        assert_close(errors(on_gpu, rounded(B, T, H, dtype), make_state(B, H, 64)))

    @pytest.mark.parametrize("w", [-0.5, -20.0])
    def test_strong_and_weak_decay(self, w: float) -> None:
        assert_close(errors(on_gpu, rounded(1, 512, 2, BF16, w=w), make_state(1, 2, 64)))

    def test_documents_that_a_gpu_holds_the_offsets_of(self) -> None:
        bounds = [0, 0, 1, 17, 145, 145, 300, 300]
        assert_close(errors(on_gpu, rounded(1, 300, 2, BF16), make_state(len(bounds) - 1, 2, 64), bounds))


def on_gpu(*args: Tensor | None) -> tuple[Tensor, Tensor]:
    y, final = cuda.wkv7(*(None if x is None else x.cuda() for x in args))  # type: ignore[arg-type]
    return y.cpu(), final.cpu()
