"""The loss: its formula, its chunks, its gradients for every kind of head, and the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import difference
from rwkv_peft.adapters.lora import LoraLinear
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models import Rwkv
from rwkv_peft.ops import loss as module
from rwkv_peft.ops.loss import chunks_of, next_token_loss, plain_cross_entropy
from rwkv_peft.ops.matrix import Linear, dense_weight

on_gpu = torch.cuda.is_available()
device = "cuda" if on_gpu else "cpu"


def make_inputs(
    n: int = 13, D: int = 8, V: int = 29, dtype: torch.dtype = torch.float32, ignored: int = 0
) -> tuple[Tensor, nn.Linear, Tensor]:
    """Of the labels, every second is ignored, `ignored` times."""
    torch.manual_seed(5)
    head = nn.Linear(D, V, bias=False, dtype=dtype)
    hidden, labels = torch.randn(n, D, dtype=dtype, requires_grad=True), torch.randint(V, (n,))
    labels[: 2 * ignored : 2] = -100
    return hidden, head, labels


def by_formula(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, strength: float) -> list[Tensor]:
    """The loss with the penalty, and without, in plain operations; the largest logit is the first of equals."""
    total = loss = hidden.new_zeros(())
    for row, label in zip(head(hidden), labels.tolist(), strict=True):
        if label >= 0:
            loss = loss + torch.logsumexp(row, 0) - row[label]
            total = total + strength / 2 * row[int(row.argmax())] ** 2
    return [total + loss, loss]


def adapted_head(head: nn.Linear) -> nn.Module:
    layer = LoraLinear(head, AdapterConfig(rank=3))
    with torch.no_grad():
        for p in (layer.lora_A.weight, layer.lora_B.weight):
            p.normal_()
    return layer.requires_grad_(False)


def head_of(kind: str, head: nn.Linear) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]:
    """The head, and what trains of it."""
    if kind == "trained":
        return head, [head.weight]
    head.weight.requires_grad_(False)
    if kind == "frozen":
        return head, []
    if kind == "bias":
        other = nn.Linear(8, 29, dtype=head.weight.dtype)
        return other, [other.weight, other.bias]
    layer = adapted_head(head).to(head.weight.dtype)
    trained = [layer.lora_A.weight, layer.lora_B.weight]
    for p in trained:
        p.requires_grad_()
    return layer, trained


@pytest.mark.parametrize("strength", [0.0, 0.3])
@pytest.mark.parametrize("ignored", [0, 4])
@pytest.mark.parametrize("most", [1, 29 * 3, 29 * 12, 29 * 13], ids="chunk {}".format)
@pytest.mark.parametrize("kind", ["trained", "frozen", "bias", "lora"])
def test_loss_and_gradients_are_the_formulas(
    kind: str, most: int, ignored: int, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head, labels = make_inputs(dtype=torch.float64, ignored=ignored)
    called, trained = head_of(kind, head)
    assert (dense_weight(called) is None) == (kind in {"bias", "lora"})
    monkeypatch.setattr(module, "MOST_LOGITS", most)
    want, got = by_formula(hidden, called, labels, strength), next_token_loss(hidden, called, labels, strength)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    assert not got[1].requires_grad
    inputs = [hidden, *trained]
    for x, y in zip(torch.autograd.grad(got[0] * 0.7, inputs), torch.autograd.grad(want[0] * 0.7, inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, head, labels = make_inputs()
    total, _ = next_token_loss(hidden.detach(), head, labels, 0.1)
    total.backward()
    assert head.weight.grad is not None
    head.requires_grad_(False)
    assert not next_token_loss(hidden.detach(), head, labels, 0.1)[0].requires_grad
    with torch.no_grad():
        bare = next_token_loss(hidden, head.requires_grad_(), labels, 0.1)
    assert not bare[0].requires_grad
    torch.testing.assert_close(bare, next_token_loss(hidden, head, labels, 0.1))


def test_a_second_backward_pass_is_refused() -> None:
    hidden, head, labels = make_inputs()
    total, _ = next_token_loss(hidden, head, labels, 0.1)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has gone through a backward pass already"):
        total.backward()


@pytest.mark.parametrize("strength", [1e-4, 0.5])
def test_logit_penalty_pulls_only_the_largest_logit(strength: float) -> None:
    logits = torch.tensor([[1.0, 3.0, -2.0], [-5.0, -1.0, -4.0], [2.0, 2.0, -1.0], [7.0, 2.0, 6.5]], requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0])
    with_, without = (torch.autograd.grad(next_token_loss(logits, lambda x: x, labels, s)[0], logits)[0]
                      for s in (strength, 0.0))  # fmt: skip
    want = torch.zeros(4, 3)
    want[0, 1], want[1, 1], want[2, 0], want[3, 0] = 3 * strength, -strength, 2 * strength, 7 * strength
    torch.testing.assert_close(with_ - without, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["trained", "lora"])
def test_no_token_at_all_and_none_that_counts(kind: str) -> None:
    for n in (0, 6):
        hidden, head, labels = make_inputs(n)
        called, trained = head_of(kind, head)
        total, loss = next_token_loss(hidden, called, torch.full_like(labels, -100), 0.5)
        assert total.item() == loss.item() == 0
        total.backward()
        assert all(p.grad is not None and not p.grad.any() for p in (hidden, *trained))


@pytest.mark.parametrize(("n", "V"), [(0, 7), (1, 7), (300, 65536), (1025, 65536), (32768, 65536), (5, 2**30)])
def test_chunks_are_all_tokens_in_parts_that_are_not_too_large(n: int, V: int) -> None:
    chunks = chunks_of(n, V)
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(n))
    assert max(c.stop - c.start for c in chunks) <= max(1, module.MOST_LOGITS // V)
    assert len(chunks) == max(1, -(-n // max(1, module.MOST_LOGITS // V)))


def test_loss_of_bf16_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that trains is float32 in a bf16 model, and so is its gradient, over all chunks."""
    hidden, head, labels = make_inputs(n=3000)
    monkeypatch.setattr(module, "MOST_LOGITS", 29 * 128)
    rounded = hidden.detach().bfloat16().requires_grad_()
    total, loss = next_token_loss(rounded, head, labels, 0.0)
    assert total.dtype == loss.dtype == torch.float32
    logits = F.linear(rounded, head.weight.bfloat16())
    want = F.cross_entropy(logits.double(), labels, reduction="sum")
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    (total / 3000).backward()
    theirs = torch.autograd.grad(by_formula(hidden, head, labels, 0.0)[0] / 3000, [hidden, head.weight])
    assert rounded.grad is not None
    assert head.weight.grad is not None
    assert rounded.grad.dtype == torch.bfloat16
    assert head.weight.grad.dtype == torch.float32
    assert difference(rounded.grad, theirs[0]) < 0.02
    assert difference(head.weight.grad, theirs[1]) < 0.005


@pytest.mark.parametrize("version", ["x070", "x060"])
def test_the_head_of_a_model_is_a_plain_matrix(version: str, load: Callable[..., Rwkv]) -> None:
    """Else its loss would take the slower way without a word."""
    head = load(version=version).head
    assert dense_weight(head) is head.weight


def test_layers_that_are_not_plain_matrices() -> None:
    class Heir(Linear):
        """May have a `forward` of its own."""

    assert dense_weight(Linear(2, 2)) is not None
    assert dense_weight(Heir(2, 2)) is None
    assert dense_weight(nn.Linear(2, 2)) is None
    assert dense_weight(lambda x: x) is None
    hooked = nn.Linear(2, 2, bias=False)
    hooked.register_forward_hook(lambda *args: None)
    assert dense_weight(hooked) is None


# --- the kernel, on a GPU or in Triton's interpreter


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("V", [1, 257, 1000, 5000, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_is_the_formula(dtype: torch.dtype, V: int, strength: float) -> None:
    kernel: Any = pytest.importorskip("rwkv_peft.ops.triton.loss").cross_entropy
    torch.manual_seed(V)
    logits = (torch.randn(6, V, device=device) * 4).to(dtype)
    logits[1, [0, V // 2, V - 1]] = 20  # equals: the first counts
    logits[2, -1] = 30
    logits[3] -= 50
    labels = torch.tensor([0, V - 1, -100, V // 2, V - 1, -1], device=device)
    want, got = (logits.new_full((6, 2), float("nan"), dtype=torch.float32) for _ in range(2))
    d_want, d_got = (torch.full_like(logits, float("nan")) for _ in range(2))
    plain_cross_entropy(logits, labels, strength, want, d_want)
    kernel(logits, labels, strength, got, d_got)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(d_got, d_want, rtol=tolerance, atol=1e-6)
    alone = torch.full_like(got, float("nan"))
    kernel(logits, labels, strength, alone, None)
    assert torch.equal(alone, got)
    kernel(logits, labels, strength, None, logits)  # over itself
    assert torch.equal(logits, d_got)


def test_a_label_beyond_the_vocabulary_is_no_number() -> None:
    kernel: Any = pytest.importorskip("rwkv_peft.ops.triton.loss").cross_entropy
    sums = torch.empty(2, 2, device=device)
    kernel(torch.randn(2, 5, device=device), torch.tensor([4, 5], device=device), 0.0, sums, None)
    assert torch.isnan(sums).all(1).tolist() == [False, True]
