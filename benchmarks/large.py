"""A large model from its file to a trained adapter: what it takes of both memories: `python benchmarks/large.py`.

Writes a bf16 `.pth` of the size with random weights, then runs `rwkv-peft train` on it in a process of its own, which
is watched: RAM is its largest resident set (`anon` without the pages of the mapped file, which the system can take back
at any time), GPU is what the card has in use at most, less what it had before; `beside` is that without torch's
largest allocation. Further flags are handed to `train`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from measure import arguments, describe, print_table, write_json
from random_model import SIZES, random_value
from rwkv_peft.models import MODELS

COLUMNS = [
    "size", "flags", "file GB", "to first step s", "RAM GiB", "anon GiB", "GPU GiB", "peak GiB", "beside", "tokens/s",
]  # fmt: skip
SETTINGS = {"--ctx-len": "1024", "--micro-batch": "1", "--max-steps": "12", "--sampling": "get"}


def write_model(size: str, path: Path, device: str) -> None:
    """A model file."""
    version, sizes = SIZES[size]
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = MODELS[version](sizes)
    shapes = [(name, p.shape) for name, p in model.named_parameters()]
    torch.save({name: random_value(name, shape, generator).bfloat16().cpu() for name, shape in shapes}, path)


def write_data(path: Path) -> None:
    """Texts, every other one longer than a row, the rest of all lengths."""
    lengths = [4000 if i % 2 else 20 + 17 * i for i in range(16)]
    texts = [" ".join(str((i * 7919 + j * 104729) % 9973) for j in range(n)) for i, n in enumerate(lengths)]
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def gpu_in_use() -> float:
    """GiB of the first card."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout) / 1024


def resident(pid: int) -> tuple[float, float]:
    """GiB of RAM that a process has now: all, and without mapped files. 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0, 0.0
    sizes = (line.removesuffix(" kB").split(":") for line in lines if line.endswith(" kB"))
    found = {name: float(size) / 2**20 for name, size in sizes}
    return found.get("VmRSS", 0.0), found.get("RssAnon", 0.0) + found.get("RssShmem", 0.0)


def measure(size: str, flags: list[str], folder: Path, device: str) -> dict[str, Any]:
    """A row of the table."""
    model, data, out = folder / f"{size}.pth", folder / "data.jsonl", folder / f"run-{time.time_ns()}"
    if not model.exists():
        args = [sys.executable, __file__, "--sizes", size, "--folder", str(folder), "--only-write", "--device", device]
        subprocess.run(args, check=True)
    write_data(data)
    row: dict[str, Any] = {"size": size, "flags": " ".join(flags), "file GB": model.stat().st_size / 1e9}
    line = [sys.executable, "-m", "rwkv_peft", "train", "--model", str(model), "--data", str(data), "--out", str(out)]
    line += [*(part for name, value in SETTINGS.items() if name not in flags for part in (name, value)), *flags]
    before, began, peaks = gpu_in_use(), time.time(), [0.0, 0.0, 0.0]
    with (folder / "log.txt").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peaks = [max(pair) for pair in zip(peaks, (*resident(process.pid), gpu_in_use()), strict=True)]
            if "to first step s" not in row and (out / "metrics.jsonl").exists():
                row["to first step s"] = time.time() - began
            time.sleep(0.05)
    text = (folder / "log.txt").read_text(encoding="utf-8")
    if process.returncode:
        return row | {"tokens/s": text.strip().splitlines()[-1][-200:]}
    print(text[-1500:], flush=True)
    records = [json.loads(record) for record in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    row |= {"RAM GiB": peaks[0], "anon GiB": peaks[1], "GPU GiB": peaks[2] - before}
    row |= {"peak GiB": records[-1]["vram_gib"], "tokens/s": round(records[-1]["tokens_per_s"])}
    return row | {"beside": row["GPU GiB"] - row["peak GiB"]}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["7.2B", "13.3B"], choices=list(SIZES))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/large"))
    parser.add_argument("--keep", action="store_true", help="the model files")
    parser.add_argument("--only-write", action="store_true", help="a model file, and do not train")
    args, flags = parser.parse_known_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for size in args.sizes:
        if args.only_write:
            write_model(size, args.folder / f"{size}.pth", args.device)
            continue
        rows.append(measure(size, flags, args.folder, args.device))
        if not args.keep:
            (args.folder / f"{size}.pth").unlink()
    if rows:
        print(f"Large models; {describe(torch.device(args.device))}")
        print_table(rows, COLUMNS)
        write_json(args.json, torch.device(args.device), rows)


if __name__ == "__main__":
    main()
