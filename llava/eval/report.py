"""Tables of scores: in the terminal, and in the report.md of a run."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import ConfigError
from llava.eval import charts, markdown
from llava.eval.markdown import figure, words
from llava.eval.runs import ANSWERS, Run, read_asked, read_prompts, read_run, read_settings
from llava.eval.task import ALL, Scores
from llava.tensors.atomic import new_file

if TYPE_CHECKING:
    from rich.console import Group

REPORT = "report.md"
_EXAMPLES = 3
_LONGEST = 2000  # characters of a text in a table


def table(scores: Scores) -> "Group":
    """Returns the figures of a task as a table below a title."""
    from rich.console import Group
    from rich.table import Table

    made = Table(box=None)
    made.add_column("questions")
    made.add_column("figure", justify="right", no_wrap=True)
    for name, value in rows(scores):
        made.add_row(name, value)
    return Group(f"{scores.task}: {scores.metric}", made)


def rows(scores: Scores) -> list[tuple[str, str]]:
    """Returns the figures of a task by name, the headline first, and how many questions they are about."""
    figures = {"headline": scores.value, **named(scores)}
    figures |= {f"all, {name}": value for name, value in scores.details.items()}
    counts = {"answers": scores.n, "unanswered": scores.unanswered, "unjudged": scores.unjudged}
    return [(name, figure(value)) for name, value in figures.items()] + [(name, f"{n:,}") for name, n in counts.items()]


def named(scores: Scores) -> dict[str, float | None]:
    """Returns the figures of all questions and of each group, by the names that people read."""
    return {"all" if name == ALL else name: value for name, value in scores.figures.items()}


# ------------------------------------------------------------------------------------------------------------ report


def write_report(folder: Path) -> Path:
    """Writes report.md about the scores that a run has so far, with a chart for each task, and returns its path.

    Equal runs have equal reports. Without matplotlib there are no charts, and the report says what to install.
    Raises DataError if the run is damaged, and CheckpointError if a file cannot be written.
    """
    run = read_run(folder)
    missing = charts_missing()
    parts = [_head(run), *(_part(run, one, charted=not missing) for one in run.scores.values()), _setup(run)]
    if missing:
        parts.insert(1, f"Without charts: {words(missing)}.\n")
    with new_file(folder / REPORT, 0) as partial:
        partial.write_text("\n".join(parts), encoding="utf-8")
    return folder / REPORT


def charts_missing() -> str:
    """Returns why no charts can be drawn, with what to install, or ""."""
    try:
        charts.figures()
    except ConfigError as error:
        return str(error)
    return ""


def _head(run: Run) -> str:
    lines = ([words(one.task), words(one.metric), figure(one.value), f"{one.n:,}"] for one in run.scores.values())
    return f"# Scores of {words(run.name)}\n\n" + markdown.table(("Task", "Metric", "Score", "Answers"), lines, left=2)


def _part(run: Run, scores: Scores, *, charted: bool) -> str:
    """Returns the section of a task, and draws its chart."""
    lines = ([words(name), value] for name, value in rows(scores))
    text = f"## {words(scores.task)}\n\n{words(scores.metric)}\n\n" + markdown.table(("Questions", "Figure"), lines)
    text += f"\n{words(scores.note)}\n" if scores.note else ""
    if charted:
        charts.bars({f"{scores.task}: {scores.metric}": named(scores)}, run.folder / f"{scores.task}.png")
        text += f"\n![Bars of the figures of {scores.task}]({scores.task}.png)\n"
    return text + _examples(run, scores.task)


def _examples(run: Run, task: str) -> str:
    """Returns the first prompts with the template, and the answers."""
    prompts, asked = read_prompts(run, task), read_asked(run, task)[:_EXAMPLES]
    text = ""
    if prompts:
        text += "\nThe first prompts, as the model saw them:\n\n" + "\n".join(map(markdown.block, prompts))
    if asked:
        lines = ([words(one.id), as_words(one.prompt), as_words(one.answer), as_words(one.text)] for one in asked)
        columns = ("Question", "Prompt", "Right answer", "Answer")
        text += f"\nThe first answers; all are in {task}/{ANSWERS}:\n\n" + markdown.table(columns, lines, left=4)
    return text


def _setup(run: Run) -> str:
    """Returns the sections about the model, its settings, versions and machine."""
    own = {name: read_settings(run, name) for name in run.scores}
    more = {f"{key} of {task}": one[key] for task, one in own.items() for key in one if key not in run.settings}
    sections = {
        "Model": run.model,
        "Settings": {**run.settings, **more},
        "Versions": run.versions,
        "Machine": run.machine,
    }
    return "\n".join(f"## {title}\n\n{_pairs(values.items())}" for title, values in sections.items())


def _pairs(values: Iterable[tuple[str, Any]]) -> str:
    return markdown.table(("Name", "Value"), ([words(name), as_words(value)] for name, value in values), left=2)


def as_words(value: Any) -> str:
    """Returns a setting, an answer or a reply as Markdown in one line, cut if it is very long. See `plain`."""
    text = "" if value is None else plain(value)
    more = len(text) - _LONGEST
    return words(f"{text[:_LONGEST]} … ({more:,} more characters)" if more > 0 else text) or "–"


def plain(value: Any) -> str:
    """Returns a value as a person would write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(plain, value))
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return str(value)
