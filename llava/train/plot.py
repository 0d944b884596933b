"""Curves of one run or several, from their log.jsonl to a PNG. Needs matplotlib, but no display."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.tensors.atomic import new_file
from llava.train.log import FILE, read_rows, require
from llava.train.progress import MovingAverage

PANELS = {  # key of a row: title; those that no run has are left out
    "loss": "loss (nats a token)",
    "rate": "learning rate",
    "grad_norm": "norm of the gradient",
    "tokens_per_s": "tokens/s",
}
SMOOTHED = ("loss", "grad_norm", "tokens_per_s")
WIDTH, HEIGHT, DPI = 6.0, 4.0, 100  # of a panel, inches; pixels an inch


def plot(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Draws loss, learning rate, gradient norm and tokens/s over the steps, all runs in the same panels.

    Two panels of 600 x 400 pixels a row. `out` is the PNG to write, curves.png in the first run's folder if not given;
    returned. Raises DataError for a run without a log or without a row, ConfigError where matplotlib is missing,
    CheckpointError where the file cannot be written.
    """
    figures = require("matplotlib.figure")
    logs = {run: list(read_rows(run / FILE)) for run in runs}
    if empty := [run for run, rows in logs.items() if not rows]:
        raise DataError(f"{empty[0] / FILE}: no row yet; plot again after the first step")
    panels = [key for key in PANELS if any(key in row for rows in logs.values() for row in rows)]
    n_rows = math.ceil(len(panels) / 2)
    figure = figures.Figure(figsize=(2 * WIDTH, n_rows * HEIGHT), dpi=DPI, layout="constrained")
    for place, key in enumerate(panels, 1):
        _draw(figure.add_subplot(n_rows, 2, place), key, logs)
    out = out or runs[0] / "curves.png"
    with new_file(out, 0) as partial:
        figure.savefig(partial, format="png")  # by Agg, which needs no display
    return out


def _draw(axes: Any, key: str, logs: dict[Path, list[dict[str, Any]]]) -> None:
    """One panel: where values scatter, they stand pale behind their moving average."""
    for number, (run, rows) in enumerate(logs.items()):
        look = {"color": f"C{number}", "linewidth": 1.5}
        steps = [row["step"] for row in rows if key in row]
        values = [math.nan if row[key] is None else row[key] for row in rows if key in row]
        if key in SMOOTHED:
            axes.plot(steps, values, color=look["color"], linewidth=0.8, alpha=0.3)
            average = MovingAverage()
            values = [average.add(value) for value in values]
        axes.plot(steps, values, label=run.resolve().name, **look)
    axes.set(title=PANELS[key], xlabel="step")
    axes.grid(alpha=0.3)
    if len(logs) > 1:
        axes.legend()
