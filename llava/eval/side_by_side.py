"""A comparison of runs as tables in the terminal, as JSON, and as a folder with compare.md and charts."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import ConfigError
from llava.eval import charts, markdown
from llava.eval.compare import Change, Comparison, Difference, Row
from llava.eval.markdown import figure, words
from llava.eval.report import as_words, charts_missing
from llava.eval.task import ALL, Task
from llava.tensors.atomic import new_file

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 20  # changed questions of a run and a task in compare.md
_MIN_AXES = 3  # of a radar chart
COMPARE, BARS, RADAR = "compare.md", "bars.png", "radar.png"
_COLUMNS = ("Task", "Run", "Difference", "95 % interval", "Items", "Clusters", "Better", "Worse", "Reworded")
_RULE = (
    "Differences are to {first}, in the items that both runs have. The intervals are those of a paired bootstrap, "
    "which draws clusters with replacement: a picture with all its questions, or a question without a picture."
)


def tables(found: Comparison) -> "Iterator[Table]":
    """Yields the scores, and the differences, as tables."""
    from rich.table import Table

    for columns, rows in ((("Task", *found.names), _scores(found)), (_COLUMNS, _differences(found))):
        made = Table(box=None, title_justify="left", padding=(0, 2, 0, 0))
        for i, column in enumerate(columns):
            made.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in rows:
            made.add_row(*row)
        yield made


def to_dict(found: Comparison) -> dict[str, Any]:
    """Returns a comparison as JSON-compatible values."""
    return {
        "runs": [
            {"name": name, "folder": str(run.folder), "model": dict(run.model)}
            for name, run in zip(found.names, found.runs, strict=True)
        ],
        "tasks": [
            {
                "task": row.task.name,
                "metric": row.task.metric,
                "values": [one and one.value for one in row.scores],
                "differences": [one and asdict(one) for one in row.differences],
            }
            for row in found.rows
        ],
        "settings": {name: list(values) for name, values in found.settings.items()},
        "notes": list(found.notes),
    }


def _scores(found: Comparison) -> list[list[str]]:
    return [[row.task.name, *(figure(one.value if one else None) for one in row.scores)] for row in found.rows]


def _differences(found: Comparison) -> list[list[str]]:
    return [
        [row.task.name, name, *_cells(one)]
        for row in found.rows
        for name, one in zip(found.names[1:], row.differences, strict=True)
    ]


def _cells(one: Difference | None) -> list[str]:
    if one is None:
        return ["–"] * (len(_COLUMNS) - 2)
    interval = f"{figure(one.interval[0], sign=True)} to {figure(one.interval[1], sign=True)}" if one.interval else "–"
    better = sum(change.better for change in one.changes)
    counts = (one.n, one.n_clusters, better, len(one.changes) - better, one.reworded)
    return [figure(one.value, sign=True), interval, *(f"{n:,}" for n in counts)]


# ------------------------------------------------------------------------------------------------------------ folder


def write(found: Comparison, folder: Path) -> Path:
    """Writes compare.md, bars.png and, if there are enough axes, radar.png. Returns the path of compare.md.

    Raises ConfigError or CheckpointError if they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); choose another folder with --out") from None
    missing = charts_missing()
    pictures = f"Without charts: {words(missing)}.\n" if missing else _draw(found, folder)
    parts = [_head(found), pictures, *map(_changed, found.rows, [found.names] * len(found.rows)), _settings(found)]
    with new_file(folder / COMPARE, 0) as partial:
        partial.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return folder / COMPARE


def _head(found: Comparison) -> str:
    names = list(map(words, found.names))
    runs = ([name, words(run.name), words(str(run.folder))] for name, run in zip(names, found.runs, strict=True))
    lines = [
        "# Runs side by side\n",
        markdown.table(("Run", "Model", "Folder"), runs, left=3),
        "## Scores\n",
        markdown.table(("Task", *names), ([words(row[0]), *row[1:]] for row in _scores(found))),
        "## Differences\n",
        _RULE.format(first=names[0]) + "\n",
        markdown.table(_COLUMNS, ([words(row[0]), words(row[1]), *row[2:]] for row in _differences(found)), left=2),
    ]
    notes = "".join(f"- {words(note)}\n" for note in found.notes)
    return "\n".join([*lines, notes] if notes else lines)


def _draw(found: Comparison, folder: Path) -> str:
    """Draws the charts, and returns the section that shows them."""
    panels = {
        f"{row.task.name}: {row.task.metric}": {
            name: one.value if one else None for name, one in zip(found.names, row.scores, strict=True)
        }
        for row in found.rows
    }
    charts.bars(panels, folder / BARS)
    text = f"## Charts\n\n![Bars of the scores]({BARS})\n"
    axes = _axes(found)
    if len(axes) < _MIN_AXES:
        return text + f"\nNo radar chart: it needs {_MIN_AXES} scores above 0 that all runs have.\n"
    best = {name: (min if lower else max)(values) for name, (values, lower) in axes.items()}
    radii = {
        run: [best[name] / values[i] if lower else values[i] / best[name] for name, (values, lower) in axes.items()]
        for i, run in enumerate(found.names)
    }
    charts.radar(radii, {name: figure(value) for name, value in best.items()}, folder / RADAR)
    return text + (
        f"\n![Radar chart of the scores]({RADAR})\n\nIn the radar chart, each axis begins with 0 in the centre, and "
        "its outer ring is the best score of these runs, which is written there. Where lower is better, the distance "
        "is the best score divided by that of the run.\n"
    )


def _axes(found: Comparison) -> dict[str, tuple[list[float], bool]]:
    """Returns the scores of each axis, and whether lower is better: the tasks of all runs, or if few, their groups."""
    whole = {row.task.name: [one.value if one else None for one in row.scores] for row in found.rows}
    axes = _positive(whole, found.rows)
    if len(axes) >= _MIN_AXES:
        return axes
    groups = {}
    for row in found.rows:
        for group in row.scores[0].figures if row.scores[0] else ():
            name = f"{row.task.name}: {'all' if group == ALL else group}"
            groups[name] = [one.figures.get(group) if one else None for one in row.scores]
    return _positive(groups, found.rows)


def _positive(axes: dict[str, list[float | None]], rows: Sequence[Row]) -> dict[str, tuple[list[float], bool]]:
    lower = {row.task.name: row.task.lower_is_better for row in rows}
    kept = {name: [value for value in values if value is not None and value > 0] for name, values in axes.items()}
    return {
        name: (kept[name], lower[name.split(":")[0]]) for name, values in axes.items() if len(kept[name]) == len(values)
    }


def _changed(row: Row, names: Sequence[str]) -> str:
    """Returns the section of the questions of a task whose score changed."""
    text = ""
    for name, one in zip(names[1:], row.differences, strict=True):
        if one and one.changes:
            columns = ("Item", "Prompt", "Right answer", words(names[0]), words(name), "Change")
            text += f"\n### {words(name)}\n\n"
            text += markdown.table(columns, (_change(row.task, change) for change in one.changes[:_SHOWN]), left=6)
            if (more := len(one.changes) - _SHOWN) > 0:
                text += f"\n{more:,} more are in the JSON form of this comparison.\n"
    return f"## {words(row.task.name)}: changed questions\n{text}" if text else ""


def _change(task: Task, change: Change) -> list[str]:
    before, after = (
        figure(score) if (verdict := task.verdict(score)) in ("scored", "partly right") else verdict
        for score in change.scores
    )
    texts = [as_words(text) for text in (change.prompt, change.answer, *change.texts)]
    return [words(change.id), *texts, f"{before} → {after}"]


def _settings(found: Comparison) -> str:
    if not found.settings:
        return "## Settings\n\nThe settings, versions and machines are the same.\n"
    rows = ([words(name), *map(as_words, values)] for name, values in found.settings.items())
    columns = ("Name", *map(words, found.names))
    return "## Settings that differ\n\n" + markdown.table(columns, rows, left=len(columns))
