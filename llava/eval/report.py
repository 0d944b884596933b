"""Tables of scores."""

from typing import TYPE_CHECKING

from llava.eval.task import ALL, Scores

if TYPE_CHECKING:
    from rich.table import Table


def table(scores: Scores) -> "Table":
    """Returns the figures of a task as a table."""
    from rich.table import Table

    made = Table(title=f"{scores.task}: {scores.metric}", title_justify="left", title_style="", box=None)
    made.add_column("questions")
    made.add_column("figure", justify="right", no_wrap=True)
    made.add_row("headline", _figure(scores.value))
    for group, value in scores.figures.items():
        made.add_row(group if group != ALL else "all", _figure(value))
    for name, value in scores.details.items():
        made.add_row(f"all, {name}", _figure(value))
    for what, n in (("answers", scores.n), ("unanswered", scores.unanswered), ("unjudged", scores.unjudged)):
        made.add_row(what, f"{n:,}")
    return made


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
