"""Charts of scores as PNG files. They need matplotlib, but no display."""

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from llava.errors import ConfigError
from llava.tensors.atomic import new_file

_DPI = 100
_PER_ROW = 3  # panels
_LONGEST = 28  # characters of a label
_OPTIONS = {"format": "png", "bbox_inches": "tight", "metadata": {"Software": None}}  # equal files for equal scores

Scores = Mapping[str, float | None]  # by the names of runs or groups


def figures() -> Any:
    """Returns matplotlib's module of figures. Raises ConfigError, which says what to install."""
    try:
        return import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError(
            f"charts need matplotlib, which cannot be imported ({error}); install it with pip install "
            "'llava-native[eval]'"
        ) from None


def bars(panels: Mapping[str, Scores], out: Path) -> None:
    """Draws a panel of bars for each title, with an axis of its own from 0. Values that are None have no bar.

    Raises ConfigError, and CheckpointError if the file cannot be written.
    """
    made, columns = figures(), min(len(panels), _PER_ROW)
    rows = math.ceil(len(panels) / columns)
    longest = max(len(scores) for scores in panels.values())
    size = (max(4.5, 5.2 * columns), rows * (1.2 + 0.34 * longest))
    figure = made.Figure(figsize=size, dpi=_DPI, layout="constrained")
    for number, (title, scores) in enumerate(panels.items(), 1):
        _panel(figure.add_subplot(rows, columns, number), title, scores)
    _save(figure, out)


def _panel(axes: Any, title: str, scores: Scores) -> None:
    names, places = [_label(name) for name in scores], range(len(scores))
    drawn = axes.barh(places, [value or 0 for value in scores.values()], color=[f"C{i % 10}" for i in places])
    axes.bar_label(drawn, ["–" if value is None else f"{value:,.2f}" for value in scores.values()], padding=3)
    axes.set_yticks(places, names, parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_title(_label(title, 60), fontsize=10, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)


def radar(runs: Mapping[str, Sequence[float]], axes: Mapping[str, str], out: Path) -> None:
    """Draws a polygon for each run, on an axis for each score.

    runs: the radius on each axis, from 0 in the centre to 1. axes: by name, what 1 stands for.

    Raises ConfigError, and CheckpointError if the file cannot be written.
    """
    figure = figures().Figure(figsize=(7.5, 6 + 0.25 * len(runs)), dpi=_DPI, layout="constrained")
    plot = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * i / len(axes) for i in range(len(axes))]
    for number, radii in enumerate(runs.values()):
        style = {"color": f"C{number % 10}", "linewidth": 1.5}
        plot.plot([*angles, angles[0]], [*radii, radii[0]], marker="o", markersize=3, clip_on=False, **style)
        plot.fill(angles, radii, color=style["color"], alpha=0.08)
    plot.set_theta_offset(math.pi / 2)
    plot.set_theta_direction(-1)
    plot.set_ylim(0, 1)
    plot.set_yticks([0.25, 0.5, 0.75], [])
    plot.set_xticks(angles, [f"{_label(name)}\n{best}" for name, best in axes.items()], parse_math=False)
    plot.tick_params(axis="x", pad=8)
    for label, angle in zip(plot.get_xticklabels(), angles, strict=True):  # beside the ring, not over it
        side = math.sin(angle)
        label.set_horizontalalignment("center" if abs(side) < 0.01 else "left" if side > 0 else "right")
    legend = figure.legend(plot.lines, list(map(_label, runs)), loc="outside lower center", ncols=2)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save(figure, out)


def _label(text: str, longest: int = _LONGEST) -> str:
    """Returns a text short enough for a chart."""
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-longest // 2 + 1 :]}"


def _save(figure: Any, out: Path) -> None:
    with new_file(out, 0) as partial:
        figure.savefig(partial, **_OPTIONS)  # uses the Agg backend, which needs no display
