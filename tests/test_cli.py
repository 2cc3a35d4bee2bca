"""The command line: help, reading flags and YAML, and what a user sees when something is wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import random_rwkv7
from rwkv_peft import __version__, cli
from rwkv_peft.cli import COMMANDS, main, parse
from rwkv_peft.config import ChatConfig, DemoConfig, GenerateConfig, MergeConfig, SamplingConfig, TrainConfig
from rwkv_peft.yaml_config import build, read_yaml, settings_of, to_yaml

NEEDED = ["--model", "m.pth", "--data", "d.jsonl", "--out", "o"]
HEAVY = ("torch", "triton", "numpy", "transformers", "peft", "datasets", "gradio", "safetensors", "matplotlib", "yaml")


@pytest.fixture
def failure(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Run a command line that must fail as all failures do, and return its message."""

    def run(argv: list[str]) -> str:
        code = main(argv)
        stderr = capsys.readouterr().err
        message, *pointer = stderr.splitlines()
        assert code == 2
        assert message.startswith("error: ")
        assert "Traceback" not in stderr
        assert pointer == [] or (len(pointer) == 1 and pointer[0].startswith("see: rwkv-peft "))
        return message.removeprefix("error: ")

    return run


def python(code: str, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, text=True, stderr=subprocess.PIPE, check=False, timeout=120, **options)


# --- help


@pytest.mark.parametrize("argv", [[], ["help"], ["--help"], ["-h"]])
def test_overview_names_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rwkv-peft {__version__}\n"


def test_help_of_train_shows_what_people_use_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    flags = set(re.findall(r"^  (--[a-z][a-z-]+)", shown, re.MULTILINE)) - {"--config", "--help-all"}
    assert 18 <= len(flags) <= 24
    assert "--help-all" in shown
    assert re.search(r"--ctx-len N +Longest row of a batch, in tokens\. \[1024\]", shown)
    assert "--adam-eps" not in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_help_all_shows_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help-all"]) == 0
    shown = capsys.readouterr().out
    for setting in settings_of(COMMANDS[name].kind):
        positional = setting in COMMANDS[name].positional
        assert (setting.upper() if positional else f"--{setting.replace('_', '-')}") in shown


@pytest.mark.parametrize(
    "argv", ["--help", "--version", "train --help", "train --rnak 3", "generate --help-all", "doctor --help"]
)
def test_help_and_usage_errors_import_nothing_heavy(argv: str) -> None:
    code = "import sys; from rwkv_peft.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = python(code, *argv.split(), stdout=subprocess.DEVNULL)
    assert done.returncode == 0
    assert not set(HEAVY) & set(done.stderr.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = python("import rwkv_peft, sys; print(*sys.modules, file=sys.stderr)")
    assert done.returncode == 0
    assert not set(HEAVY) & set(done.stderr.split())


# --- flags


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        ("", {}),
        ("--rank 8 --lr 1e-4", {"rank": 8, "lr": 1e-4}),
        ("--rank=8 --rank 16", {"rank": 16}),
        ("--ctx_len 64 --micro-batch 2", {"ctx_len": 64, "micro_batch": 2}),
        ("--grad-checkpoint block", {"grad_checkpoint": "block"}),
        ("--layerwise_lr --no-layerwise-lr", {"layerwise_lr": False}),
        ("--train-parts ln emb", {"train_parts": ("ln", "emb")}),
        ("--fields question answer --betas 0.9 0.95", {"fields": ("question", "answer"), "betas": (0.9, 0.95)}),
        ("--alpha 8 --alpha none --max-steps none", {}),
        ("--clip -1", {"clip": -1.0}),
        ("--data e.jsonl --data f.jsonl g.jsonl", {"data": [Path(f"{n}.jsonl") for n in "defg"]}),
    ],
)
def test_flags(argv: str, changes: dict[str, object]) -> None:
    assert parse("train", NEEDED + argv.split()) == replace(TrainConfig(*needed()), **changes)  # type: ignore[arg-type]


def needed() -> tuple[Path, list[Path], Path]:
    return Path("m.pth"), [Path("d.jsonl")], Path("o")


@pytest.mark.parametrize(
    "argv", ["b a o --overwrite", "--overwrite b --out o a", "--base b --adapter a --out o --overwrite"]
)
def test_positional_settings_may_be_flags(argv: str) -> None:
    config = parse("merge", argv.split())
    assert config == MergeConfig(Path("b"), [Path("a")], Path("o"), overwrite=True)


def test_sampling_is_flat_and_backslash_n_is_a_line_break() -> None:
    argv = ["--model", "m", "--prompt=-a\\nb", "--temperature", "0", "--stop", "\\n\\nUser:", "--seed=3"]
    sampling = SamplingConfig(temperature=0.0, stop=("\n\nUser:",), seed=3)
    assert parse("generate", argv) == GenerateConfig(Path("m"), sampling=sampling, prompt="-a\nb")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("trian", "trian: no such command; did you mean train?"),
        ("train", "--model --data --out: missing; .*--config"),
        ("train --model m --out o", "--data: missing"),
        ("train --rnak 3", "--rnak: unknown flag; did you mean --rank?"),
        ("train --sampling.temperature 3", "--sampling.temperature: unknown flag"),
        ("train --rank", "--rank: expected one argument"),
        ("train --rank --lr 3", "--rank: expected one argument"),
        ("train --data --lr 3", "--data: expected at least one argument"),
        ("train --rank x", "--rank x: must be a whole number"),
        ("train --rank 1.5", "--rank 1.5: must be a whole number"),
        ("train --lr fast", "--lr fast: must be a finite number"),
        ("train --lr nan", "--lr nan: must be a finite number"),
        ("train --out=", "--out '': must be a path"),
        ("train --peft lroa", "--model --data --out: missing"),
        ("train --betas 0.9", "--betas: expected 2 arguments"),
        ("train --rank 3 4", "'4': unexpected"),
        ("train d.jsonl", "'d.jsonl': unexpected"),
        ("merge b a", "--out: missing"),
        ("merge --adapter=a b o x", "'x': unexpected"),
        ("generate --model m --top_k 3", "--top-k: unknown flag; did you mean --top-p?"),
        ("train --config nope.yaml", "nope.yaml: cannot be read .*--config"),
    ],
)
def test_usage_errors(argv: str, message: str, failure: Callable[[list[str]], str]) -> None:
    assert re.match(message.replace("?", r"\?"), failure(argv.split()))


# --- YAML


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(*needed()),
        TrainConfig(
            Path("a: b.pth"), [Path("x"), Path("ünï.jsonl")], Path("o"), alpha=1e-9, targets=("att.key",),
            train_parts=(), fields=("yes", "1"), lr=1e-4, betas=(0.5, 1e-8), grad_checkpoint="block", max_steps=7,
        ),
        MergeConfig(Path("b"), [Path("a"), Path("c")], Path("o"), "fp16", True),
        GenerateConfig(Path("m"), sampling=SamplingConfig(7, 0.0, 0.25, ("\n\n", "null", "'"), 3), prompt="a\n\n b\\n"),
        ChatConfig(Path("m"), (Path("a"),), system="Sei höflich."),
        DemoConfig(),
    ],
)  # fmt: skip
def test_yaml_gives_back_what_was_written(config: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert build(type(config), read_yaml(file, type(config))) == config


def test_yaml_is_plain_and_complete() -> None:
    lines = to_yaml(TrainConfig(*needed())).splitlines()
    assert [line.partition(":")[0] for line in lines] == [field.name for field in fields(TrainConfig)]
    assert {"model: m.pth", "data: [d.jsonl]", "alpha: null", "train_parts: [auto]"} <= set(lines)


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: a.pth\ndata: [x.jsonl, y.jsonl]\nrank: 4\nlr: 1e-4\nctx-len: 128\ntrain_parts: none\n")
    argv = ["--config", str(file), "--rank", "8", "--out", "o", "--data", "z.jsonl"]
    expected = TrainConfig(
        Path("a.pth"), [Path("z.jsonl")], Path("o"), rank=8, lr=1e-4, ctx_len=128, train_parts=("none",)
    )
    assert parse("train", argv) == expected


@pytest.mark.parametrize("text", ["temperature: 0.5", "sampling: {temperature: 0.5}", "sampling:\n  temperature: 5e-1"])
def test_sampling_may_be_nested_in_yaml(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert parse("generate", ["--model", "m", "--config", str(file)]).sampling.temperature == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"rnak: 3", ": rnak is no setting; did you mean rank?"),
        (b"3: 3", ": 3 is no setting"),
        (b"rank: many", ": rank many: must be a whole number"),
        (b"rank: 3.5", ": rank 3.5: must be a whole number"),
        (b"rank: true", ": rank True: must be a whole number"),
        (b"rank:", ": rank null: must be a whole number"),
        (b"lr: .inf", ": lr inf: must be a finite number"),
        (b"lr: [1, 2]", ": lr 1 2: must be a finite number"),
        (b"layerwise_lr: 2", ": layerwise_lr 2: must be true or false"),
        (b"device: 0", ": device 0: must be text; put it in quotes"),
        (b"model: {a: b}", ": model {'a': 'b'}: must be a path"),
        (b"data: [a, 3]", ": data 3: must be text; put it in quotes"),
        (b"optim: adamm", ": optim adamm: allowed are adamw, "),
        (b"betas: [0.9]", ": betas 0.9: must be 2 values"),
        (b"- rank", ": holds rank; write one `name: value` a line"),
        (b"rank: 3\nlr: [1,\n", ":3: broken YAML"),
        (b"rank: !!python/object/apply:os.system ['true']", ":1: broken YAML"),
        (b"rank: \xff", ": is not UTF-8"),
    ],
)
def test_yaml_errors(text: bytes, message: str, tmp_path: Path, failure: Callable[[list[str]], str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text)
    assert failure(["train", *NEEDED, "--config", str(file)]).startswith(f"{file}{message}")


def test_an_empty_yaml_file_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("# nothing\n")
    assert read_yaml(file, TrainConfig) == {}


# --- what goes wrong in a training run: one line, exit code 2, nothing left behind

GOOD = '{"text": "hello"}\n'
Setup = Callable[[Path], list[str]]


def model(change: Callable[[dict[str, Tensor]], object], **sizes: Any) -> Setup:
    """A model file whose tensors were changed."""

    def setup(folder: Path) -> list[str]:
        tensors = random_rwkv7(**sizes)
        change(tensors)
        torch.save(tensors, folder / "changed.pth")
        return ["--model", str(folder / "changed.pth")]

    return setup


def data(text: str, *flags: str) -> Setup:
    """A data file with this text."""

    def setup(folder: Path) -> list[str]:
        (folder / "changed.jsonl").write_text(text, encoding="utf-8")
        return ["--data", str(folder / "changed.jsonl"), *flags]

    return setup


def truncated(folder: Path) -> list[str]:
    content = (folder / "base.pth").read_bytes()
    (folder / "cut.pth").write_bytes(content[: len(content) // 2])
    return ["--model", str(folder / "cut.pth")]


class Bomb:
    """Runs a program when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def code_in_pickle(folder: Path) -> list[str]:
    torch.save({"emb.weight": Bomb(folder / "code-ran")}, folder / "bomb.pth")
    return ["--model", str(folder / "bomb.pth")]


def set_nan(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.1.ffn.key.weight"][3, 5] = torch.nan


def other_architecture(tensors: dict[str, Tensor]) -> None:
    tensors.clear()
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(4, 4)


WRONG_INPUT: dict[str, tuple[Setup, str]] = {
    "missing model": (lambda folder: ["--model", str(folder / "bsae.pth")], r"bsae\.pth: no such file.*base\.pth"),
    "folder as model": (lambda folder: ["--model", str(folder)], r": is a folder"),
    "truncated .pth": (truncated, r"cut\.pth: is cut off or damaged"),
    "code in a pickle": (code_in_pickle, r"bomb\.pth: holds Python code \(\w+\.system\), which is never run"),
    "other architecture": (model(other_architecture), r"changed\.pth: .*RWKV"),
    "wrong shape": (
        model(lambda t: t.update({"blocks.1.att.key.weight": torch.zeros(64, 63)})),
        r"changed\.pth: tensor blocks\.1\.att\.key\.weight has shape \(64, 63\)",
    ),
    "missing tensor": (
        model(lambda t: t.pop("blocks.1.att.w2")), r"changed\.pth: tensor blocks\.1\.att\.w2 is missing",
    ),
    "NaN in a weight": (model(set_nan), r"changed\.pth: tensor blocks\.1\.ffn\.key\.weight holds 1 NaN"),
    "missing data": (lambda folder: ["--data", str(folder / "nope.jsonl")], r"nope\.jsonl: no such file"),
    "empty data": (data(""), r"changed\.jsonl: .*no lines"),
    "broken JSON": (data(GOOD + '{"text": \n'), r"changed\.jsonl:2: broken JSON"),
    "only bad lines": (data("{\n[]\n", "--on-bad-line", "skip"), r"changed\.jsonl:1: .*2 skipped"),
    "no such field": (data('{"q": "a", "a": "b"}\n', "--fields", "question", "a"), r"changed\.jsonl:1: .*'question'"),
    "unknown form": (data('{"input": "a"}\n'), r"changed\.jsonl:1: .*'text'.*--fields"),
    "no answer tokens": (data('{"prompt": "a", "response": ""}\n'), r"changed\.jsonl:1: no answer tokens"),
    "no assistant": (
        data('{"messages": [{"role": "user", "content": "a"}]}\n'), r"changed\.jsonl:1: no answer tokens",
    ),
    "unknown flag": (lambda folder: ["--rnak", "3"], r"--rnak: unknown flag; did you mean --rank\?"),
    "rank 0": (lambda folder: ["--rank", "0"], r"--rank 0: must be at least 1; try"),
    "lr 0": (lambda folder: ["--lr", "0"], r"--lr 0\.0: must be above 0"),
    "beta 1.5": (lambda folder: ["--betas", "0.9", "1.5"], r"--betas 0\.9 1\.5: both must be .*try"),
    "epsilon 0": (lambda folder: ["--adam-eps", "0"], r"--adam-eps 0\.0: must be above 0; try"),
    "no such part": (lambda folder: ["--train-parts", "ln", "hed"], r"--train-parts hed: allowed are"),
    "no such target": (lambda folder: ["--targets", "att.kye"], r"--targets att\.kye: "),
    "no such device": (lambda folder: ["--device", "gpu"], r"--device gpu: "),
}  # fmt: skip


@pytest.fixture
def command(tmp_path: Path, model_file: Callable[..., Path]) -> list[str]:
    """A training run that would work."""
    (tmp_path / "good.jsonl").write_text(GOOD * 4, encoding="utf-8")
    files = ["--model", str(model_file()), "--data", str(tmp_path / "good.jsonl"), "--out", str(tmp_path / "out")]
    return ["train", *files, "--rank", "4", "--max-steps", "1", "--device", "cpu"]


def override(command: list[str], changes: list[str]) -> list[str]:
    """A command with other values for some flags; of --data, the new files only."""
    if "--data" in changes:
        at = command.index("--data")
        command = command[:at] + command[at + 2 :]
    return command + changes


@pytest.mark.parametrize("case", WRONG_INPUT)
def test_wrong_input(case: str, command: list[str], tmp_path: Path, failure: Callable[[list[str]], str]) -> None:
    setup, message = WRONG_INPUT[case]
    argv = override(command, setup(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert re.search(message, failure(argv))
    assert sorted(tmp_path.rglob("*")) == before  # no --out, no file beside it, and no code has run


def test_the_command_of_these_tests_works(command: list[str], tmp_path: Path) -> None:
    assert main(command) == 0
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"adapter", "config.yaml", "log.txt", "loss.png", "metrics.jsonl"}
    assert main(["train", "--config", str(tmp_path / "out/config.yaml"), "--out", str(tmp_path / "again")]) == 0
    first, again = ((tmp_path / run / "metrics.jsonl").read_text() for run in ("out", "again"))
    assert json.loads(first)["loss"] == json.loads(again)["loss"]


def test_settings_without_effect_are_named(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--peft", "full"]) == 0
    assert "--rank: no effect with --peft full" in capsys.readouterr().out


def test_skipped_lines_are_counted(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = data(GOOD + "{\n" + GOOD + "3\n", "--on-bad-line", "skip")(tmp_path)
    assert main(override(command, changes)) == 0
    assert "2 bad lines skipped" in capsys.readouterr().out


@pytest.mark.parametrize("held", ["config.yaml", "notes.txt"])
def test_a_folder_in_use_is_left_alone(
    held: str, command: list[str], tmp_path: Path, failure: Callable[[list[str]], str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / held).write_text("precious")
    assert re.search(r"--out \S+out: holds (another run|files already); name a new folder", failure(command))
    assert [(path.name, path.read_text()) for path in (tmp_path / "out").iterdir()] == [(held, "precious")]


# --- a full disk


def test_too_little_room_is_seen_before_the_run(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Callable[[list[str]], str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**6, used=10**6 - 99, free=99))
    assert re.search(r"--out \S+out: .* the disk has 99 free; make room", failure(command))
    assert not (tmp_path / "out").exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Lets no file grow beyond `size` bytes, so that a write fails in the middle, as on a full disk.

    For the command alone: what pytest prints may go to a file too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_at_the_first_step_leaves_nothing(
    command: list[str],
    tmp_path: Path,
    failure: Callable[[list[str]], str],
) -> None:
    with largest_file(100):
        message = failure(command)
    assert re.search(r"out\S*: cannot be written", message)
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_at_the_end_leaves_no_half_adapter(
    command: list[str],
    tmp_path: Path,
    failure: Callable[[list[str]], str],
) -> None:
    with largest_file(4000):  # room for the metrics, not for the adapter
        message = failure(command)
    assert re.search(r"adapter\S*: cannot be written", message)
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == {"config.yaml", "log.txt", "metrics.jsonl"}


def test_a_full_file_system(command: list[str], tmp_path: Path, failure: Callable[[list[str]], str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False,
                                   capture_output=True).returncode:  # fmt: skip
        pytest.skip("may not mount a small file system here")
    try:
        assert re.search(r"--out \S+out: .*free; make room", failure([*command, "--out", str(disk / "out")]))
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


# --- how a run ends


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, None),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), 2, "--grad-checkpoint"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 2, "--micro-batch"),
        (MemoryError(), 2, "--ctx-len"),
    ],
)
def test_a_run_that_breaks_off(
    error: BaseException, code: int, message: str | None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def train(config: TrainConfig) -> None:
        raise error

    monkeypatch.setattr("rwkv_peft.training.run.train", train)
    assert main(["train", *NEEDED]) == code
    stderr = capsys.readouterr().err
    assert stderr == "" if message is None else (stderr.startswith("error: out of memory; ") and message in stderr)


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config: TrainConfig) -> None:
        raise RuntimeError("a mistake in this program")

    monkeypatch.setattr("rwkv_peft.training.run.train", train)
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["train", *NEEDED])


@pytest.mark.parametrize(("interrupted", "code"), [(False, 0), (True, 130)])
def test_a_run_stopped_by_hand(interrupted: bool, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_peft.training.run.train", lambda config: SimpleNamespace(interrupted=interrupted))
    assert main(["train", *NEEDED]) == code


def test_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_peft", "train", "--help"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (cli.PIPE_CLOSED, b"")


def test_a_character_that_the_terminal_lacks() -> None:
    code = "from rwkv_peft import cli; cli.overview = lambda: 'ü'; cli.main([])"
    done = python(code, env={**os.environ, "PYTHONIOENCODING": "ascii"}, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "?\n", "")


def test_the_python_door_takes_text_for_paths() -> None:
    assert TrainConfig(model="m.pth", data=["d.jsonl"], out="o") == TrainConfig(*needed())  # type: ignore[arg-type]


def test_the_python_door_takes_one_value_for_several() -> None:
    config = TrainConfig("m.pth", "d.jsonl", "o", targets="att.key", train_parts=["none"])  # type: ignore[arg-type]
    assert (config.data, config.targets, config.parts()) == (["d.jsonl"], ("att.key",), ())
