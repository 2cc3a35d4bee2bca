"""How fast examples become batches, and how full packed rows are: `python benchmarks/loader.py [--megabytes N]`.

The data are made here from text of this repository, of a log-normal distribution of lengths. From JSONL, the figure
includes reading the file and encoding it; from binidx, opening it. Training is not part of it: the question is whether
it would ever wait.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from rwkv_peft.config import PrepareConfig, TrainConfig
from rwkv_peft.data.dataset import load_dataset
from rwkv_peft.data.sampling import Sampler
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.preparation import prepare

ROOT = Path(__file__).parent.parent


def write_documents(path: Path, size: int) -> None:
    """About `size` bytes of JSONL; documents of e^6.7 ± e^1 bytes."""
    text = "".join(p.read_text(encoding="utf-8") for p in sorted(ROOT.rglob("*.md")) if ".venv" not in p.parts)
    text += "".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "src").rglob("*.py")))
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            length = min(int(chance.lognormvariate(6.7, 1.0)) + 2, len(text) - 1)
            start = chance.randrange(len(text) - length)
            file.write(json.dumps({"text": text[start : start + length]}, ensure_ascii=False) + "\n")


def measure(source: str, sampling: str, ctx_len: int) -> tuple[float, float, float]:
    """Tokens per second from the file to the last batch of an epoch, those of the batches alone, and the fill."""
    began = time.perf_counter()
    micro_batch = 1 if sampling == "only" else 8
    config = TrainConfig(Path("m"), [source], Path("o"), ctx_len=ctx_len, sampling=sampling, micro_batch=micro_batch)  # type: ignore[arg-type]
    sampler = Sampler.of(config, load_dataset(config, Tokenizer.world()))
    loaded = time.perf_counter()
    tokens = sum(batch.inputs for step in range(sampler.steps(0)) for batch in sampler.step(step))
    ended = time.perf_counter()
    return tokens / (ended - began), tokens / (ended - loaded), sampler.fill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        jsonl, prefix = Path(folder) / "data.jsonl", Path(folder) / "data"
        write_documents(jsonl, args.megabytes * 10**6)
        prepare(PrepareConfig([str(jsonl)], prefix, overwrite=True))
        print("| source | sampling | ctx | tokens/s with reading | tokens/s of batches | rows full |")
        print("|---|---|---|---|---|---|")
        for ctx_len in (1024, 4096):
            for source, name in ((jsonl, "JSONL"), (prefix, "binidx")):
                for sampling in ("pack", "pad", "get", "only"):
                    whole, batches, fill = measure(str(source), sampling, ctx_len)
                    print(f"| {name} | {sampling} | {ctx_len} | {whole:,.0f} | {batches:,.0f} | {fill:.2%} |")


if __name__ == "__main__":
    main()
