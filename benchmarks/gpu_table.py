"""The rows of `gpu.py` as a table in the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(found: dict[str, Any]) -> None:
    """Prints the rows. The JSON is left to the file: it is too long for a terminal."""
    title = f"{found['card']['name']}, commit {found['commit']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    measured, judged = "case llava unit min max runs peers", "limit share required stretch reached"
    for i, column in enumerate(f"{measured} {judged}".split()):
        table.add_column(column, justify="left" if i in (0, 2, 6) else "right", overflow="fold")
    for one in found["rows"]:
        table.add_row(*cells(one))
    Console(width=160, soft_wrap=True).print(table)
    print(f"{found['settings']['seconds']} s; {found['versions']}")


def cells(row: dict[str, Any]) -> list[str]:
    missing = "error" if "error" in row else "skipped" if "skipped" in row else ""
    share, reached = row.get("share"), row.get("reached")
    return [
        row["case"],
        short(row.get("value")) or missing,
        row["unit"],
        short(row.get("min")),
        short(row.get("max")),
        str(row.get("runs", "")),
        ", ".join(f"{name} {short(peer['value']) if 'value' in peer else '–'}" for name, peer in row["peers"].items()),
        short(row.get("limit")),
        "" if share is None else f"{share:.0%}",
        short(row.get("required")),
        short(row.get("stretch")),
        "" if reached is None else "yes" if reached else "no",
    ]


def short(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
