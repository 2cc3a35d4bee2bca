"""Adapter files of the original program (RWKV-PEFT), its `rwkv-N.pth`: read into our own form, nothing is executed.

A matrix `blocks.0.att.key` of (out, in) has, in such a file, behind any prefix (`model.`, `_forward_module.`, …):

method  tensors, after the matrix's name                       merged
lora    lora_A (r,in)  lora_B (out,r)                          W + alpha/r · B A; alpha is in no file
pissa   the same; init_lora_A, init_lora_B in init_pissa.pth   W - B0 A0 + B A: never scaled
bone    disha or bone (r,out)                                  to each r columns of W, disha transposed is added
bat     disha or bone (in/r,r,r)                               W[a,b] + W[a,b] D[b] + D[b], W in r × r blocks

and beside them, under official names, what was trained in full: norms, `time_*`, emb, head, and a learned initial state
`time_state` (H,N,N), row = value index, column = key index, for RWKV-6 and RWKV-7 alike.
Source: the layers, the saving code and the merge scripts of github.com/JL-er/RWKV-PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import check_finite, read_tensors
from ..config import AdapterConfig
from ..errors import CheckpointError, ConfigError
from .saved import SavedAdapter

OFFICIAL = re.compile(r"(?:^|\.)((?:blocks\.\d+|emb|head|ln_out)\..+)$")
ADAPTER = re.compile(
    r"(blocks\.\d+\.(?:att|ffn)\.\w+)\.(lora_A|lora_B|init_lora_A|init_lora_B|bone|disha)(?:(?:\.default)?\.weight)?"
)
PART = re.compile(
    r"(?:emb|head)\.weight|ln_out\.(?:weight|bias)|blocks\.\d+\.(?:(?:ln[012]|att\.ln_x)\.(?:weight|bias)"
    r"|(?:att|ffn)\.(?:time_\w+|shift_state|x_[rwkvag]|[wavg][012]|k_k|k_a|r_k))"
)
MATRIX = re.compile(r"blocks\.\d+\.(?:att|ffn)\.\w+\.(?:base_layer\.)?weight")
START = "init_"  # begins the names of a PiSSA's initial values
START_FILES = ("init_pissa.pth", "init_lora.pth")  # the latter in its first versions

Matrices = dict[str, dict[str, Tensor]]  # the adapter's tensors of each matrix


def read_original(path: Path, alpha: float | None = None, pissa_init: Path | None = None) -> SavedAdapter:
    """The adapter in a `.pth` of the original program; its tensors keep their number formats.

    A file does not tell LoRA from PiSSA. It is a PiSSA if `pissa_init` is given, or if `init_pissa.pth` (or the older
    `init_lora.pth`) lies beside it and has initial values of the same shapes for every matrix.

    Arguments:
        alpha: lora_alpha of a LoRA, which the file does not hold; other methods have none.
        pissa_init: a PiSSA's file of initial values.

    Raises CheckpointError if the file holds anything else, is incomplete, or if `alpha` is missing; ConfigError if
    `alpha` is given and a file beside it says PiSSA.
    """
    if path.suffix != ".pth":
        raise CheckpointError(
            f"{path}: is neither an adapter folder nor a .pth of the original; name the folder it is in"
        )
    matrices, parts = _read(path)
    if not matrices:
        return SavedAdapter(None, {}, parts)
    kinds = {"lora" if name.startswith("lora") else name for tensors in matrices.values() for name in tensors}
    if any(name.startswith(START) for name in kinds):
        raise CheckpointError(f"{path}: holds a PiSSA's initial values; name the rwkv-N.pth beside it instead")
    if len(kinds) > 1:
        raise CheckpointError(
            f"{path}: holds tensors of several methods ({', '.join(sorted(kinds))}); give a file of one"
        )
    config, tensors = (
        _read_lora(path, matrices, alpha, pissa_init) if kinds == {"lora"} else _read_disha(path, matrices)
    )
    config.check()
    return SavedAdapter(config, tensors, parts)


def _read(path: Path) -> tuple[Matrices, dict[str, Tensor]]:
    """Tensors of adapted matrices, and parts trained in full."""
    matrices: Matrices = {}
    parts: dict[str, Tensor] = {}
    origin: dict[tuple[str, str], str] = {}  # names in the file
    for name, tensor in read_tensors(path).items():
        found = OFFICIAL.search(name)
        official = found[1] if found else ""
        if adapter := ADAPTER.fullmatch(official):
            place, matrix = (adapter[1], adapter[2]), matrices.setdefault(adapter[1], {})
        elif PART.fullmatch(official):
            place, matrix = ("", official), parts
        elif MATRIX.fullmatch(official):
            raise CheckpointError(
                f"{path}: is a whole model, not an adapter (it holds {name}); "
                "name it as the model itself, or give the adapter alone"
            )
        else:
            raise CheckpointError(
                f"{path}: tensor {name} is unknown; allowed are those of lora, pissa, bone, bat, state, and the parts "
                "time, ln, emb, head; give the rwkv-N.pth that the original wrote"
            )
        if place in origin:
            raise CheckpointError(f"{path}: {origin[place]} and {name} are the same tensor; delete one of them")
        check_finite(path, name, tensor)
        origin[place], matrix[place[1]] = name, tensor
    if not origin:
        raise CheckpointError(f"{path}: holds no tensor; give the rwkv-N.pth that the original wrote")
    return matrices, parts


def _read_lora(
    path: Path, matrices: Matrices, alpha: float | None, pissa_init: Path | None
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    pairs = {target: _pair(path, target, tensors) for target, tensors in matrices.items()}
    rank = _one_rank(path, {target: len(a) for target, (a, _) in pairs.items()})
    start = _start(path, pairs, pissa_init)
    if start is None and alpha is None:
        raise CheckpointError(
            f"{path}: does not hold its lora_alpha; give --alpha N (the original's default was 32), "
            "or if it is a PiSSA, --pissa-init with its init_pissa.pth"
        )
    if start is not None and alpha is not None and pissa_init is None:
        raise ConfigError(
            f"--alpha {alpha:g}: {path} is a PiSSA, by the initial values beside it, and has none; leave it out, "
            "or if it is a LoRA, move it to another folder"
        )
    if start is not None:
        pairs = {
            target: (torch.cat((a, start[target][0])), torch.cat((b, -start[target][1]), dim=1))
            for target, (a, b) in pairs.items()
        }
    peft, scale = ("lora", alpha) if start is None else ("pissa", float(rank))
    tensors = {f"{target}.lora_A.weight": a for target, (a, _) in pairs.items()}
    tensors |= {f"{target}.lora_B.weight": b for target, (_, b) in pairs.items()}
    return AdapterConfig(peft, rank, scale, targets=tuple(pairs)), tensors


def _pair(path: Path, target: str, tensors: Mapping[str, Tensor], start: str = "") -> tuple[Tensor, Tensor]:
    """A (r,in) and B (out,r) of one matrix."""
    a, b = f"{start}lora_A", f"{start}lora_B"
    for name in (a, b):
        if name not in tensors:
            raise CheckpointError(f"{path}: {target}.{name} is missing; get the file again, from the same run")
    A, B = tensors[a], tensors[b]
    if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1] or not len(A):
        raise CheckpointError(
            f"{path}: {target}.{a} {tuple(A.shape)} and {b} {tuple(B.shape)} do not fit together; "
            "they should be (rank, in) and (out, rank); get the file again"
        )
    return A, B


def _start(
    path: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], given: Path | None
) -> dict[str, tuple[Tensor, Tensor]] | None:
    """The initial values of a PiSSA's pairs; None for a LoRA, where no file is given and none beside it fits."""
    beside = (path.parent / name for name in START_FILES)
    for file in [given] if given is not None else filter(Path.exists, beside):
        found = {target: tensors for target, tensors in _read(file)[0].items() if f"{START}lora_A" in tensors}
        odd = sorted(pairs.keys() - found.keys())
        start = {target: _pair(file, target, found[target], START) for target in pairs.keys() - odd}
        odd += [t for t in pairs if t in start and _shapes(start[t]) != _shapes(pairs[t])]
        if not odd:
            return start
        if given is not None:
            raise CheckpointError(
                f"{file}: has no initial values for {odd[0]} of the shapes in {path}; "
                "give the init_pissa.pth of that run"
            )
    return None


def _shapes(tensors: Iterable[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _read_disha(path: Path, matrices: Matrices) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Bone has a block of two axes, bat one of three."""
    blocks = {target: block for target, tensors in matrices.items() for block in tensors.values()}
    for target, block in blocks.items():
        _check_block(path, target, block, blocks)
    if len({block.ndim for block in blocks.values()}) > 1:
        raise CheckpointError(f"{path}: holds blocks of bone (2 axes) and of bat (3 axes); merge it with the original")
    rank = _one_rank(path, {target: block.shape[-2] for target, block in blocks.items()})
    is_bat = next(iter(blocks.values())).ndim == 3
    peft, leaf = ("bat", "bat_block") if is_bat else ("bone", "miss_block")
    tensors = {f"{target}.{leaf}": block for target, block in blocks.items()}
    return AdapterConfig(peft, rank, targets=tuple(blocks)), tensors


def _check_block(path: Path, target: str, block: Tensor, blocks: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if the block has an impossible shape, or is of the first Bone.

    The first Bone had blocks (out,r), then (out/r,r,r), and added W[a,b] D[a] + D[a]. The channel-mix tells the latter
    from bat, since its `key` has more outputs than inputs.
    """
    shape = tuple(block.shape)
    if block.ndim not in (2, 3) or 0 in shape or (block.ndim == 3 and shape[1] != shape[2]):
        raise CheckpointError(
            f"{path}: the block of {target} has shape {shape}; allowed are (rank, out) for bone and "
            "(in / rank, rank, rank) for bat; get the file again"
        )
    layer = target.rpartition(".")[0]
    key, value = blocks.get(f"{layer}.key"), blocks.get(f"{layer}.value")
    more_outputs = layer.endswith(".ffn") and key is not None and value is not None and len(key) > len(value)
    if (block.ndim == 2 and shape[0] > shape[1]) or (block.ndim == 3 and more_outputs):
        raise CheckpointError(
            f"{path}: the block of {target} {shape} follows the outputs, as in the first form of Bone, which cannot be "
            "read; merge it with the version of the original that wrote it"
        )


def _one_rank(path: Path, ranks: Mapping[str, int]) -> int:
    """The rank of all matrices."""
    (first, rank), *others = ranks.items()
    for target, other in others:
        if other != rank:
            raise CheckpointError(
                f"{path}: {first} has rank {rank} and {target} rank {other}; one rank for all is supported; "
                "merge it with the program that wrote it"
            )
    return rank
