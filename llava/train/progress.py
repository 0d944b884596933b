"""How a run is followed while it goes: a bar on a terminal, rows on stdout if asked for, nothing in a pipe."""

import logging
import math
import sys
from types import TracebackType
from typing import Any, TextIO

from llava.train.log import Row, to_json


class MovingAverage:
    """Exponential, without the pull towards its start (as Adam corrects its moments). NaN and Inf are left out."""

    def __init__(self, decay: float = 0.95):
        self.decay = decay
        self.total = 0.0
        self.weight = 0.0

    def add(self, value: float) -> float:
        """The average so far, this value included; NaN while there was none."""
        if math.isfinite(value):
            self.total = self.decay * self.total + (1 - self.decay) * value
            self.weight = self.decay * self.weight + (1 - self.decay)
        return self.total / self.weight if self.weight else math.nan


class TrainProgress:
    """A context to `update` with each step's row. Of all ranks, only the `first` shows anything.

    The bar is drawn where stderr is a terminal, and warnings then stand above it; `as_json` writes each row as a line
    to stdout, be that what it is.
    """

    def __init__(self, n_steps: int, resume_step: int = 0, *, as_json: bool = False, first: bool = True):
        self.as_json = as_json and first
        self.loss = MovingAverage()
        self.bar: Any = None
        if first and sys.stderr.isatty():
            self.bar = _bar()
            self.handlers: list[Any] = []
            self.task = self.bar.add_task("train", total=n_steps, completed=resume_step, told="")

    def __enter__(self) -> "TrainProgress":
        if self.bar:
            told = sys.stderr
            self.bar.start()  # from here on what goes to sys.stderr is set above the bar
            self.handlers = [one for one in logging.getLogger().handlers if getattr(one, "stream", None) is told]
            self._log_to(sys.stderr)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
            self._log_to(sys.stderr)

    def _log_to(self, stream: TextIO) -> None:
        for handler in self.handlers:
            handler.setStream(stream)

    def update(self, row: Row) -> None:
        """Shows one step's row."""
        if self.as_json:
            sys.stdout.write(to_json(row) + "\n")
            sys.stdout.flush()
        if self.bar:
            self.bar.update(self.task, completed=row["step"], told=summary(row, self.loss.add(float(row["loss"]))))


def summary(row: Row, loss: float) -> str:
    """One row in few words, with its smoothed loss."""
    parts = [f"loss {loss:.4f}", f"rate {float(row['rate']):.2e}"]
    if "tokens_per_s" in row:
        parts.append(f"{float(row['tokens_per_s']):,.0f} tokens/s")
    if "mfu" in row:
        parts.append(f"MFU {float(row['mfu']):.1%}")
    if row.get("skipped"):
        parts.append(f"{row['skipped']} skipped")
    return ", ".join(parts)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    count = MofNCompleteColumn(table_column=Column(no_wrap=True))
    told = TextColumn("{task.fields[told]}", table_column=Column())  # wraps on a narrow terminal, the others do not
    left = TimeRemainingColumn(table_column=Column(no_wrap=True))
    # Not redirected: stdout's rows stay rows
    return Progress(BarColumn(bar_width=20), count, told, left, console=Console(stderr=True), redirect_stdout=False)
