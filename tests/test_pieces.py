"""The pieces between the matrix products: Triton's kernels, in its interpreter, against the plain formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import difference
from rwkv_peft.models.layers import Documents
from rwkv_peft.ops import pieces
from rwkv_peft.ops.pieces import GroupNorm, LayerNorm

pytest.importorskip("triton")
from rwkv_peft.ops.triton import activations, gated, mix

Layout = tuple[int, int, list[int] | None]

# where torch sees no GPU, conftest.py has Triton interpret the kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = 1e-5  # relative error of float32
ROUNDED = 2**-7 if DEVICE == "cuda" else 2**-6  # of two roundings to bf16; the interpreter cuts off instead
# rows, tokens, offsets of the documents in the only row
LAYOUTS: dict[str, Layout] = {
    "one token": (1, 1, None),
    "rows of one token": (3, 1, None),
    "rows": (3, 7, None),
    "documents": (1, 19, [0, 1, 9, 19]),
    "empty documents": (1, 11, [0, 0, 4, 4, 4, 11, 11]),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
widths = pytest.mark.parametrize("D", [64, 80])


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that each walks over several tokens; and the kernels, not the plain formulas, must be what runs."""
    assert activations.fits(torch.zeros(1, device=DEVICE))
    torch.manual_seed(0)
    monkeypatch.setattr(mix, "PROGRAMS", 4)
    monkeypatch.setattr(mix, "SUMMING", 3)
    monkeypatch.setattr(mix, "COLUMNS", 32)
    monkeypatch.setattr(gated, "PROGRAMS", 3)
    monkeypatch.setattr(gated, "ELEMENTS", 64)
    monkeypatch.setattr(activations, "ELEMENTS", 64)


def documents_of(layout: Layout) -> Documents:
    B, T, offsets = layout
    tokens = torch.zeros(B, T, dtype=torch.long, device=DEVICE)
    return Documents(tokens, None if offsets is None else torch.tensor(offsets))


def leaf(*shape: int, dtype: torch.dtype = torch.float32, trains: bool = True) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype).requires_grad_(trains)


def norm_of(kind: Callable[..., nn.Module], *sizes: int, trains: bool = True) -> nn.Module:
    norm = kind(*sizes).to(DEVICE)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
        parameter.requires_grad_(trains)
    return norm


def outputs(result: Any) -> list[Tensor]:
    """All tensors of a piece's result, in order."""
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in outputs(part)]


def in_double(x: Any) -> Any:
    """A copy in float64 of what a piece takes: tensors that train stay leaves that train."""
    if isinstance(x, Tensor):
        return x.detach().double().requires_grad_(x.requires_grad)
    if isinstance(x, LayerNorm | GroupNorm):
        sizes = (x.num_groups, x.num_channels) if isinstance(x, GroupNorm) else x.normalized_shape
        norm = type(x)(*sizes, eps=x.eps).to(DEVICE).double()
        norm.load_state_dict({name: p.double() for name, p in x.named_parameters()})
        for own, given in zip(norm.parameters(), x.parameters(), strict=True):
            own.requires_grad_(given.requires_grad)
        return norm
    return [in_double(part) for part in x] if isinstance(x, list) else x


def leaves(x: Any) -> list[Tensor]:
    """The tensors that train among what a piece takes."""
    if isinstance(x, Tensor):
        return [x] if x.requires_grad else []
    parts = x.parameters() if isinstance(x, nn.Module) else x if isinstance(x, list) else []
    return [tensor for part in parts for tensor in leaves(part)]


def run(piece: Callable[..., Any], arguments: Sequence[Any], unused: Sequence[int] = ()) -> tuple[list[Tensor], ...]:
    """Outputs and gradients of a piece; `unused` outputs have no part in the loss."""
    made, trained = outputs(piece(*arguments)), [x for argument in arguments for x in leaves(argument)]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16().to(y) for y in made]
    used = [i for i, y in enumerate(made) if i not in unused and y.requires_grad]
    gradients = torch.autograd.grad([made[i] for i in used], trained, [weights[i] for i in used], allow_unused=True)
    return made, [torch.zeros_like(x) if g is None else g for x, g in zip(trained, gradients, strict=True)]


def check(fused: Callable[..., Any], plain: Callable[..., Any], arguments: Sequence[Any], **how: Any) -> None:
    """Every output and gradient of `fused` is that of `plain` in float64, and has its own input's dtype."""
    want = run(plain, [in_double(argument) for argument in arguments], **how)
    got = run(fused, arguments, **how)
    trained = [x for argument in arguments for x in leaves(argument)]
    assert [g.dtype for g in got[1]] == [x.dtype for x in trained]
    exact = all(y.dtype == torch.float32 for y in got[0])
    for have, expected in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert have.shape == expected.shape
        if expected.any():
            assert difference(have, expected) <= (EXACT if exact else ROUNDED)
        else:
            assert not have.any()


# --- LayerNorm, shift and mixes


def norm_mix_arguments(
    layout: Layout,
    D: int,
    added: bool = True,
    dtype: torch.dtype = torch.float32,
    trains: bool = True,
) -> list[Any]:
    documents, (B, T, _) = documents_of(layout), layout
    vectors = [leaf(1, 1, D, trains=trains), None, leaf(D, trains=trains), leaf(D, trains=trains)]
    return [
        leaf(B, T, D, dtype=dtype),
        leaf(B, T, D, dtype=dtype) if added else None,
        norm_of(LayerNorm, D, trains=trains),
        leaf(documents.count, D, dtype=dtype, trains=trains),
        documents,
        vectors,
    ]


@layouts
@widths
@pytest.mark.parametrize("added", [False, True])
def test_norm_mix(layout: Layout, D: int, added: bool) -> None:
    check(mix.norm_mix, pieces.norm_mix, norm_mix_arguments(layout, D, added))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_mix_in_half_precision(dtype: torch.dtype) -> None:
    check(mix.norm_mix, pieces.norm_mix, norm_mix_arguments(LAYOUTS["documents"], 48, dtype=dtype))


@layouts
def test_norm_mix_with_frozen_vectors(layout: Layout) -> None:
    check(mix.norm_mix, pieces.norm_mix, norm_mix_arguments(layout, 48, trains=False))


@pytest.mark.parametrize("unused", [[0], [1], [3], [5], [0, 1, 2, 4], [1, 2, 3, 4]])
@pytest.mark.parametrize("layout", ["rows", "empty documents"])
def test_norm_mix_with_unused_outputs(layout: str, unused: list[int]) -> None:
    check(mix.norm_mix, pieces.norm_mix, norm_mix_arguments(LAYOUTS[layout], 48), unused=unused)


def test_norm_mix_of_six() -> None:
    arguments = norm_mix_arguments(LAYOUTS["rows"], 48)
    arguments[-1] = [leaf(48) for _ in range(6)]
    check(mix.norm_mix, pieces.norm_mix, arguments)


def test_norm_mix_where_some_vectors_train() -> None:
    arguments = norm_mix_arguments(LAYOUTS["rows"], 48)
    arguments[-1][2].requires_grad_(False)
    arguments[2].bias.requires_grad_(False)
    check(mix.norm_mix, pieces.norm_mix, arguments)


def test_sum_is_the_input_where_nothing_is_added() -> None:
    arguments = norm_mix_arguments(LAYOUTS["rows"], 48, added=False)
    total, *_ = mix.norm_mix(*arguments)
    assert total.data_ptr() == arguments[0].data_ptr()


class Louder(LayerNorm):
    """A norm that is more than its weight and bias say."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_wrapped_norms_are_called() -> None:
    arguments = norm_mix_arguments(LAYOUTS["rows"], 48)
    arguments[2] = norm_of(Louder, 48)
    _, (mixed, *_), _ = mix.norm_mix(*arguments)
    assert torch.equal(mixed, pieces.norm_mix(*arguments)[1][0])


# --- RWKV-6's further mixes


def mix_more_arguments(layout: Layout, D: int, dtype: torch.dtype, trains: bool) -> list[Any]:
    documents, (B, T, _) = documents_of(layout), layout
    return [
        leaf(B, T, D, dtype=dtype),
        leaf(documents.count, D, dtype=dtype, trains=trains),
        documents,
        [leaf(1, 1, D, trains=trains) for _ in range(5)],
        leaf(5, B, T, D, dtype=dtype),
    ]


@layouts
@widths
@pytest.mark.parametrize("trains", [False, True])
def test_mix_more(layout: Layout, D: int, trains: bool) -> None:
    check(mix.mix_more, pieces.mix_more, mix_more_arguments(layout, D, torch.float32, trains))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mix_more_in_half_precision(dtype: torch.dtype) -> None:
    check(mix.mix_more, pieces.mix_more, mix_more_arguments(LAYOUTS["documents"], 48, dtype, True))


def test_mix_more_with_unused_outputs() -> None:
    check(mix.mix_more, pieces.mix_more, mix_more_arguments(LAYOUTS["rows"], 48, torch.float32, True), unused=[1, 4])


# --- gates and the squared ReLU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "size", "B", "T"), [(2, 32, 2, 9), (3, 24, 2, 5), (1, 64, 1, 1)])
@pytest.mark.parametrize("trains", [False, True])
def test_gated_output(heads: int, size: int, B: int, T: int, dtype: torch.dtype, trains: bool) -> None:
    y, gate = (leaf(B, T, heads * size, dtype=dtype) for _ in range(2))
    ln_x = norm_of(lambda: GroupNorm(heads, heads * size, eps=64e-5), trains=trains)
    check(gated.gated_output, pieces.gated_output, [y, gate, ln_x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 9, 48)])
def test_activations(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(activations.relu2, pieces.relu2, [leaf(*shape, dtype=dtype)])
    check(activations.gated, pieces.gated, [leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype)])


def test_relu2_keeps_what_is_no_number() -> None:
    assert activations.relu2(torch.tensor([torch.nan, -torch.inf, torch.inf], device=DEVICE)).isnan().tolist() == [
        True,
        False,
        False,
    ]


def test_others_than_contiguous_inputs() -> None:
    x, v = leaf(9, 48), leaf(48, 9)
    check(lambda x, v: activations.gated(x.T, v), lambda x, v: pieces.gated(x.T, v), [x, v])


@pytest.mark.parametrize("piece", ["norm_mix", "mix_more", "gated_output", "gated", "relu2"])
def test_float64_takes_the_plain_formula(piece: str) -> None:
    made = {
        "norm_mix": (mix, norm_mix_arguments(LAYOUTS["rows"], 48)),
        "mix_more": (mix, mix_more_arguments(LAYOUTS["rows"], 48, torch.float32, True)),
        "gated_output": (gated, [leaf(1, 2, 64), leaf(1, 2, 64), norm_of(GroupNorm, 2, 64)]),
        "gated": (activations, [leaf(3), leaf(3)]),
        "relu2": (activations, [leaf(3)]),
    }
    room, arguments = made[piece]
    arguments = [in_double(argument) for argument in arguments]
    got, want = (outputs(getattr(where, piece)(*arguments)) for where in (room, pieces))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


# --- where documents begin and end


def test_marks_of_rows() -> None:
    documents = documents_of((2, 3, None))
    assert documents.starts.tolist() == [0, -1, -1, 1, -1, -1]
    assert documents.ends.tolist() == [-1, -1, 0, -1, -1, 1]


def test_marks_of_documents() -> None:
    documents = documents_of((1, 5, [0, 0, 2, 2, 3, 5, 5]))
    assert documents.starts.tolist() == [1, -1, 3, 4, -1]
    assert documents.ends.tolist() == [-1, 1, 3, -1, 4]
    assert documents.starts.dtype == documents.ends.dtype == torch.int32
