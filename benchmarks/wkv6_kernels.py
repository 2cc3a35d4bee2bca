# ruff: noqa: B023
"""python benchmarks/wkv6_kernels.py [accuracy|times|ncu]: chunked6_*.cu."""

import sys
import time

import torch

from rwkv_peft.ops import cuda, reference
from rwkv_peft.ops.cuda import chunked6 as m
from rwkv_peft.ops.cuda import library

dev = "cuda"
torch.manual_seed(0)
SHAPES = [(8, 4096, 32), (1, 1024, 12), (8, 1024, 32), (2, 4096, 64), (4, 4096, 40), (1, 16384, 40)]
NAMES = ["y", "fin", "dr", "dw", "dk", "dv", "du", "dst"]
B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def rnd(version, B, T, H, dt=B16, w=None, wdt=F32):
    """w: None (model-like), a number (all the same) or "turns" (decays of 0 beside decays of nearly 1)."""

    def rn(*s):
        return torch.randn(*s, device=dev)

    shape = (B, T, H, 64) if version == 6 else (H, 64)
    if w is None:
        decay = 2 * rn(*shape) - 3
    elif w == "turns":
        decay = torch.where(torch.rand(*shape, device=dev) < 0.1, 25.0, -8.0)
    else:
        decay = torch.full(shape, float(w), device=dev)
    r, k, v = (rn(B, T, H, 64).to(dt) for _ in range(3))
    return [r, decay.to(wdt), k, v, rn(H, 64)]


def results(f, ins, st, cu, dy, df, twice=False):
    ins = [x.clone().requires_grad_() for x in ins]
    st = st.clone().requires_grad_()
    y, fs = f(*ins, st, cu)
    total = (y * dy.to(y.dtype)).sum() + (fs * df.to(fs.dtype)).sum()
    if twice:
        for g in torch.autograd.grad(total, [*ins, st], retain_graph=True):
            g.fill_(float("nan"))
    return [y.detach(), fs.detach(), *torch.autograd.grad(total, [*ins, st])]


def accuracy(version, B, T, H, dt=B16, w=None, wdt=F32, cu=None, on_gpu=False, twice=False):
    ins, S = rnd(version, B, T, H, dt, w, wdt), B if cu is None else len(cu) - 1
    st, df = torch.randn(S, H, 64, 64, device=dev), torch.randn(S, H, 64, 64, device=dev)
    dy, c = torch.randn(B, T, H, 64, device=dev).to(dt), None if cu is None else torch.tensor(cu)
    f = f"wkv{version}"
    got = results(getattr(cuda, f), ins, st, c.to(dev) if on_gpu else c, dy, df, twice)
    want = results(getattr(reference, f), [x.double() for x in ins], st.double(), c, dy, df)
    e = []
    for a, b in zip(got, want, strict=False):
        size = float(b.norm())
        e.append(float((a.double() - b).norm()) / (size or 1.0) * 1e3)
    ok = "ok " if max(e) <= 5 else "BAD"  # NaN is BAD
    told = f"v{version} {(B, T, H)} {str(dt)[6:]} w={w} {str(wdt)[6:]} {cu or ''}{' gpu' * on_gpu}{' twice' * twice}"
    print(ok, told, " ".join(f"{n}={x:.2f}" for n, x in zip(NAMES, e, strict=False)), "(1e-3)", flush=True)


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


def kernels(version, B, T, H, wdt=F32, only=None):
    ins = [m.aligned(x) for x in rnd(version, B, T, H, wdt=wdt)]
    ins[4] = ins[4].float()
    r, dy = ins[0], torch.randn_like(ins[0])
    calls = []
    run = m.run
    m.run = lambda name, call, which, device: (run(name, call, which, device), calls.append(call))
    y, final, states, chunks = m._forward(ins, None, None)
    out = m._backward(ins, dy, None, states, chunks)
    m.run = run
    forward, backward = calls
    # the states were written over by gradients, shares freed: only times count from here on; keep room for the shares
    shares = torch.empty(2, chunks.chunks, H, 64, device=dev)
    backward.give(du=shares[0], **({"dw": shares[1]} if version == 5 else {}))
    dstates, dfin = torch.empty_like(states), torch.empty(chunks.documents, H, 64, 64, device=dev)
    backward.give(dstates=dstates, d_initial=dfin)
    res = []
    for name, call, which in (
        ("scan", forward, 1),
        ("output", forward, 2),
        ("scan_back", backward, 4),
        ("gradients", backward, 8),
    ):
        entry = "chunked6_forward" if which < 4 else "chunked6_backward"
        if only and name not in only:
            continue
        if which in (1, 4):
            best = []
            for parts in (1, 2, 4):
                call.parts = parts
                best.append(f"{median(lambda: library.run(entry, call, which, r.device)) * 1e3:.0f}")
            res.append(f"{name}(1,2,4 warps)={'/'.join(best)}")
        else:
            res.append(f"{name}={median(lambda: library.run(entry, call, which, r.device)) * 1e3:.0f}")
    print(f"kernels us v{version} {(B, T, H)} w {str(wdt)[6:]}", *res, flush=True)
    del out, y, final


def wall(f, n=50):
    for _ in range(5):
        f()
    torch.cuda.synchronize()
    t = time.perf_counter()
    for _ in range(n):
        f()
    torch.cuda.synchronize()
    return (time.perf_counter() - t) / n * 1e3


def total(version, B, T, H, wdt=F32, module=cuda, name="cuda"):
    ins = [x.requires_grad_() for x in rnd(version, B, T, H, wdt=wdt)]
    dy = torch.randn_like(ins[0])
    wkv = getattr(module, f"wkv{version}")

    def both():
        y, _ = wkv(*ins)
        torch.autograd.grad(y, ins, dy)

    def forward():
        with torch.no_grad():
            wkv(*ins)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    print(
        f"total {name} v{version} {(B, T, H)} w {str(wdt)[6:]}: forward {median(forward):.3f}, both {median(both):.3f} "
        f"(wall {wall(both):.3f}) ms, peak {peak:.0f} MiB",
        flush=True,
    )


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "all"
    print(torch.cuda.get_device_name(), torch.__version__)
    if what in ("all", "accuracy"):
        for v in (6, 5):
            accuracy(v, 1, 512, 2)
            for w in (-20, -6, -0.5, 2, 4, 30):
                accuracy(v, 1, 256, 2, w=w)
            for T in (2, 15, 16, 17, 64, 65, 130):
                accuracy(v, 2, T, 2)
            accuracy(v, 1, 256, 2, dt=F16)
            accuracy(v, 1, 256, 2, wdt=B16)
            accuracy(v, 1, 256, 2, dt=F16, wdt=F16)
            accuracy(v, 1, 300, 2, cu=[0, 10, 10, 100, 300])
            accuracy(v, 1, 300, 2, cu=[0, 0, 10, 10, 100, 300, 300], on_gpu=True)
            accuracy(v, 1, 192, 2, twice=True)
            accuracy(v, 70, 64, 4)  # 4 warps a scan's block, in place
            accuracy(v, 20, 70, 4)  # 2 warps
        accuracy(6, 1, 256, 2, w="turns")
        accuracy(6, 70, 130, 4, w="turns")
        accuracy(6, 2, 2048, 4)
    if what in ("all", "times"):
        from rwkv_peft.ops import triton

        for s in SHAPES:
            total(6, *s)
            total(5, *s)
        total(6, *SHAPES[0], wdt=B16)
        total(6, *SHAPES[0], module=triton, name="triton")
        total(5, *SHAPES[0], module=triton, name="triton")
        for s in SHAPES:
            kernels(6, *s)
            kernels(5, *s)
        kernels(6, *SHAPES[0], wdt=B16)
    if what == "ncu":  # ncu --set full -k regex:6 -c 4 python benchmarks/wkv6_kernels.py ncu
        total(6, *SHAPES[0])
