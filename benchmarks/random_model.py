"""Models of official sizes with random weights, made where they run, without a file."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rwkv_peft.loading import EMBEDDING, as_kept, find_quantised, set_module, set_parameter
from rwkv_peft.models import MODELS, Rwkv, Rwkv5Sizes, Rwkv6Sizes, Rwkv7Sizes, Sizes
from rwkv_peft.ops import choose_backend
from rwkv_peft.ops.quant import quantize

COMMON: dict[str, int] = {"head_size": 64, "vocab_size": 65536}


def rwkv7(layers: int, width: int, w: int, a: int, v: int, g: int) -> tuple[str, Sizes]:
    ranks = {"rank_w": w, "rank_a": a, "rank_v": v, "rank_g": g}
    return "x070", Rwkv7Sizes(layers=layers, width=width, ffn=4 * width, **ranks, **COMMON)


SIZES: dict[str, tuple[str, Sizes]] = {
    "tiny": ("x070", replace(rwkv7(2, 128, 16, 16, 8, 32)[1], vocab_size=512)),
    "0.1B": rwkv7(12, 768, 64, 64, 32, 128),
    "0.4B": rwkv7(24, 1024, 64, 64, 32, 128),
    "1.5B": rwkv7(24, 2048, 96, 96, 64, 256),
    "2.9B": rwkv7(32, 2560, 96, 96, 64, 320),
    "7.2B": rwkv7(32, 4096, 128, 128, 96, 480),
    "13.3B": rwkv7(61, 4096, 192, 192, 128, 384),
    "v6-1.6B": ("x060", Rwkv6Sizes(layers=24, width=2048, ffn=7168, rank_mix=32, rank_decay=64, **COMMON)),
    "v5-1.5B": ("x052", Rwkv5Sizes(layers=24, width=2048, ffn=7168, **COMMON)),
}

# Vectors by the end of their name: mean, and spread
VECTORS = {"a0": (0, 1), "v0": (0, 1), "k_k": (0.85, 0.1), "k_a": (1, 0.1), "r_k": (0, 0.1), "time_faaaa": (0, 0.5)}
DECAYS = {"w0": (-6.0, 1.0), "time_decay": (-6.0, 0.0)}  # smallest and largest


def random_model(
    version: str,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    op: str = "auto",
    quant: str = "none",
    quant_head: bool = False,
    embedding: str = "gpu",
) -> Rwkv:
    """A model in eval mode with weights of the spread of trained ones, so that its numbers stay finite.

    The last three as in `load_model`.
    """
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = MODELS[version](sizes)
    _, quantised = find_quantised("", model, dict(model.named_parameters()), quant, quant_head)
    for name, shape in [(n, p.shape) for n, p in model.named_parameters()]:
        value = random_value(name, shape, generator).to(dtype)
        if name in quantised:
            set_module(model, name, quantize(value, quant, dtype))
        else:
            value = value.cpu() if name == EMBEDDING and embedding == "cpu" else value
            set_parameter(model, name, as_kept(value, dtype, device))
    model.like, model.quant = torch.empty(0, dtype=dtype, device=device), quant
    model.op = choose_backend(op, device, sizes.head_size)
    return model.eval()


def random_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values for the parameter called so."""
    leaf, device = name.rpartition(".")[2], generator.device
    normal = torch.randn(shape, generator=generator, device=device)
    if ".ln" in f".{name}":
        return 0.1 * normal + (1 if leaf == "weight" else 0)
    if leaf in DECAYS:
        return torch.linspace(*DECAYS[leaf], shape.numel(), device=device).view(shape)
    if leaf in VECTORS:
        mean, spread = VECTORS[leaf]
        return mean + spread * normal
    if max(shape) == shape.numel():  # the mixes of token shift
        return torch.rand(shape, generator=generator, device=device)
    if leaf == "weight":
        part = name.split(".")[-2]
        gain = {"emb": math.sqrt(shape[1]), "head": 0.5, "output": 0.5, "value": 0.5}.get(part, 1.0)
        return normal * gain / math.sqrt(shape[1])
    return 0.3 * normal / math.sqrt(shape[-2])  # low-rank matrices, whose input is the last axis but one
