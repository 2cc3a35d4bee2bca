"""From a model file to a model: find the version, read the sizes from the tensors, check, cast and place each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapters.state_tuning import add_shift, add_state
from .checkpoint import DTYPES, check_finite, fingerprint, read_header, read_tensors
from .errors import CheckpointError, ConfigError
from .models import STATES, Rwkv, Sizes, find_version
from .ops import choose_backend


def load_model(
    path: Path | str, dtype: str = "fp32", device: str = "cpu", op: str = "auto", quant: str = "none"
) -> Rwkv:
    """The model in a `.pth` or `.safetensors` file, in eval mode; it begins in the learned state that the file holds.

    Arguments:
        dtype: `fp32`, `bf16` or `fp16`, for weights and activations; `auto` is bf16 on a GPU and fp32 on a CPU.
        device: `cpu`, `cuda`, `cuda:N`, or `auto`.
        op: backend of the recurrence, a key of `ops.BACKENDS`, or `auto`.
        quant: `none`; other forms are not there yet.

    Raises CheckpointError if the file is no whole model of a known version, ConfigError for the other arguments.
    """
    if quant != "none":
        raise ConfigError(f"--quant {quant}: only none is there yet; leave it out")
    place = find_device(device)
    number = find_dtype(dtype, place)
    tensors = read_tensors(path)
    kind, sizes = check_model(path, tensors)
    model = without_values(kind, sizes, tensors)
    backend = choose_backend(op, place, sizes.head_size)
    for name in [n for n, _ in model.named_parameters()]:
        check_finite(path, name, tensors[name])
        kept = torch.float32 if name.endswith(STATES) else number
        # a copy, since the file behind a mapped tensor may change
        value = tensors[name].to(place, kept, copy=True, memory_format=torch.contiguous_format)
        set_parameter(model, name, value)
    model.like = torch.empty(0, dtype=number, device=place)
    model.op, model.fingerprint, model.source = backend, fingerprint(tensors), Path(path).name
    return model.eval()


def read_sizes(path: Path | str) -> Sizes:
    """The sizes of the model in a file, from its header alone. Raises CheckpointError as `load_model` does."""
    return check_model(path, read_header(path))[1]


def check_model(path: Path | str, tensors: Mapping[str, Tensor]) -> tuple[type[Rwkv], Sizes]:
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
