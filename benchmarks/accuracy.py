"""The largest errors of the operators: `python benchmarks/accuracy.py`.

For each backend, version and number format: the largest relative L2 error of y, the final state and every gradient, the
initial state's included, against the float64 recurrence on the same inputs, over lengths around the chunks' and long
ones, decays from the weakest to the strongest, and random documents of which some are empty. Memory that an operator
asks for is filled with NaN beforehand. One head of 64 in one row; inputs are random, spread as in trained models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from measure import arguments, describe, print_table, write_json
from rwkv_peft.doctor.selftest import HEAD_SIZE, INPUTS, VERSIONS, random_inputs, relative_error, results, wkv_of
from rwkv_peft.ops import BACKENDS, reference

LENGTHS = {"cuda": [1, 15, 16, 17, 300, 4095], "cpu": [1, 15, 16, 17, 300]}
DECAYS = {5: [-12.0, -1.0, 1.0, 4.0], 6: [-12.0, -1.0, 1.0, 4.0], 7: [-0.51, -2.0, -12.0]}  # w; RWKV-7's clamp is -0.5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = ["version", "backend", "dtype", "error", "of", "case"]


class Case(NamedTuple):
    """T tokens; with `decay` every w is that; with `bounds` they are documents."""

    name: str
    T: int
    decay: float | None = None
    bounds: list[int] | None = None


def cases_of(version: int, args: Any) -> Iterator[Case]:
    for _ in range(args.seeds):
        for T in args.lengths:
            yield Case(f"T = {T}", T)
        cuts = sorted(torch.randint(1, 1000, (7,)).tolist())
        yield Case("documents", 1000, bounds=[0, *cuts, cuts[-1], 1000])
    for w in DECAYS[version]:
        yield Case(f"w = {w}", 130, decay=w)


def errors(
    case: Case, version: int, backends: list[str], dtype: torch.dtype, seed: int, device: torch.device
) -> Iterator[dict[str, float]]:
    """For each backend that of every output and gradient, by name."""
    N = HEAD_SIZE
    inputs = [x.to(dtype) for x in random_inputs(version, 1, case.T, 1, N, device, seed)]
    if case.decay is not None:
        inputs[1] = torch.full_like(inputs[1], case.decay)
    bounds = None if case.bounds is None else torch.tensor(case.bounds, dtype=torch.int32)
    S = 1 if bounds is None else len(bounds) - 1
    state, dstate = (scale * torch.randn(S, 1, N, N, device=device) for scale in (0.3, 0.1))
    upstream = [torch.randn(1, case.T, 1, N, device=device).to(dtype), dstate]
    exact, exact_upstream = ([x.double() for x in xs] for xs in (inputs, upstream))
    want = results(getattr(reference, f"wkv{version}"), exact, state.double(), exact_upstream, bounds)
    names = ("y", "final state", *INPUTS[version], "initial state")
    for backend in backends:
        got = results(wkv_of(backend, version), inputs, state, upstream, bounds)
        yield {name: relative_error(x, y) for name, x, y in zip(names, got, want, strict=True)}


def measure(version: int, dtype: str, backends: list[str], device: torch.device, args: Any) -> list[dict[str, Any]]:
    """A row of the table for each backend."""
    rows: list[dict[str, Any]] = [{"version": version, "backend": b, "dtype": dtype, "error": 0.0} for b in backends]
    for seed, case in enumerate(cases_of(version, args)):
        for row, found in zip(rows, errors(case, version, backends, DTYPES[dtype], seed, device), strict=True):
            worst = max(found, key=lambda name: found[name])
            if found[worst] > row["error"]:
                row |= {"error": found[worst], "of": worst, "case": case.name}
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--versions", type=int, nargs="+", choices=VERSIONS, default=VERSIONS)
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), help="[our own that run here]")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="[cuda: bf16 fp32, cpu: fp32]")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="T")
    parser.add_argument("--seeds", type=int, default=2, help="how often lengths and documents are drawn")
    args = parser.parse_args()
    device, rows = torch.device(args.device), []
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    args.lengths = args.lengths or LENGTHS[device.type]
    own = [n for n, b in BACKENDS.items() if n not in ("reference", "fla") and b.supports(device, HEAD_SIZE) is None]
    print(f"Relative errors; lengths {args.lengths}; {describe(device)}", flush=True)
    for version in args.versions:
        for dtype in args.dtypes or (["bf16", "fp32"] if device.type == "cuda" else ["fp32"]):
            rows += measure(version, dtype, args.backends or own, device, args)
            print(rows[-1], flush=True)
    print_table([row | {"error": f"{row['error']:.1e}"} for row in rows], COLUMNS)
    write_json(args.json, device, rows)


if __name__ == "__main__":
    main()
