"""Cross-entropy, logit penalty and their gradient in one kernel: a program a row of logits.

The row is read twice, the second time from the cache. Axes: n rows, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 4096  # that a program takes at a time
LOG2_E = tl.constexpr(1.4426950408889634)


def cross_entropy(
    logits: Tensor, labels: Tensor, logit_penalty: float, sums: Tensor | None, gradient: Tensor | None
) -> None:
    """As `cross_entropy` in ops/loss.py, for bf16, fp16 or fp32 logits; a label beyond V gives NaN."""
    n, V = logits.shape
    if n == 0:
        return
    assert gradient is None or gradient.is_contiguous()
    columns = min(MOST_COLUMNS, triton.next_power_of_2(V))
    warps = 8 if columns > 1024 else 2
    logits = logits.contiguous()
    rows_kernel[(n,)](
        logits, labels.contiguous(), sums, gradient, logit_penalty, V, sums is not None, gradient is not None, columns,
        num_warps=warps,
    )  # fmt: skip


@triton.jit
def rows_kernel(
    logits, labels, sums, gradient, penalty, V,
    HAS_SUMS: tl.constexpr, HAS_GRADIENT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`sums` (n,2) float32; `gradient` (n,V) may be `logits`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    label = tl.load(labels + row)
    counts = label >= 0
    columns = tl.arange(0, COLUMNS)

    largest, place = float("-inf"), 0
    total = tl.zeros((COLUMNS,), tl.float32)  # of exp(x - largest), by column
    for start in range(0, V, COLUMNS):
        x = tl.load(logits + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        here, index = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
        before = largest
        place = tl.where(here > before, start + index, place)
        largest = tl.maximum(here, before)
        total = total * tl.exp2((before - largest) * LOG2_E) + tl.exp2((x - largest) * LOG2_E)
    log2_sum = tl.log2(tl.sum(total, 0))

    if HAS_SUMS:
        at_label = tl.load(logits + label, mask=counts & (label < V), other=float("nan")).to(tl.float32)
        loss = largest - at_label + log2_sum / LOG2_E
        with_penalty = loss + penalty / 2 * largest * largest
        tl.store(sums + 2 * row, tl.where(counts, with_penalty, 0.0))
        tl.store(sums + 2 * row + 1, tl.where(counts, loss, 0.0))
    if HAS_GRADIENT:
        tl.debug_barrier()  # every thread has read the logit of the label before another writes over it
        gradient += row * V
        for start in range(0, V, COLUMNS):
            at = start + columns
            x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
            d = tl.exp2((x - largest) * LOG2_E - log2_sum)
            d = d - tl.where(at == label, 1.0, 0.0) + tl.where(at == place, penalty * largest, 0.0)
            tl.store(gradient + at, tl.where(counts, d, 0.0).to(gradient.dtype.element_ty), mask=at < V)
