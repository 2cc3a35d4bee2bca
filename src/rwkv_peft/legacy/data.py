"""What an old command line trains on: where examples come from, how they fill rows, and which tokens count."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Literal

from ..errors import ConfigError
from ..yaml_config import suggestion
from .line import Old, Values

Kind = Literal["sft", "jsonl", "binidx", "text"]

# Files that say by their suffix that each of their lines, items or rows is an example
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKERS = (".gz", ".zst")
REFUSED = ("numpy", "uint16", "dummy", "wds_img")
UTF8 = ("utf-8", "utf-8-sig", "ascii")
SAMPLING = {"pad": "pad", "get": "get", "only": "only"}
MASKS = {"none": "auto", "pad": "pad", "qa": "qa", "se": "se"}
WHOLE = {"overlong": "truncate"}  # rows of whole examples: what is longer was cut


def data_of(old: Old) -> Values:
    """Source, fields, template, rows and mask. Raises ConfigError for what is not there, or cannot be."""
    kind = kind_of(old)
    values: Values = {"data": [old["data_file"]], "ctx_len": old["ctx_len"], **fields_of(old, kind)}
    if "sft_split" in old:
        values["split"] = old["sft_split"]
    return values | rows_of(old, kind) | mask_of(old, kind)


def kind_of(old: Old) -> Kind:
    """How the data is to be read. Raises ConfigError if that is not there, or if a file that it needs is not."""
    name, said = old["data_file"], old["data_type"]
    path = Path(name)
    form = table_form(path)
    if "data_type" not in old and (form or what_is_at(name) == "folder"):
        return "jsonl"
    if said in ("sft", "jsonl"):
        check_named(name)
        return "sft" if said == "sft" else "jsonl"
    if form:
        old.note("data_type", f"{path.name} is {form}, and read as such")
        return "binidx" if said == "binidx" else "jsonl"
    if said in REFUSED:
        raise ConfigError(
            f"--data_type {said}: such data is not read here; name a JSONL file, or turn the text into binidx with "
            "`rwkv-peft prepare` and write --data_type binidx"
        )
    check_named(name)
    if said == "binidx":
        prefix = name.removesuffix(".bin").removesuffix(".idx")
        if what_is_at(name) != "folder" and not what_is_at(f"{prefix}.idx"):
            raise ConfigError(f"--data_file {name}: no file {prefix}.idx; name the PREFIX of PREFIX.bin and PREFIX.idx")
        return "binidx"
    check_text(old, name)
    return "text"


def table_form(path: Path) -> str:
    """JSONL, CSV or the like if the suffix says so, else nothing; a packed file is what is in it."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKERS:
        suffixes.pop()
    return suffixes[-1][1:].upper() if suffixes and suffixes[-1] in TABLES else ""


def what_is_at(name: str) -> Literal["folder", "file", ""]:
    """What a path leads to; nothing, too, for what can be no path, such as a name too long."""
    try:
        return "folder" if Path(name).is_dir() else "file" if Path(name).exists() else ""
    except (OSError, ValueError):
        return ""


def check_named(name: str) -> None:
    """Raise ConfigError if there is no name."""
    if not name:
        raise ConfigError("--data_file: missing; name a JSONL file, a binidx prefix or a text file")


def check_text(old: Old, name: str) -> None:
    """Raise ConfigError unless the data is text in UTF-8; note what is new about it."""
    said = old["data_type"]
    try:
        encoding = codecs.lookup(said).name
    except (LookupError, ValueError):  # the latter for a NUL in it
        raise ConfigError(
            f"{old.shown('data_type')}: no data type and no encoding; allowed are sft jsonl binidx utf-8"
        ) from None
    if encoding not in UTF8:
        raise ConfigError(
            f"--data_type {said}: only text in UTF-8 is read; turn the file into it (iconv -f {said} -t utf-8), and "
            "write --data_type utf-8"
        )
    if not what_is_at(name):
        raise ConfigError(
            f"--data_file {name}: no such file, which --data_type {said} reads as text; for binidx or a dataset of the "
            "Hugging Face hub, write --data_type binidx or sft"
        )
    old.notes.append(
        f"--data_type {said}: text, read with the model's tokenizer; the original made a vocabulary of its letters, "
        "for a model that begins anew"
    )


def fields_of(old: Old, kind: Kind) -> Values:
    """The fields of a line, and the form in which they become text."""
    if "sft_field" not in old:
        if kind == "sft":
            old.note("data_type", "prompts take RWKV's own form, User: … Assistant: …, and answers end with token 0")
        return {}
    fields = old["sft_field"]
    if len(fields) != 2:
        raise ConfigError(f"{old.shown('sft_field')}: must be 2 fields, the prompt's and the answer's")
    if kind == "sft":
        return {"fields": fields, "template": "instruction"}
    if kind == "jsonl" or table_form(Path(old["data_file"])):
        return {"fields": fields}
    old.note("sft_field", f"no effect, as in the original: {kind} has no fields")
    return {}


def rows_of(old: Old, kind: Kind) -> Values:
    """How examples fill rows: for binidx as --dataload says, of which the original took no notice otherwise."""
    sampling, given = old.choice("dataload", SAMPLING), "dataload" in old
    if kind == "text":
        if given and sampling != "get":
            old.note("dataload", "no effect on text, as in the original: a row is a window of it, taken at random")
        sampling = "get"
    elif kind != "binidx":
        if given and sampling != "pad":
            old.note("dataload", "a row is one example, padded, as in the original; only binidx has a choice")
        sampling = "pad"
    if sampling == "only" and old["micro_bsz"] != 1:
        raise ConfigError(f"--micro_bsz {old['micro_bsz']}: must be 1 with --dataload only; write --micro_bsz 1")
    return {"sampling": sampling} | ({"windows": "random"} if sampling == "get" else WHOLE)


def mask_of(old: Old, kind: Kind) -> Values:
    """Which tokens count."""
    mask = old.choice("loss_mask", MASKS)
    if kind == "sft" and mask != "auto":
        old.note("loss_mask", "no effect with --data_type sft, as in the original: the answers train, and all of them")
        mask = "auto"
    elif kind == "jsonl" and mask in ("qa", "se"):
        old.note("loss_mask", "holds for JSONL too, of which the original trained on all of each text")
    if mask == "se":
        return {"mask": mask, "mask_id": marks_of(old)}
    if old["mask_id"] != Old({})["mask_id"]:
        of_qa = ", and for --loss_mask qa it is User: and Assistant:, as in the original" if mask == "qa" else ""
        old.note("mask_id", f"no effect: it is for --loss_mask se{of_qa}")
    return {"mask": mask}


def marks_of(old: Old) -> str:
    """The texts of --mask_id, as --mask-id takes them. Raises ConfigError if it has others, or none."""
    defaults, marks = Old({})["mask_id"], old["mask_id"]
    for key, text in marks.items():
        if key not in defaults:
            known = " ".join(defaults)
            raise ConfigError(f"--mask_id: {key} is no key of it{suggestion(key, defaults)}; allowed are {known}")
        if not isinstance(text, str) or not text:
            raise ConfigError(f"--mask_id {key} {json.dumps(text)}: must be a text, and not empty")
    return json.dumps({key: marks[key] for key in defaults}, ensure_ascii=False)
