"""What a model, adapter or state file is, told in a few lines. Nothing in a file is ever executed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from ..adapters.folder import FILES
from ..adapters.original import OFFICIAL, PART, read_original
from ..adapters.reading import read_adapter
from ..adapters.saved import PREFIX, SavedAdapter
from ..checkpoint import NAMES, SUFFIXES, fingerprint
from ..config import FOREIGN, AdapterConfig
from ..data.dataset import plural
from ..errors import CheckpointError
from ..export.states import load_state
from ..loading import check_model
from ..models import STATES, Sizes, find_version
from ..packed import Entry, Packed, fingerprint_of, read_model

Row = tuple[str, str]
"""A label and what stands behind it."""

ADAPTED = re.compile(r"(?:^|\.)blocks\.\d+\.(?:att|ffn)\.\w+\.(?:init_)?(?:lora_[AB]|bone|disha)(?:\.|$)")
DATA = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".idx", ".gz", ".zst")  # never in the folder of a model
MOST_TARGETS = 12


def is_weights(path: str) -> bool:
    """Whether a path is meant as a model, adapter or state: by its ending, or by what the folder holds."""
    names = _names_in(Path(path))
    is_of_models = any(name.endswith(SUFFIXES) for name in names) and not any(name.endswith(DATA) for name in names)
    return Path(path).suffix in SUFFIXES or bool(names & set(FILES)) or is_of_models


def is_run(path: str) -> bool:
    """Whether a path is the folder of a training run."""
    return {"config.yaml", "metrics.jsonl"} <= _names_in(Path(path))


def is_best(path: str) -> bool:
    """Whether a path is what a run has kept as its best: a folder that holds an adapter folder or a model only."""
    names = _names_in(Path(path))
    return names == {"model.pth"} or (names == {"adapter"} and bool(_names_in(Path(path) / "adapter") & set(FILES)))


def weights_of_run(path: str) -> list[str]:
    """The adapters and models that a run has written, the last and then the best; or of its best those alone.

    Raises CheckpointError if there is none.
    """
    places = [folder / name for folder in (Path(path), Path(path, "best")) for name in ("adapter", "model.pth")]
    found = [str(place) for place in places if place.exists()]
    if not found:
        raise CheckpointError(f"{path}: is the folder of a run that has written nothing yet; name a file to look at")
    return found


def _names_in(folder: Path) -> set[str]:
    try:
        return {found.name for found in folder.iterdir()} if folder.is_dir() else set()
    except OSError:
        return set()


def weights_rows(path: str) -> Iterator[Row]:
    """What there is to tell of a model, adapter or state.

    Raises CheckpointError if it is damaged, or nothing that we know; a model that cannot be used for a lesser reason is
    told of first.
    """
    place = Path(path)
    if _names_in(place) & set(FILES):
        yield from adapter_rows(place)
        return
    if place.name in FILES and place.name != "state.pth" and is_weights(str(place.parent)):
        yield "taken for", f"the adapter in the folder {place.parent}"
        yield from adapter_rows(place.parent)
        return
    entries = read_model(place)
    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, Tensor)}
    if len(tensors) < len(entries):
        yield from model_rows(place, entries)
    elif tensors and all(name.endswith(STATES) and name.startswith("blocks.") for name in tensors):
        yield from state_rows(place, tensors)
    elif tensors and (any(map(ADAPTED.search, tensors)) or all(map(is_part, tensors))):
        yield from original_rows(place, tensors)
    else:
        yield from model_rows(place, entries)


def is_part(name: str) -> bool:
    """Whether a tensor is one that the original program trains in full beside an adapter."""
    found = OFFICIAL.search(name)
    return found is not None and PART.fullmatch(found[1]) is not None


def model_rows(path: Path, tensors: Mapping[str, Entry]) -> Iterator[Row]:
    """Of a whole model."""
    try:
        kind = find_version(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    try:
        _, sizes = check_model(path, tensors)
        problem = None
    except CheckpointError as error:
        sizes, problem = None, error
    yield "model", f"{kind.title} ({kind.version})" + (", cannot be used as it is" if problem else "")
    if sizes is not None:
        yield from size_rows(sizes)
    if states := [name for name in tensors if name.endswith(STATES)]:
        yield "begins", f"in a learned state ({plural(len(states), 'tensor')})"
    parts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        parts["unused" if name in kind.unused else model_part(name)] += tensor.numel()
    yield from format_rows(tensors.values())
    yield from parameter_rows(parts)
    yield from file_rows([path], fingerprint_of(path))
    if problem is not None:
        raise problem


def size_rows(sizes: Sizes) -> Iterator[Row]:
    """The sizes of a model."""
    yield "layers", f"{sizes.layers}"
    yield "width", f"{sizes.width}: {sizes.heads} heads of {sizes.head_size}"
    yield "ffn", f"{sizes.ffn}"
    yield "vocabulary", f"{sizes.vocab_size:,}"
    known = {field.name for field in fields(Sizes)}
    ranks = [field.name for field in fields(sizes) if field.name not in known]
    if ranks:
        yield "low ranks", ", ".join(f"{name.removeprefix('rank_')} {getattr(sizes, name)}" for name in ranks)


def model_part(name: str) -> str:
    """The part of a model that a tensor belongs to."""
    if name.endswith(STATES):
        return "state"
    first, *rest = name.split(".")
    if first in ("emb", "head"):
        return first
    return next((part for part in ("att", "ffn") if part in rest[1:2]), "ln, other")


def adapter_rows(folder: Path) -> Iterator[Row]:
    """Of an adapter folder."""
    saved = read_adapter(folder)
    settings = json.loads(text) if (text := _text_of(folder / "adapter_config.json")) else {}
    yield from saved_rows(saved, {**saved.tensors, **saved.parts})
    source = settings.get("base_model_name_or_path")
    name = source if isinstance(source, str) and source else "of unknown name"
    yield "base", f"{name}, fingerprint {saved.base}" if saved.base else f"{name}, without a fingerprint"
    files = [folder / file for file in FILES if (folder / file).exists()]
    yield from file_rows(files, fingerprint({**saved.tensors, **saved.parts}))


def original_rows(path: Path, tensors: Mapping[str, Tensor]) -> Iterator[Row]:
    """Of an adapter of the original program, which does not hold its alpha nor its base."""
    if all(name.startswith(PREFIX) for name in tensors):
        raise CheckpointError(
            f"{path}: is the file of an adapter folder without its adapter_config.json; copy it whole"
        )
    no_alpha = False
    try:
        saved = read_original(path)
    except CheckpointError:
        if not any(".lora_A" in name for name in tensors):
            raise
        saved, no_alpha = read_original(path, alpha=1.0), True  # it was this, or this raises what is wrong
    yield "taken for", "an adapter of the original program (RWKV-PEFT)"
    yield from saved_rows(saved, tensors, no_alpha)
    yield "base", "not told by the file"
    yield from file_rows([path], fingerprint(tensors))


def saved_rows(saved: SavedAdapter, stored: Mapping[str, Tensor], no_alpha: bool = False) -> Iterator[Row]:
    """The method of an adapter, what it changes, and how many parameters are `stored` of it."""
    config = saved.config
    yield "adapter", "parts of the model, trained in full" if config is None else method_text(config, no_alpha)
    if config is not None and config.targets:
        yield "targets", targets_text(config.targets)
    elif saved.tensors:
        yield "targets", f"{plural(len(saved.tensors), 'tensor')}, e.g. {min(saved.tensors)}"
    parts = Counter(trained_part(name) for name in saved.parts)
    if parts:
        yield "parts", ", ".join(f"{part} ({plural(count, 'tensor')})" for part, count in parts.items())
    yield from format_rows(stored.values())
    numbers: Counter[str] = Counter()
    for name, tensor in saved.parts.items():
        numbers[trained_part(name)] += tensor.numel()
    own = sum(tensor.numel() for tensor in stored.values()) - numbers.total()
    yield from parameter_rows(numbers + Counter({"adapter": own}))


def method_text(config: AdapterConfig, no_alpha: bool) -> str:
    """The method and its settings."""
    if config.peft == "state":
        return "state: the state that every text begins with is learned"
    if config.peft.startswith(FOREIGN):
        plain = {key: value for key, value in config.peft_config.items() if isinstance(value, int | float | str)}
        return ", ".join([config.peft, *(f"{key} {value}" for key, value in plain.items() if value not in ("", False))])
    words = [config.peft, f"rank {config.rank}"]
    if no_alpha:
        words.append("alpha not told by the file")
    elif config.peft in ("lora", "pissa"):
        alpha = config.alpha if config.alpha is not None else config.scale * config.rank
        words.append(f"alpha {alpha:g}, scale {config.scale:g}")
    words += [text for text, is_so in (("rank-stabilised", config.rank_stabilised), ("DoRA", config.dora)) if is_so]
    return ", ".join(words)


def targets_text(targets: Iterable[str]) -> str:
    """The kinds of matrices that are adapted, and how many there are."""
    kinds = Counter(".".join(target.split(".")[2:]) or target for target in targets)
    shown = [kind if count > 1 else next(t for t in targets if t.endswith(kind)) for kind, count in kinds.items()]
    more = f" and {len(shown) - MOST_TARGETS} more" if len(shown) > MOST_TARGETS else ""
    return f"{sum(kinds.values())} matrices: {', '.join(shown[:MOST_TARGETS])}{more}"


def trained_part(name: str) -> str:
    """The part that a tensor trained in full belongs to, as --train-parts calls it."""
    if name.endswith(STATES):
        return "state" if name.endswith(STATES[0]) else "shift"
    if name in ("emb.weight", "head.weight"):
        return name.split(".", maxsplit=1)[0]
    return "ln" if re.search(r"(?:^|\.)ln[_\w]*\.(?:weight|bias)$", name) else "time"


def state_rows(path: Path, tensors: Mapping[str, Tensor]) -> Iterator[Row]:
    """Of a state file."""
    state = load_state(path)
    layers, _, heads, size, _ = state.wkv.shape
    shift = "learned too" if bool(state.shift.any()) else "zero"
    yield "state", f"{plural(layers, 'layer')}, {plural(heads, 'head')} of {size} by {size}; token shifts {shift}"
    yield "layout", "row = value index, column = key index (blocks.N.att.time_state)"
    norms = state.wkv.flatten(1).norm(dim=1).tolist()
    for layer in range(0, layers, 8):
        yield f"norm {layer}", "  ".join(f"{norm:.4g}" for norm in norms[layer : layer + 8])
    yield from format_rows(tensors.values())
    yield from file_rows([path], fingerprint(tensors))


def format_rows(tensors: Iterable[Entry]) -> Iterator[Row]:
    """Number formats, by how many tensors have them."""
    counts = Counter(t.quant if isinstance(t, Packed) else NAMES.get(t.dtype, str(t.dtype)[6:]) for t in tensors)
    yield "formats", ", ".join(f"{name} ({plural(count, 'tensor')})" for name, count in counts.most_common())


def parameter_rows(parts: Counter[str]) -> Iterator[Row]:
    """Parameters of each part, the largest first, and of all."""
    total = parts.total()
    yield "parameters", f"{total:>15,}"
    if len(parts) > 1:
        for part, count in parts.most_common():
            yield f"  {part}", f"{count:>15,}  {count / total:6.1%}"


def file_rows(paths: list[Path], name: str) -> Iterator[Row]:
    """Size and fingerprint."""
    size = sum(path.stat().st_size for path in paths)
    unit, letters = next(
        ((2**n, f"{letter}iB") for n, letter in ((30, "G"), (20, "M"), (10, "K")) if size >= 2**n), (1, "")
    )
    yield "size", f"{size:,} bytes" + (f" ({size / unit:.1f} {letters})" if letters else "")
    yield "fingerprint", name


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
