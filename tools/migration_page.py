"""Write docs/migration.md from the table of the original's flags: python tools/migration_page.py [FILE]"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkv_peft.config import TrainConfig, flag_of
from rwkv_peft.legacy import SECTIONS, translate
from rwkv_peft.legacy.table import Row
from rwkv_peft.yaml_config import convert, settings_of

PAGE = Path(__file__).parents[1] / "docs" / "migration.md"
INTRO = """\
# From the original's command line

`python train.py …` and `rwkv-peft train …` take the flags of the original program, RWKV-PEFT, as they are. A line is
read so when it has a flag that only the original had, e.g. `--load_model`. Flags that both have then mean what they
meant there, and those that are left out have the original's default. A line with flags of both kinds is an error.

For each flag that has no effect here, or none yet, a line is printed. The run's `config.yaml` holds the settings that
the line was translated to: `rwkv-peft train --config OUT/config.yaml --out NEW` does the same again.

This page is made by `tools/migration_page.py` from the table that reads the lines, `src/rwkv_peft/legacy/table.py`.
"""
COMMON = (
    "python train.py --load_model model.pth --proj_dir out --data_file data.jsonl --n_layer 24 --n_embd 2048 "
    "--vocab_size 65536 --ctx_len 512 --micro_bsz 8 --epoch_steps 1000 --epoch_count 1 --my_testing x070"
)
EXAMPLES = {
    "LoRA": "--data_type jsonl --lr_init 5e-5 --lr_final 5e-5 --precision bf16 --grad_cp 1 --peft lora "
    """--lora_config '{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_dropout":0.0}'""",
    "Bone on questions and answers": "--data_type sft --sft_field query response --sft_split train[:1000] "
    """--lr_init 2e-5 --lr_final 2e-5 --peft disha --disha_config '{"mode":"bone","load":"","r":64}'""",
    "MiSS": """--data_type jsonl --lr_init 1e-4 --lr_final 1e-5 --peft miss --peft_config '{"r":8}'""",
    "State tuning": "--data_type jsonl --lr_init 1 --lr_final 1e-2 --warmup_steps 10 --train_type state --op fla",
    "All weights": "--data_type jsonl --lr_init 1e-5 --lr_final 1e-6 --lr_schedule wsd",
}


def page() -> str:
    """The whole page."""
    parts = [INTRO, "## Examples", *examples(), "## Flags", *tables()]
    return "\n".join(parts)


def examples() -> Iterator[str]:
    """Old lines, and what `translate` makes of them."""
    for title, flags in EXAMPLES.items():
        line = f"{COMMON} {flags}"
        new = todays_line(translate(shlex.split(line)[2:]).values)
        yield f"\n{title}:\n\n```bash\n{wrap(line)}\n# today\n{wrap(new)}\n```"
    yield ""


def todays_line(values: Mapping[str, Any]) -> str:
    """A command line of today with these settings, but for those that are the defaults."""
    words = ["rwkv-peft train"]
    for name, setting in settings_of(TrainConfig).items():
        if name not in values or convert(values[name], setting.hint, name) == setting.default:
            continue
        value = values[name]
        if isinstance(value, bool):
            words.append(flag_of(name if value else f"no-{name}"))
        else:
            several = value if isinstance(value, list) else [value]
            words.append(" ".join([flag_of(name), *(shlex.quote(text_of(one)) for one in several)]))
    return " ".join(words)


def text_of(value: object) -> str:
    """A value as people write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def wrap(line: str, width: int = 110) -> str:
    """A long line in pieces, each but the last with a backslash at its end, cut before flags."""
    first, *parts = line.split(" --")
    pieces = [first]
    for part in parts:
        if len(pieces[-1]) + len(part) + 3 > width:
            pieces.append(" ")
        pieces[-1] += f" --{part}"
    return " \\\n".join(pieces)


def tables() -> Iterator[str]:
    """A table a section."""
    for title, rows in SECTIONS.items():
        yield f"\n### {title}\n\n| flag | its default | today | |\n|---|---|---|---|"
        for name, row in rows.items():
            yield f"| `--{name}` | {f'`{row.default}`' if row.default else ''} | {today(row)} | {sentence(row)} |"
    yield ""


def today(row: Row) -> str:
    """The settings that a flag is now."""
    flags = " ".join(f"`{flag_of(name)}`" for name in row.settings)
    words = {"mapped": flags, "checked": "checked", "explained": "no effect", "later": f"not yet {flags}".rstrip()}
    return words[row.kind]


def sentence(row: Row) -> str:
    """A flag's explanation, with a capital and a full stop."""
    text = row.text
    if row.kind in ("explained", "later"):
        text = re.sub(r"(?<![`\w])--[a-z_-]+", r"`\g<0>`", text) + "."
    return (text[0].upper() + text[1:]).replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(page(), encoding="utf-8")
