"""Logs a run's metrics, one row per optimizer step, to a JSON Lines file and to the trackers listed in the recipe.

Keys of a row: step (from 1), epoch, loss, lr, grad_norm, target_tokens, tokens, tokens_per_s, mfu, samples, skipped,
too_long, truncated, lossy_pictures, elapsed_s, memory_bytes. log.jsonl in the run folder (RUN) is authoritative; the
trackers receive the same rows.
"""

import io
import json
import math
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from llava.errors import ConfigError, DataError, LlavaError
from llava.tensors.atomic import new_file

Row = Mapping[str, float | int | str]

FILE = "log.jsonl"
PROJECT = "llava"  # project name in the trackers


class Log(Protocol):
    """A destination for metric rows."""

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


def open_logs(run: Path, names: Sequence[str], config: Mapping[str, Any], resume_step: int) -> list[Log]:
    """Opens the logs of a run, to append the steps after `resume_step` (0 for a new run). Only rank 0 may call this.

    Removes rows that an earlier process wrote for later steps, so that each step is logged only once. The trackers
    display `config`. The first log returned is the JSON Lines file. Raises ConfigError if a tracker is unknown, is
    not installed or fails to start. Like `JsonLines.write`, raises LlavaError if the log cannot be written.
    """
    check_trackers(names)
    with explain_write_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    # open the trackers first, so that the JSON Lines file stays untouched if one of them fails
    trackers = [TRACKERS[name](run, config, resume_step) for name in names]
    return [JsonLines(run / FILE, resume_step), *trackers]


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError if a tracker is unknown or its package is not installed."""
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ConfigError(f"logs: unknown tracker {unknown[0]!r}; expected any of {', '.join(TRACKERS)}")
    for name in names:
        import_optional(_PACKAGES[name])


def import_optional(module: str) -> Any:
    """Imports a module from an optional package. If that fails, raises a ConfigError that says what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        install = "pip install 'llava-native[train]'"
        raise ConfigError(f"{module} cannot be imported ({error}); install it with {install}") from None


def to_json(row: Row) -> str:
    """Returns a row as one line of JSON. NaN and infinity, which JSON cannot represent, become null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Reads the rows of a log.jsonl file. Skips an incomplete last line, which a killed process may have left.

    Raises DataError if the file cannot be read or if any other line is not a valid row.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); expected a run folder that contains {FILE}"
        ) from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row
        elif number < len(lines):
            raise DataError(f"{file}: line {number} is not a JSON object with an integer step; fix or remove that line")


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Converts an OSError (such as a full disk or missing permissions) into a LlavaError that includes the path.

    An error of SQLite, which trackio writes with, is also converted.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise LlavaError(f"{path}: cannot be written ({reason}); free some space, or choose another folder") from None


class JsonLines:
    """Writes each row to RUN/log.jsonl as one line of JSON. Flushes the file after every row."""

    def __init__(self, file: Path, resume_step: int):
        if file.exists():
            kept = "".join(to_json(row) + "\n" for row in read_rows(file) if row["step"] <= resume_step).encode()
            with new_file(file, len(kept)) as partial:
                partial.write_bytes(kept)
        self.file = file
        with explain_write_errors(file):
            self.stream = file.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        with explain_write_errors(self.file):
            self.stream.write(to_json(row) + "\n")
            self.stream.flush()  # hands the row to the kernel, so that it survives if this process is killed

    def close(self) -> None:
        self.stream.close()


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, config: Mapping[str, Any], resume_step: int):
        writer = import_optional(_PACKAGES["tensorboard"]).SummaryWriter
        self.folder = run / "tensorboard"
        text = f"```json\n{json.dumps(dict(config), indent=2, default=str)}\n```"
        with explain_write_errors(self.folder):
            # TensorBoard ignores rows in earlier event files if their step is purge_step or later
            self.writer = writer(str(self.folder), purge_step=resume_step + 1)
            self.writer.add_text("recipe", text, resume_step)

    def write(self, row: Row) -> None:
        with explain_write_errors(self.folder):
            for name, value in scalars(row).items():
                self.writer.add_scalar(name, value, row["step"])
            self.writer.flush()

    def close(self) -> None:
        with explain_write_errors(self.folder):
            self.writer.close()


class Wandb:
    """Logs to Weights & Biases, with local files in RUN/wandb. Respects environment variables such as WANDB_MODE.

    In online mode, wandb ignores rows for steps that are already logged. This is harmless, because a resumed run
    repeats these steps with the same loss.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], resume_step: int):
        wandb = import_optional(_PACKAGES["wandb"])
        self.folder = run / "wandb"
        try:
            self.run = wandb.init(
                project=wandb.setup().settings.project or PROJECT,
                name=run.resolve().name,
                id=tracker_id(run / "wandb.id"),
                resume="allow",
                dir=str(run),
                config=dict(config),
                settings=wandb.Settings(console="off"),  # do not let wandb capture stdout
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"wandb: {reason}; run `wandb login`, or set WANDB_MODE=offline") from None

    def write(self, row: Row) -> None:
        with explain_write_errors(self.folder):
            self.run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        with explain_write_errors(self.folder):
            self.run.finish()


class Trackio:
    """Logs to trackio's local database, which `trackio show` displays.

    trackio cannot delete individual steps and writes with a delay. A resumed run is therefore deleted from the database
    and logged again from log.jsonl.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], resume_step: int):
        self.trackio = import_optional(_PACKAGES["trackio"])
        self.folder = run
        name = f"{run.resolve().name}-{tracker_id(run / 'trackio.id')}"
        with (
            explain_write_errors(run),
            redirect_stdout(io.StringIO()),
        ):  # keeps trackio's messages out of the rows printed by --json
            self._delete(name)
            self.trackio.init(project=PROJECT, name=name, config=dict(config), embed=False)
        if resume_step and (run / FILE).exists():
            for row in read_rows(run / FILE):
                if row["step"] <= resume_step:
                    self.write(row)

    def _delete(self, name: str) -> None:
        try:
            runs = list(self.trackio.Api().runs(PROJECT))
        except ValueError:  # the project does not exist yet
            return
        for old in runs:
            if old.name == name:
                old.delete()

    def write(self, row: Row) -> None:
        with explain_write_errors(self.folder):
            self.trackio.log(scalars(row), step=row["step"])

    def close(self) -> None:
        with explain_write_errors(self.folder), redirect_stdout(io.StringIO()):
            self.trackio.finish()


_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Log]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def scalars(row: Row) -> dict[str, float | int]:
    """Returns the numeric values of a row, except the step, for trackers to plot."""
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}


def tracker_id(file: Path) -> str:
    """Returns this run's id in a tracker: eight hexadecimal digits, read from `file`. Creates the file if needed."""
    if not file.is_file():
        with new_file(file, 8) as partial:
            partial.write_text(secrets.token_hex(4), encoding="ascii")
    return file.read_text(encoding="ascii").strip()
