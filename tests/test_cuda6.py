"""RWKV-6 and RWKV-5 on tensor cores: the kernels' own source run on the CPU, and on a GPU its numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emulation import ORDERS, compiled, emulate, needs_compiler
from rwkv_peft.ops import cuda, reference
from rwkv_peft.ops.cuda import chunked6
from rwkv_peft.ops.cuda.build import find_nvcc
from test_ops import make_inputs, make_state, results

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = 5e-3
REFERENCE = {5: reference.wkv5, 6: reference.wkv6}
CHUNKED = {5: chunked6.wkv5, 6: chunked6.wkv6}

versions = pytest.mark.parametrize("version", [5, 6])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("chunked6", tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(chunked6, library, monkeypatch)


def rounded(
    version: int, B: int, T: int, H: int, dtype: torch.dtype, w: float | None = None, w_dtype: torch.dtype = FP32
) -> list[Tensor]:
    """r, w, k, v, u; w, and u as models hand it, of a dtype of their own."""
    inputs = make_inputs(B, T, H, 64, w=w, version=version)
    return [x.to(w_dtype if i == 1 else FP32 if i == 4 else dtype) for i, x in enumerate(inputs)]


def errors(
    version: int,
    inputs: list[Tensor],
    state: Tensor | None = None,
    bounds: list[int] | None = None,
    wkv: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> dict[str, float]:
    """Of every result and gradient against float64: the norm of the difference by the norm."""
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    got = results(wkv or CHUNKED[version], inputs, None if state is None else state.float(), cu_seqlens)
    want = results(REFERENCE[version], [x.double() for x in inputs], state, cu_seqlens)
    return {n: relative(got[n], want[n]) for n in want}


def relative(got: Tensor, want: Tensor) -> float:
    error, size = float((got.double() - want).norm()), float(want.norm())
    return error / size if size else error


def assert_close(found: dict[str, float], tolerance: float = TOLERANCE) -> None:
    assert all(x <= tolerance for x in found.values()), found


@needs_compiler
def test_python_and_the_kernels_have_the_same_arguments(library: ctypes.CDLL) -> None:
    assert library.chunked6_size() == ctypes.sizeof(chunked6.Call)


@needs_compiler
@pytest.mark.usefixtures("emulated")
class TestEmulated:
    @versions
    @pytest.mark.parametrize("T", [1, 15, 16, 17, 64, 65, 130])
    def test_any_number_of_tokens(self, version: int, T: int) -> None:
        assert_close(errors(version, rounded(version, 2, T, 1, BF16), make_state(2, 1, 64)))

    @versions
    @pytest.mark.parametrize("dtype", [BF16, FP16])
    @pytest.mark.parametrize("w_dtype", [BF16, FP16])
    def test_dtypes(self, version: int, dtype: torch.dtype, w_dtype: torch.dtype) -> None:
        assert_close(errors(version, rounded(version, 1, 80, 2, dtype, w_dtype=w_dtype), make_state(1, 2, 64)))

    @versions
    @pytest.mark.parametrize("w", [-20.0, -6.0, -0.5, 3.0, 4.0, 30.0])
    def test_one_decay_for_all(self, version: int, w: float) -> None:
        """From w = 20 on a decay is 0, and so is the gradient of w; at 4, 2e-24, it is compared by its own size."""
        assert_close(errors(version, rounded(version, 1, 128, 1, BF16, w=w), make_state(1, 1, 64)))

    def test_both_extremes_of_decay_in_turn(self) -> None:
        """A decay of 0 beside decays of 1 takes nothing from sums over other tokens."""
        inputs = rounded(6, 1, 150, 1, BF16)
        inputs[1] = torch.where(torch.rand_like(inputs[1]) < 0.1, 25.0, -8.0)
        assert_close(errors(6, inputs, make_state(1, 1, 64)))

    @versions
    @pytest.mark.parametrize("bounds", [[0, 1, 17, 80, 150], [0, 0, 64, 64, 149, 150, 150]])
    def test_documents(self, version: int, bounds: list[int]) -> None:
        state = make_state(len(bounds) - 1, 1, 64)
        assert_close(errors(version, rounded(version, 1, 150, 1, BF16), state, bounds))

    @versions
    def test_more_chunks_in_the_table_than_there_are(self, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """As if the offsets were on a GPU."""
        from rwkv_peft.ops import chunks

        table = chunks._on_device
        monkeypatch.setattr(chunked6, "table", lambda bounds, B, T, C, device: table(bounds, T, C))
        assert_close(errors(version, rounded(version, 1, 130, 1, BF16), make_state(2, 1, 64), [0, 65, 130]))

    @versions
    @pytest.mark.parametrize("order", ORDERS)
    def test_no_thread_goes_before_another_is_ready(
        self, version: int, order: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EMULATION_ORDER", str(order))
        inputs, state = rounded(version, 1, 128, 1, BF16), make_state(1, 1, 64)
        got = results(CHUNKED[version], inputs, state.float())
        monkeypatch.setenv("EMULATION_ORDER", "0")
        for name, x in results(CHUNKED[version], inputs, state.float()).items():
            assert torch.equal(got[name], x), name

    @pytest.mark.parametrize("parts", [2, 4])
    def test_any_size_of_a_scans_block(self, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two or four warps, as if there were many sequences."""
        call = chunked6._call

        def with_parts(*args: object) -> chunked6.Call:
            made = call(*args)  # type: ignore[arg-type]
            made.parts = parts
            return made

        monkeypatch.setattr(chunked6, "_call", with_parts)
        assert_close(errors(6, rounded(6, 1, 300, 1, BF16), make_state(1, 1, 64)))

    @versions
    @pytest.mark.parametrize("T", [64, 70])
    def test_a_second_backward(self, version: int, T: int) -> None:
        """The first one's gradients are changed in place, which may have the memory of what was saved."""
        inputs = [x.requires_grad_() for x in rounded(version, 1, T, 1, BF16)]
        y, final = CHUNKED[version](*inputs)
        total = y.float().square().sum() + final.sum()
        first = torch.autograd.grad(total, inputs, retain_graph=True)
        kept = [x.clone() for x in first]
        for x in first:
            x.fill_(float("nan"))
        for got, want in zip(torch.autograd.grad(total, inputs), kept, strict=True):
            assert torch.equal(got, want)

    @versions
    def test_the_backend_takes_them_for_more_than_a_token_of_16_bits(
        self, version: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cuda, "has_tensor_cores", lambda device, head_size: True)
        inputs = rounded(version, 1, 20, 1, BF16)
        y, final = {5: cuda.wkv5, 6: cuda.wkv6}[version](*inputs)
        for got, want in zip((y, final), CHUNKED[version](*inputs), strict=True):
            assert torch.equal(got, want)
        for others in (rounded(version, 1, 1, 1, BF16), rounded(version, 1, 20, 1, FP32)):
            assert not cuda._on_tensor_cores(version, tuple(others))

    @versions
    def test_without_a_state_and_with_one_gradient_of_two(self, version: int) -> None:
        inputs = rounded(version, 1, 70, 1, BF16)
        assert_close(errors(version, inputs))
        for i in range(2):
            leaves, exact = ([x.clone().requires_grad_() for x in xs] for xs in (inputs, [x.double() for x in inputs]))
            CHUNKED[version](*leaves)[i].float().square().sum().backward()
            REFERENCE[version](*exact)[i].square().sum().backward()
            for got, want in zip(leaves, exact, strict=True):
                assert relative(*(x.grad if x.grad is not None else torch.zeros(1) for x in (got, want))) <= 1e-2


# --- on a GPU

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(find_nvcc() is None, reason="no nvcc"),
]


@versions
class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize(("B", "T", "H"), [(1, 512, 2), (2, 15, 2), (2, 65, 2), (35, 70, 4), (50, 64, 4)])
    @pytest.mark.parametrize("dtype", [BF16, FP16])
    def test_numbers(self, version: int, B: int, T: int, H: int, dtype: torch.dtype) -> None:
        """The scans' blocks have one warp, two and four."""
        assert_close(errors(version, rounded(version, B, T, H, dtype), make_state(B, H, 64), wkv=on_gpu(version)))

    @pytest.mark.parametrize("w", [-20.0, 4.0, 30.0])
    def test_strong_and_weak_decay(self, version: int, w: float) -> None:
        assert_close(errors(version, rounded(version, 1, 512, 2, BF16, w), make_state(1, 2, 64), wkv=on_gpu(version)))

    def test_documents_that_a_gpu_holds_the_offsets_of(self, version: int) -> None:
        bounds = [0, 0, 1, 17, 145, 145, 300, 300]
        inputs, state = rounded(version, 1, 300, 2, BF16), make_state(len(bounds) - 1, 2, 64)
        assert_close(errors(version, inputs, state, bounds, on_gpu(version)))


def on_gpu(version: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def call(*args: Tensor | None) -> tuple[Tensor, Tensor]:
        wkv = {5: cuda.wkv5, 6: cuda.wkv6}[version]
        y, final = wkv(*(None if x is None else x.cuda() for x in args))  # type: ignore[arg-type]
        return y.cpu(), final.cpu()

    return call
