"""From a model file to a model: find the version, read the sizes from the tensors, check, cast and place each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapters.state_tuning import add_shift, add_state
from .checkpoint import DTYPES, Fingerprint, check_finite, read_metadata
from .errors import CheckpointError, ConfigError
from .models import STATES, Rwkv, Sizes, find_version
from .ops import choose_backend
from .ops.matrix import Linear
from .ops.quant import QUANTS, QuantizedLinear, quantize
from .packed import FINGERPRINT, Entry, Packed, read_by_layer, read_model

EMBEDDING = "emb.weight"


def load_model(
    path: Path | str,
    dtype: str = "fp32",
    device: str = "cpu",
    op: str = "auto",
    quant: str = "none",
    quant_head: bool = False,
    embedding: str = "gpu",
) -> Rwkv:
    """The model in a `.pth` or `.safetensors` file, in eval mode; it begins in the learned state that the file holds.

    Arguments:
        dtype: `fp32`, `bf16` or `fp16`, for weights and activations; `auto` is bf16 on a GPU and fp32 on a CPU.
        device: `cpu`, `cuda`, `cuda:N`, or `auto`.
        op: backend of the recurrence, a key of `ops.BACKENDS`, or `auto`.
        quant: how the layers' matrices are stored, a key of `ops.quant.QUANTS`, or `none`; `quant_head`: the head too.
            A file that holds them quantised is loaded as it is.
        embedding: `cpu` keeps it in the CPU's memory, from where a GPU fetches the rows that it needs; `gpu` puts it
            beside the other weights.

    Weights are read, cast, quantised and placed a layer at a time. Raises CheckpointError if the file is no whole model
    of a known version, ConfigError for the other arguments.
    """
    place = find_device(device)
    number = find_dtype(dtype, place)
    if embedding not in ("cpu", "gpu"):
        raise ConfigError(f"--embedding {embedding}: unknown; allowed are cpu gpu")
    entries = read_model(path)
    kind, sizes = check_model(path, entries)
    model = without_values(kind, sizes, entries)
    model.op = choose_backend(op, place, sizes.head_size)
    quant, quantised = find_quantised(path, model, entries, quant, quant_head)
    fingerprint = Fingerprint()
    for name, entry in read_by_layer(path):
        if isinstance(entry, Packed):
            layer = entry.layer(number, place)
            if not layer.is_finite():
                raise CheckpointError(f"{path}: tensor {name} holds NaN or Inf; get the file again")
            set_module(model, name, layer)
            continue
        fingerprint.add(name, entry)
        if name in kind.unused:
            continue
        value = entry.to("cpu" if name == EMBEDDING and embedding == "cpu" else place)
        check_finite(path, name, value)
        if name in quantised:
            set_module(model, name, quantised_layer(path, name, value, quant, number))
        else:
            set_parameter(model, name, as_kept(value, torch.float32 if name.endswith(STATES) else number, place))
    model.like = torch.empty(0, dtype=number, device=place)
    model.source, model.path, model.quant = Path(path).name, Path(path), quant
    model.fingerprint = read_metadata(path).get(FINGERPRINT) or fingerprint.digits()
    return model.eval()


def find_quantised(
    path: Path | str, model: Rwkv, entries: Mapping[str, Entry], quant: str, quant_head: bool
) -> tuple[str, set[str]]:
    """The format of the model's matrices, and the names of those that are to be quantised. Raises as `format_of`."""
    quant = format_of(path, entries, quant, quant_head)
    if quant == "none":
        return quant, set()
    matrices = {
        f"{name}.weight" for name, module in model.blocks.named_modules(prefix="blocks") if isinstance(module, Linear)
    }
    matrices |= {"head.weight"} if quant_head else set()
    return quant, {name for name in matrices if not isinstance(entries[name], Packed)}


def quantised_layer(path: Path | str, name: str, weight: Tensor, quant: str, dtype: torch.dtype) -> QuantizedLinear:
    """As `quantize`. Raises CheckpointError if a number is too large for the format's scales."""
    layer = quantize(weight, quant, dtype)
    if not layer.is_finite():
        raise CheckpointError(
            f"{path}: tensor {name} holds numbers that are too large for {quant}; try another --quant"
        )
    return layer


def format_of(path: Path | str, entries: Mapping[str, Entry], quant: str, quant_head: bool) -> str:
    """The format of the model's matrices: that of the file, or else `quant`.

    Raises ConfigError if that is unknown, or the file holds them in another; CheckpointError if it holds several.
    """
    if quant not in ("none", *QUANTS):
        raise ConfigError(f"--quant {quant}: unknown; allowed are none {' '.join(QUANTS)}")
    own = {entry.quant for entry in entries.values() if isinstance(entry, Packed)}
    if len(own) > 1:
        raise CheckpointError(f"{path}: holds matrices in {' and '.join(sorted(own))}; get a file with one format")
    if own and quant not in ("none", *own):
        raise ConfigError(f"--quant {quant}: {path} holds {min(own)} already; leave it out, or name the dense file")
    found = min(own, default=quant)
    if quant_head and found == "none":
        raise ConfigError("--quant-head: only with --quant; add one, or leave it out")
    return found


def as_kept(value: Tensor, dtype: torch.dtype, place: torch.device) -> Tensor:
    """A tensor as the model keeps it. What stays on the CPU beside a GPU is pinned, so that this can read it.

    It is a copy on the CPU, since the file behind a mapped tensor may change.
    """
    if value.device.type == place.type == "cpu":
        return value.to(dtype, copy=True, memory_format=torch.contiguous_format)
    value = value.to(dtype).contiguous()
    return value if value.device.type == place.type else value.pin_memory()


def read_sizes(path: Path | str) -> Sizes:
    """The sizes of the model in a file, from its header alone. Raises CheckpointError as `load_model` does."""
    return check_model(path, read_model(path))[1]


def check_model(path: Path | str, tensors: Mapping[str, Entry]) -> tuple[type[Rwkv], Sizes]:
    """The class and the sizes of the model that `tensors` are.

    Raises CheckpointError if they are of another architecture, or if one is missing, left over or misshapen.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        kind = find_version(shapes)
        sizes = kind.sizes_of(shapes)
        model = without_values(kind, sizes, shapes)
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name, shape in expected.items():
            if name not in shapes:
                raise CheckpointError(f"tensor {name} is missing; get the file again")
            if not _fits(shapes[name], shape):
                raise CheckpointError(
                    f"tensor {name} has shape {shapes[name]}; the others ask for {shape}; get the file again"
                )
        extra = sorted(shapes.keys() - expected.keys() - kind.unused)
        if extra:
            raise CheckpointError(
                f"holds {len(extra)} tensors that a plain {kind.title} model has not, e.g. {extra[0]}; "
                "variants are not supported yet; get a plain model"
            )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return kind, sizes


def without_values(kind: type[Rwkv], sizes: Sizes, names: Iterable[str] = ()) -> Rwkv:
    """The model on the meta device, with a learned initial state if one of `names` is of one."""
    with torch.device("meta"):
        model = kind(sizes)
    ends = {".".join(name.split(".")[2:]) for name in names if name.endswith(STATES)}
    if "att.time_state" in ends:
        add_state(model)
    if ends & {"att.shift_state", "ffn.shift_state"}:
        add_shift(model)
    return model


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a tensor is usable where another shape is usual: a vector (1,1,D) may be (D,), and keeps that shape."""
    return found == expected or (expected[:-1] == (1, 1) and found[-1:] == expected[-1:] == (math.prod(found),))


def find_device(device: str) -> torch.device:
    """The device called so; `auto` is a GPU if there is one. Raises ConfigError if it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"--device {device}: unknown; allowed are auto, cpu, cuda, cuda:N") from error
    if place.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: not supported; allowed are auto, cpu, cuda, cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {device}: torch sees {torch.cuda.device_count()} GPUs; choose --device cpu")
    return place


def find_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The number format called so; `auto` is bf16 on a GPU and fp32 on a CPU. Raises ConfigError if unknown."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: unknown; allowed are auto {' '.join(DTYPES)}")
    return DTYPES[dtype]


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by its dotted name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value))


def set_module(model: nn.Module, weight: str, layer: nn.Module) -> None:
    """Replace a matrix by the dotted name of its weight."""
    owner, _, leaf = weight.removesuffix(".weight").rpartition(".")
    setattr(model.get_submodule(owner), leaf, layer)
