"""How well a model predicts text: `python tools/bits_per_byte.py MODEL.pth TEXT.jsonl`, each line on its own."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from rwkv_peft import load_model
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.dataset import load_dataset
from rwkv_peft.data.sampling import Sampler
from rwkv_peft.data.tokenizer import tokenizer_for
from rwkv_peft.training.step import batch_loss


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Bits that a byte-level model needs for each byte of a JSONL file.")
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    args = parser.parse_args()
    model = load_model(args.model)
    config = TrainConfig(args.model, [str(args.text)], Path("unused"), ctx_len=2048)
    data = load_dataset(config, tokenizer_for("byte", model.sizes.vocab_size))
    nats = targets = 0.0
    sampler = Sampler(data, shuffle=False)
    for step in range(sampler.steps(0)):
        for batch in sampler.step(step):
            nats += float(batch_loss(model, batch, 0.0)[0])
            targets += len(batch.labels)
    print(f"{nats / targets / math.log(2):.4f} bits per byte over {targets:,.0f} bytes and document ends")


if __name__ == "__main__":
    main()
