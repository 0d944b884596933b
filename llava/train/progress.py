"""Live progress of a run: a progress bar if stderr is a terminal and, if requested, JSON rows on stdout."""

import logging
import math
import sys
from types import TracebackType
from typing import Any, TextIO

from llava.train.log import Row, to_json


class MovingAverage:
    """Exponential moving average with bias correction, as in Adam. Ignores NaN and infinity."""

    def __init__(self, decay: float = 0.95):
        self.decay = decay
        self.total = 0.0
        self.weight = 0.0

    def add(self, value: float) -> float:
        """Adds a value and returns the current average, which is NaN until a finite value has been added."""
        if math.isfinite(value):
            self.total = self.decay * self.total + (1 - self.decay) * value
            self.weight = self.decay * self.weight + (1 - self.decay)
        return self.total / self.weight if self.weight else math.nan


class TrainProgress:
    """Context manager that displays each row passed to `update`. Only the main rank displays anything.

    If stderr is a terminal, a bar is drawn and log messages appear above it. With `as_json`, each row is written to
    stdout as one line of JSON, whether or not stdout is a terminal.
    """

    def __init__(self, n_steps: int, resume_step: int = 0, *, as_json: bool = False, is_main: bool = True):
        self.as_json = as_json and is_main
        self.loss = MovingAverage()
        self.bar: Any = None
        if is_main and sys.stderr.isatty():
            self.bar = _bar()
            self.handlers: list[Any] = []
            self.task = self.bar.add_task("train", total=n_steps, completed=resume_step, status="")

    def __enter__(self) -> "TrainProgress":
        if self.bar:
            stderr = sys.stderr
            self.bar.start()  # replaces sys.stderr with a stream that prints above the bar
            self.handlers = [one for one in logging.getLogger().handlers if getattr(one, "stream", None) is stderr]
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
        """Displays the log row for one step."""
        if self.as_json:
            sys.stdout.write(to_json(row) + "\n")
            sys.stdout.flush()
        if self.bar:
            self.bar.update(self.task, completed=row["step"], status=summary(row, self.loss.add(float(row["loss"]))))


def summary(row: Row, loss: float) -> str:
    """Formats a row as one short line. `loss` is the smoothed loss."""
    parts = [f"loss {loss:.4f}", f"lr {float(row['lr']):.2e}"]
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
    status = TextColumn("{task.fields[status]}", table_column=Column())  # the only column that wraps
    left = TimeRemainingColumn(table_column=Column(no_wrap=True))
    # stdout must not be redirected, because --json writes rows to it
    return Progress(BarColumn(bar_width=20), count, status, left, console=Console(stderr=True), redirect_stdout=False)
