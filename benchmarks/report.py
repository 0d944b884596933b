"""Draws a result of `gpu.py`: the table and a plot in docs/performance.md.

    python benchmarks/report.py benchmarks/results/RESULT.json

The table replaces what is between the two marks in the page. The plot shows how much of its limit each case reaches,
and where the cases lie below the roofline of the card.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from gpu_setup import Measured
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from result import OURS, PEER, ROOT

GPT_FAST = "gpt-fast"
BEGIN, END = "<!-- result: begin -->", "<!-- result: end -->"
COLUMNS = ("", OURS, PEER, GPT_FAST, "limit", "share", "required", "stretch", "reached")
CEILINGS = {"bandwidth", "product", "agreement"}  # cases that are not rows of the table
COLOURS = {OURS: "C0", PEER: "C1", GPT_FAST: "C2"}


def main(
    result: Annotated[Path, typer.Argument(help="file written by gpu.py --out")],
    page: Annotated[Path, typer.Option("--page", help="page with the two marks")] = ROOT / "docs" / "performance.md",
) -> None:
    """Writes the table into the page, and the plot beside it."""
    found = json.loads(result.read_text())
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise typer.BadParameter(f"{page}: expected one {BEGIN} and one {END}")
    plot = page.with_suffix(".png")
    draw(found, plot)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{section(found, plot.name)}\n{END}{after}", encoding="utf-8")
    print(f"wrote {page} and {plot}")


# --- the table --------------------------------------------------------------------------------------------------------


def section(found: Mapping[str, Any], plot: str) -> str:
    """The generated part of the page, in Markdown."""
    rows = [row for row in found["rows"] if row["case"] not in CEILINGS]
    lines = [
        heading(found),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
        "",
        f"![Share of its limit that each case reaches, and the roofline]({plot})",
    ]
    if notes := list(failures(rows)):
        lines += ["", "Not measured:", "", *notes]
    return "\n".join(lines)


def heading(found: Mapping[str, Any]) -> str:
    card, versions = found["card"], found["versions"]
    speeds = [
        f"{speed / 1e12:,.{digits}f} {unit}"
        for speed, digits, unit in ((card["bandwidth"], 2, "TB/s read"), (card["product"], 0, "TFLOP/s"))
        if speed
    ]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    measured = f"measured {' and '.join(speeds)}" if speeds else "ceilings not measured"
    return f"{found['date']}, {card['name']} ({measured}), {packages}, commit {found['commit']}. Medians."


def cells(row: Mapping[str, Any]) -> list[str]:
    unit = row["unit"]
    peers = [row["peers"].get(name, {}).get("value") for name in (PEER, GPT_FAST)]
    share, reached = row.get("share"), row.get("reached")
    return [
        row["title"],
        value(row.get("value"), unit),
        *(value(one, unit) for one in peers),
        value(row.get("limit"), unit),
        "" if share is None else f"{share:.0%}",
        value(row.get("required"), unit),
        value(row.get("stretch"), unit),
        "" if reached is None else "yes" if reached else "**no**",
    ]


def value(number: float | None, unit: str) -> str:
    if number is None:
        return ""
    return f"{number:,.0f} {unit}" if abs(number) >= 100 else f"{number:.3g} {unit}"


def failures(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each case that a contestant failed or skipped."""
    for row in rows:
        for name, one in {OURS: row, **row["peers"]}.items():
            for kind in ("error", "skipped"):
                if kind in one:
                    yield f"- {row['title']}, {name}: {'failed, ' if kind == 'error' else ''}{one[kind]}"


# --- the plot ---------------------------------------------------------------------------------------------------------


def draw(found: Mapping[str, Any], out: Path) -> None:
    """Writes both panels to a PNG file."""
    figure = Figure(figsize=(13, 6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_shares(left, [row for row in found["rows"] if row.get("limit")])
    draw_roofline(right, found)
    figure.suptitle(f"{found['card']['name']}, {found['date']}, commit {found['commit']}")
    figure.savefig(out, format="png")


def draw_shares(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bars of the share of the limit; a black line marks the required figure."""
    contestants = [OURS, *dict.fromkeys(name for row in rows for name in row["peers"] if name in COLOURS)]
    height = 0.8 / len(contestants)
    for i, name in enumerate(contestants):
        found = [(y, share) for y, row in enumerate(rows) if (share := share_of(row, name)) is not None]
        if found:
            ys, shares = zip(*found, strict=True)
            bars = axes.barh([y + i * height for y in ys], shares, height, color=COLOURS[name], label=name)
            axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=3, fontsize=8)
    for y, row in enumerate(rows):
        if row.get("required") is not None:
            share = share_at(row["required"], row)
            axes.plot([share, share], [y - height / 2, y + (len(contestants) - 0.5) * height], color="black")
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(rows))], [row["title"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.1), title="share of the limit (black: required)")
    axes.axvline(1, color="grey", linewidth=0.8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=len(contestants), frameon=False)


def share_of(row: Mapping[str, Any], name: str) -> float | None:
    one = row if name == OURS else row["peers"].get(name, {})
    return share_at(one["value"], row) if "value" in one else None


def share_at(number: float, row: Mapping[str, Any]) -> float:
    return row["limit"] / number if row["unit"] == "ms" else number / row["limit"]


def draw_roofline(axes: Axes, found: Mapping[str, Any]) -> None:
    """Operations per second over operations per byte, with the limits of bandwidth and matrix products."""
    card = found["card"]
    axes.set(xlabel="operations per byte read", ylabel="TFLOP/s", xscale="log", yscale="log", title="roofline")
    axes.grid(alpha=0.3)
    if not card["bandwidth"] or not card["product"]:
        return
    intensities = [10**exponent for exponent in (x / 10 for x in range(-5, 51))]
    roof = [min(x * card["bandwidth"], card["product"]) / 1e12 for x in intensities]
    axes.plot(intensities, roof, color="grey")
    work = {one.case: one.work for one in map(Measured.from_dict, found["measured"]) if one.contestant == OURS}
    labels: dict[float, list[str]] = {}  # by the position of a point on the roof; several cases can share one
    for row in found["rows"]:
        done = work.get(row["case"])
        if done is None or done.in_turn or not done.n_bytes or not row.get("limit"):
            continue
        x = done.flops / done.n_bytes
        top = min(x * card["bandwidth"], card["product"]) / 1e12
        for name in COLOURS:
            if (share := share_of(row, name)) is not None:
                axes.plot(x, top * share, "o" if name == OURS else "x", color=COLOURS[name])
        near = next((one for one in labels if 0.5 < one / x < 2), x)
        labels.setdefault(near, []).append(row["case"])
    low = axes.get_ylim()[0]
    for i, (x, cases) in enumerate(sorted(labels.items())):  # every second one is higher, as neighbours are close
        at = {"xytext": (4, 4 + 48 * (i % 2)), "textcoords": "offset points"}
        axes.annotate("\n".join(cases), (x, low), fontsize=8, va="bottom", **at)


if __name__ == "__main__":
    typer.run(main)
