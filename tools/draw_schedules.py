"""Draw docs/schedules.svg from the schedules themselves: python tools/draw_schedules.py [FILE]"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from rwkv_peft.config import TrainConfig
from rwkv_peft.training.schedule import learning_rate, weight_decay

TOTAL = 100  # steps
PICTURE = Path(__file__).parents[1] / "docs" / "schedules.svg"
COLOURS = {"constant": "#8a8a8a", "wsd": "#3a7d44", "linear": "#c4572a", "cosine": "#1f4e9c", "decay": "#7a3b8f"}


def curves() -> dict[str, list[float]]:
    """Each schedule's learning rate, and the weight decay `decay`, at every step, as shares of the largest."""
    base = TrainConfig(Path(), [], Path(), lr=1.0, weight_decay=1.0, weight_decay_final=0.1).resolved()
    configs = {name: replace(base, schedule=name) for name in ("constant", "wsd", "linear", "cosine")}  # type: ignore[arg-type]
    rates = {name: [learning_rate(config, step, TOTAL) for step in range(TOTAL)] for name, config in configs.items()}
    return {**rates, "decay": [weight_decay(base, step, TOTAL) for step in range(TOTAL)]}


def draw(path: Path) -> None:
    """Write the picture; the same matplotlib draws the same bytes."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "rwkv-peft", "path.simplify": False, "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.5, 2.8), layout="constrained")
        rates, decay = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
        for name, values in curves().items():
            axes = decay if name == "decay" else rates
            axes.plot(values, color=COLOURS[name], linewidth=1.8, label=name, gid=f"curve-{name}")
        rates.set(title="learning rate", xlabel="step", ylabel="share of the peak", ylim=(0, 1.1))
        decay.set(title="weight decay", xlabel="step")
        rates.legend(loc=(0.13, 0.05))
        for axes in (rates, decay):
            axes.grid(alpha=0.3)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
