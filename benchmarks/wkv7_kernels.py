# ruff: noqa: E501
"""python benchmarks/wkv7_kernels.py [accuracy|times|variants|graph|alike].

accuracy and times at the shapes of docs/performance.md. alike: one token over and over (y against float64, beside what rounding the inputs does).
graph: forward + backward captured in a CUDA graph, replayed, compared bit by bit and timed. variants: each -D of chunked7.cuh.
"""

import sys
import time

import torch
import torch.nn.functional as F

from rwkv_peft.ops import reference
from rwkv_peft.ops.cuda import build, library
from rwkv_peft.ops.cuda import chunked7 as m

dev = "cuda"
torch.manual_seed(0)
SHAPES = [(8, 4096, 32), (1, 1024, 12), (8, 1024, 32), (2, 4096, 64), (4, 4096, 40), (1, 16384, 40)]
NAMES = ["y", "fin", "dr", "dw", "dk", "dv", "dkk", "dic", "dst"]


def rnd(B, T, H, dt=torch.bfloat16, w0=(-6, 1)):
    def rn():
        return torch.randn(B, T, H, 64, device=dev)

    w = -F.softplus(-(torch.linspace(*w0, 64, device=dev) + 0.5 * rn())) - 0.5
    return [x.to(dt) for x in (rn() * 0.5, w, rn() * 0.5, rn() * 0.5, F.normalize(rn(), dim=-1), torch.sigmoid(rn()))]


def results(f, ins, st, cu, dy, df, twice=False):
    ins = [x.clone().requires_grad_() for x in ins]
    st = st.clone().requires_grad_()
    y, fs = f(*ins, st, cu)
    total = (y * dy.to(y.dtype)).sum() + (fs * df.to(fs.dtype)).sum()
    if twice:
        for g in torch.autograd.grad(total, [*ins, st], retain_graph=True):
            g.fill_(float("nan"))
    return [y.detach(), fs.detach(), *torch.autograd.grad(total, [*ins, st])]


def accuracy(B, T, H, dt=torch.bfloat16, w0=(-6, 1), cu=None, on_gpu=False, twice=False):
    ins, S = rnd(B, T, H, dt, w0), B if cu is None else len(cu) - 1
    st, df = (torch.randn(S, H, 64, 64, device=dev) * s for s in (0.3, 0.1))
    dy, c = torch.randn(B, T, H, 64, device=dev).to(dt), None if cu is None else torch.tensor(cu)
    got = results(m.wkv7, ins, st, c.to(dev) if on_gpu else c, dy, df, twice)
    want = results(reference.wkv7, [x.double() for x in ins], st.double(), c, dy, df)
    e = [float((a.double() - b).norm() / b.norm()) * 1e3 for a, b in zip(got, want, strict=False)]
    ok = "ok " if max(e) <= (5.5 if T > 1 else 7) else "BAD"
    print(
        ok,
        B,
        T,
        H,
        str(dt)[6:],
        w0,
        cu,
        " ".join(f"{n}={x:.2f}" for n, x in zip(NAMES, e, strict=False)),
        "(1e-3)",
        flush=True,
    )


def added():
    ins = rnd(1, 192, 2)
    given = [torch.randn_like(ins[0]) for _ in range(3)]
    dy = torch.randn_like(ins[0])
    one = m.wkv7_backward(m.wkv7_forward(*ins, None, None, True)[2], *ins, dy, None)
    one = [g.clone() for g in one]
    two = m.wkv7_backward(m.wkv7_forward(*ins, None, None, True)[2], *ins, dy, None, *(g.clone() for g in given))
    for i, g in zip((0, 2, 3), given, strict=False):
        one[i] = one[i].float() + g.float()
    print(
        "added:",
        [f"{float((a.float() - b.float()).norm() / a.float().norm()):.1e}" for a, b in zip(one, two, strict=False)],
    )


def median(f, n=30):
    for _ in range(3):
        f()
    flush = torch.empty(64 << 20, dtype=torch.int32, device=dev)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    for a, b in events:
        flush.zero_()
        a.record()
        f()
        b.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in events)[n // 2]


def kernels(B, T, H, all_parts=True):
    ins = rnd(B, T, H)
    r, dy = ins[0], torch.randn_like(ins[0])
    calls = []
    run = m.run
    m.run = lambda name, call, which, device: (run(name, call, which, device), calls.append((name, call)))
    y, final, saved = m.wkv7_forward(*ins, None, None, True)
    copies = saved._replace(**{n: x.clone() for n, x in saved._asdict().items() if n != "plan"})
    out = m.wkv7_backward(copies, *ins, dy, None)
    m.run = run
    (forward, fcall), (backward, bcall) = calls
    # the backward's own tiles were written over by its gradients: only times count from here on
    res, once = [], lambda name, call, which: median(lambda: library.run(name, call, which, r.device)) * 1e3
    for name, door, call, which in (
        ("local", forward, fcall, 1),
        ("scan", forward, fcall, 2),
        ("scan_back", backward, bcall, 4),
        ("gradients", backward, bcall, 8),
    ):
        if which in (2, 4) and all_parts:
            own, best = call.parts, []
            for parts in (1, 2, 4):
                call.parts = parts
                best.append(f"{once(door, call, which):.0f}")
            call.parts = own
            res.append(f"{name}(1,2,4 warps)={'/'.join(best)}")
        else:
            res.append(f"{name}={once(door, call, which):.0f}")
    res.append(f"local+scan={once(forward, fcall, 3):.0f} back+gradients={once(backward, bcall, 12):.0f}")
    print("kernels us", (B, T, H), *res, flush=True)
    del saved, copies, out, y, final


def variants():
    base = build.FLAGS
    for flags in ((), ("-DOVERLAP=true",), ("-DLOCAL_BLOCKS=3",), ()):
        build.FLAGS = base + flags
        library.load.cache_clear()
        print("variant", *flags or ("as it is",))
        accuracy(1, 512, 2)
        for s in ((8, 4096, 32), (8, 1024, 32), (1, 1024, 12)):
            kernels(*s, all_parts=False)
    build.FLAGS = base
    library.load.cache_clear()


def graph(B, T, H):
    ins = rnd(B, T, H)
    dy = torch.randn_like(ins[0])

    def both():
        y, final, saved = m.wkv7_forward(*ins, None, None, True)
        return [y, final, *m.wkv7_backward(saved, *ins, dy, final)]

    want = [x.clone() for x in both()]
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = both()
    for _ in range(3):
        for x in out:
            x.fill_(float("nan"))
        captured.replay()
    same = all(torch.equal(a, b) for a, b in zip(out, want, strict=False))
    print(
        "graph",
        (B, T, H),
        "same" if same else "BAD",
        f"{median(captured.replay) * 1e3:.0f} us, eager raw {median(both) * 1e3:.0f} us (wall {wall(both) * 1e3:.0f})",
        flush=True,
    )


def alike(w, T=128):
    r, k, v = (torch.randn(1, 1, 4, 64, device=dev).expand(1, T, 4, 64) * s for s in (0.5, 1.0, 0.5))
    full = [r, torch.full_like(r, w), k, v, F.normalize(k, dim=-1), torch.full_like(r, 0.98)]
    ins = [x.bfloat16().contiguous() for x in full]
    dy = torch.randn_like(ins[0])
    none = torch.zeros(1, 4, 64, 64, device=dev)
    got = results(m.wkv7, ins, none, None, dy, none)
    want = results(reference.wkv7, [x.double() for x in ins], none.double(), None, dy, none)
    exact = results(reference.wkv7, [x.double() for x in full], none.double(), None, dy, none)

    def e(x, y):
        return [float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) * 1e3 for a, b in zip(x, y, strict=False)]

    for what, found in (("kernels", e(got, want)), ("inputs ", e(want, exact))):
        print(
            "alike",
            w,
            what,
            " ".join(f"{n}={x:.1f}" for n, x in zip(NAMES[:-1], found, strict=False)),
            "(1e-3)",
            flush=True,
        )


def wall(f, n=50):
    for _ in range(5):
        f()
    torch.cuda.synchronize()
    t = time.perf_counter()
    for _ in range(n):
        f()
    torch.cuda.synchronize()
    return (time.perf_counter() - t) / n * 1e3


def total(B, T, H):
    ins = [x.requires_grad_() for x in rnd(B, T, H)]
    dy = torch.randn_like(ins[0])

    def both():
        y, _ = m.wkv7(*ins)
        torch.autograd.grad(y, ins, dy)

    def forward():
        with torch.no_grad():
            m.wkv7(*ins)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    print(
        f"total {(B, T, H)}: forward {median(forward):.3f}, both {median(both):.3f} (wall {wall(both):.3f}) ms, peak {peak:.0f} MiB",
        flush=True,
    )


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "all"
    print(torch.cuda.get_device_name(), torch.__version__)
    if what in ("all", "accuracy"):
        b, h = torch.bfloat16, torch.float16
        accuracy(1, 512, 2)
        for w0 in ((8, 8), (-12, -12), (-3, -3)):
            accuracy(1, 512, 2, w0=w0)
        for T in (2, 15, 64, 65, 130):
            accuracy(2, T, 2)
        accuracy(1, 512, 2, dt=h)
        accuracy(1, 300, 2, cu=[0, 10, 10, 100, 300])
        accuracy(1, 300, 2, cu=[0, 0, 10, 10, 100, 300, 300], on_gpu=True)
        accuracy(1, 192, 2, twice=True)
        accuracy(70, 64, 4)
        accuracy(20, 70, 4)
        added()
    if what in ("all", "accuracy", "alike"):
        for w in (-0.5, -3.0, -6.0):
            alike(w)
    if what in ("all", "graph"):
        for s in ((1, 1024, 12), (8, 1024, 32), (2, 70, 4)):
            graph(*s)
    if what in ("all", "variants"):
        variants()
    if what in ("all", "times"):
        for s in SHAPES:
            total(*s)
        for s in SHAPES:
            kernels(*s)
