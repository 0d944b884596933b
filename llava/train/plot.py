"""Plots training curves from the log.jsonl of one or more runs to a PNG file. Requires matplotlib but no display."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.tensors.atomic import new_file
from llava.train.log import FILE, import_optional, read_rows
from llava.train.progress import MovingAverage

PANELS = {  # row key -> panel title; keys missing from all runs are not plotted
    "loss": "loss (nats per token)",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
}
SMOOTHED = ("loss", "grad_norm", "tokens_per_s")
WIDTH, HEIGHT, DPI = 6.0, 4.0, 100  # panel width and height in inches; pixels per inch


def plot(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Plots loss, learning rate, gradient norm and tokens/s against the step, one panel each, with all runs overlaid.

    Each row has two panels of 600 x 400 pixels. Writes the PNG to `out`, by default curves.png in the first run's
    folder, and returns its path.
    Raises DataError if a run has no log or its log has no rows, ConfigError if matplotlib is not installed, and
    CheckpointError if the file cannot be written.
    """
    figures = import_optional("matplotlib.figure")
    logs = {run: list(read_rows(run / FILE)) for run in runs}
    if empty := [run for run, rows in logs.items() if not rows]:
        raise DataError(f"{empty[0] / FILE}: contains no rows yet; plot again after the first step")
    panels = [key for key in PANELS if any(key in row for rows in logs.values() for row in rows)]
    n_rows = math.ceil(len(panels) / 2)
    figure = figures.Figure(figsize=(2 * WIDTH, n_rows * HEIGHT), dpi=DPI, layout="constrained")
    for number, key in enumerate(panels, 1):
        _draw(figure.add_subplot(n_rows, 2, number), key, logs)
    out = out or runs[0] / "curves.png"
    with new_file(out, 0) as partial:
        figure.savefig(partial, format="png")  # uses the Agg backend, which needs no display
    return out


def _draw(axes: Any, key: str, logs: dict[Path, list[dict[str, Any]]]) -> None:
    """Draws one panel. Noisy values are drawn faintly, with their moving average on top."""
    for number, (run, rows) in enumerate(logs.items()):
        style = {"color": f"C{number}", "linewidth": 1.5}
        steps = [row["step"] for row in rows if key in row]
        values = [math.nan if row[key] is None else row[key] for row in rows if key in row]
        if key in SMOOTHED:
            axes.plot(steps, values, color=style["color"], linewidth=0.8, alpha=0.3)
            average = MovingAverage()
            values = [average.add(value) for value in values]
        axes.plot(steps, values, label=run.resolve().name, **style)
    axes.set(title=PANELS[key], xlabel="step")
    axes.grid(alpha=0.3)
    if len(logs) > 1:
        axes.legend()
