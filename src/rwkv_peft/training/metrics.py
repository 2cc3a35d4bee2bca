"""What a run tells: the progress bar, metrics.jsonl, loss.png and log.txt."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..files import output_errors, write_atomic

GIB = 2**30


@dataclass
class StepRecord:
    """One line of metrics.jsonl."""

    step: int
    tokens: int
    """Tokens seen since the run began, padding not counted."""
    loss: float
    """Mean cross-entropy of the step's target tokens, in nats."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens_per_s: float
    vram_gib: float | None = None
    """Peak memory allocated on the GPU; null on a CPU."""
    eval_loss: float | None = None
    """Mean cross-entropy on the examples for evaluation, after this step; null where it was not measured."""
    eval_perplexity: float | None = None


def perplexity(loss: float) -> float:
    """Of a loss in nats; infinite where it is too large for a number."""
    return math.exp(loss) if loss < 700 else math.inf


class Metrics:
    """Shows and records the steps. The folder is made when the first step is done: a run that fails before has none."""

    def __init__(
        self, folder: Path, config_text: str, total_steps: int, device: torch.device, console: Console
    ) -> None:
        self.folder, self.config_text, self.total_steps = folder, config_text, total_steps
        self.device, self.console = device, console
        self.records: list[StepRecord] = []
        self.lines: list[str] = []
        self._file: IO[str] | None = None
        columns = (
            MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[shown]}"), TimeRemainingColumn(),
            TextColumn("left"),
        )  # fmt: skip
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("train", total=total_steps, shown="")

    def say(self, line: str) -> None:
        """Print a line, and keep it for log.txt."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.lines.append(line)
        if self._file is not None:
            self._write_log()

    def add(self, record: StepRecord) -> None:
        """Record a step that is done. Raises OutputError if it cannot be written."""
        if self.device.type == "cuda":
            record.vram_gib = torch.cuda.max_memory_allocated(self.device) / GIB
        if record.eval_loss is not None:
            record.eval_perplexity = perplexity(record.eval_loss)
        # JSON knows no NaN and no infinity
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in asdict(record).items()}
        self._write_line(json.dumps(finite))
        self.records.append(record)
        shown = f"loss {record.loss:.4f}  {record.tokens_per_s:,.0f} tokens/s  {_memory(record)}"
        self.progress.update(self.task, completed=record.step, shown=shown)
        if not self.console.is_terminal and record.step % max(1, self.total_steps // 10) == 0:
            self.say(f"step {record.step}/{self.total_steps}  {shown}")
        if record.eval_loss is not None:
            self.say(
                f"step {record.step}/{self.total_steps}  evaluation: loss {record.eval_loss:.4f}, "
                f"perplexity {record.eval_perplexity:.4g}"
            )

    def finish(self) -> None:
        """Draw the picture of the loss and close the file."""
        if self._file is not None:
            self._file.close()
            write_atomic(self.folder / "loss.png", lambda path: draw_losses(path, self.records))

    def _write_line(self, line: str) -> None:
        with output_errors(self.folder):
            if self._file is None:
                self._open()
            assert self._file is not None
            self._file.write(line + "\n")
            self._file.flush()

    def _open(self) -> None:
        fresh = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(self.config_text, encoding="utf-8")
            self._file = (self.folder / "metrics.jsonl").open("w", encoding="utf-8")
            self._write_log()
        except OSError:
            for name in ("config.yaml", "metrics.jsonl", "log.txt"):
                (self.folder / name).unlink(missing_ok=True)
            if fresh and self.folder.exists():
                self.folder.rmdir()
            raise

    def _write_log(self) -> None:
        with output_errors(self.folder):
            (self.folder / "log.txt").write_text("\n".join(self.lines) + "\n", encoding="utf-8")


def draw_losses(path: Path, records: list[StepRecord]) -> None:
    """The loss of each step, the mean of the last twentieth of the run, and the evaluations, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title="Training loss")
    losses = [record.loss for record in records]
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#b8c4d6", linewidth=1, label="each step")
    window = 1 + len(losses) // 20
    recent = [losses[max(0, step - window) : step] for step in steps]
    means = [sum(values) / len(values) for values in recent]
    axes.plot(steps, means, color="#1f4e9c", linewidth=2, label=f"mean of {window} steps")
    measured = [(r.step, r.eval_loss) for r in records if r.eval_loss is not None]
    if measured:
        axes.plot(*zip(*measured, strict=True), color="#c2410c", marker="o", markersize=4, label="evaluation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def _memory(record: StepRecord) -> str:
    """Peak memory so far: of the GPU, or of the process; nothing where the system does not tell."""
    if record.vram_gib is not None:
        return f"{record.vram_gib:.1f} GiB"
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB:.1f} GiB"
