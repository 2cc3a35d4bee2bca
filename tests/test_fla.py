"""How the library flash-linear-attention is called, with the recurrence in the library's own terms in its place.

On a GPU that has the library, `test_gpu.py` compares the library itself.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_peft.ops import fla, reference
from test_ops import CPU, assert_same, cast, make_inputs, make_state, results

FLA = {5: fla.wkv5, 6: fla.wkv6, 7: fla.wkv7}
REFERENCE = {5: reference.wkv5, 6: reference.wkv6, 7: reference.wkv7}


def chunk_rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float, initial_state: Tensor | None,
    output_final_state: bool, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, lower_bound: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """States (S,H,key,value), w = log decay; S = diag(decay) S + b (aᵀ S) + k vᵀ, y = Sᵀ r."""
    assert output_final_state
    assert lower_bound <= float(w.detach().min())

    return theirs(recurrence7, (r * scale, w, k, v, a, b), initial_state, cu_seqlens)


def recurrence7(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, state, _ = args
    S, out = torch.zeros(1, 2, 64, 64) if state is None else state.mT, []
    for r, w, k, v, a, b in zip(*(x.unbind(1) for x in inputs), strict=True):  # each (1,H,N)
        read = torch.einsum("bhk,bhkv->bhv", a, S)
        S = S * w.exp()[..., None] + b[..., None] * read[:, :, None] + k[..., None] * v[:, :, None]
        out.append(torch.einsum("bhk,bhkv->bhv", r, S))
    return torch.stack(out, 1), S.mT


def chunk_rwkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, scale: float, initial_state: Tensor | None,
    output_final_state: bool, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert scale == 1.0
    assert output_final_state
    return theirs(reference.wkv6, (r, torch.log(-w), k, v, u), initial_state, cu_seqlens)


def theirs(
    wkv: Any, inputs: tuple[Tensor, ...], state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`wkv`, which knows states as we do, of each document by itself."""
    if cu_seqlens is None:
        y, final = wkv(*inputs, None if state is None else state.mT, None)
        return y, final.mT
    outputs, finals = [], []
    for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        assert start < end, "the library knows no empty documents"
        part = tuple(x[:, start:end] if x.ndim == 4 else x for x in inputs)
        y, final = theirs(wkv, part, None if state is None else state[i : i + 1], None)
        outputs.append(y)
        finals.append(final)
    return torch.cat(outputs, 1), torch.cat(finals)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(chunk_rwkv6=chunk_rwkv6, chunk_rwkv7=chunk_rwkv7)
    monkeypatch.setattr(fla, "optional", lambda module, needed_by: package)


@pytest.mark.parametrize("bounds", [None, [0, 5, 20], [0, 0, 5, 5, 20, 20]], ids=str)
@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("version", FLA)
def test_inputs_states_and_documents_are_mapped(version: int, has_state: bool, bounds: list[int] | None) -> None:
    inputs = cast(make_inputs(1, 20, 2, 64, version=version), torch.float32)
    documents = 1 if bounds is None else len(bounds) - 1
    state = make_state(documents, 2, 64).float() if has_state else None
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    got = results(FLA[version], inputs, state, cu_seqlens)
    want = results(REFERENCE[version], inputs, state, cu_seqlens)
    assert_same(got, want, 1e-5)


def test_it_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fla.supports(CPU, 64) == "needs a GPU, and the model is on cpu"
    monkeypatch.setattr(fla, "find_spec", lambda name: None)
    assert fla.supports(torch.device("cuda"), 64) == (
        "the package flash-linear-attention is not installed; pip install flash-linear-attention"
    )
    monkeypatch.setattr(fla, "find_spec", lambda name: name)
    assert fla.supports(torch.device("cuda"), 32) == "knows heads of 64 and 128, not of 32"
