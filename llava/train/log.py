"""Metrics of a run, one row per optimizer step: always to JSON lines, and to the trackers that the recipe names.

The keys of a row: step (from 1), epoch, loss, lr, grad_norm, target_tokens, tokens, tokens_per_s, mfu, samples,
skipped, elapsed_s, memory_bytes. RUN/log.jsonl is the authoritative log; the trackers receive the same rows.
"""

import io
import json
import math
import secrets
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
    """A destination for rows."""

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


def open_logs(run: Path, names: Sequence[str], config: Mapping[str, Any], resume_step: int) -> list[Log]:
    """Opens the logs of a run that continues after `resume_step` (0: from the start). Only rank 0 may call this.

    Rows that an earlier process wrote for later steps are removed, so each step is logged once. Trackers display
    `config`. Returns the JSON lines first. Raises ConfigError for a tracker that is unknown, not installed, or fails
    to start; LlavaError if `run` cannot be written, which each log's `write` also raises.
    """
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ConfigError(f"logs: unknown tracker {unknown[0]!r}; expected any of {', '.join(TRACKERS)}")
    with explain_write_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    # first, so that a failure leaves the file untouched
    trackers = [TRACKERS[name](run, config, resume_step) for name in names]
    return [JsonLines(run / FILE, resume_step), *trackers]


def import_optional(module: str) -> Any:
    """Imports a module of an optional package. Raises ConfigError that states what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        install = "pip install 'llava-native[train]'"
        raise ConfigError(f"{module} cannot be imported ({error}); install it with {install}") from None


def to_json(row: Row) -> str:
    """One line of JSON. NaN and infinity, which JSON lacks, become null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log.jsonl. Skips an incomplete last line, which a killed process may leave.

    Raises DataError if the file does not exist or any other line is not a row.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); expected the folder of a run, which contains {FILE}"
        ) from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row
        elif number < len(lines):
            raise DataError(f"{file}: line {number} is not a JSON object with a step; fix or remove that line")


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError, such as a full disk or a missing permission, into a LlavaError that names the path."""
    try:
        yield
    except OSError as error:
        raise LlavaError(
            f"{path}: cannot be written ({error.strerror}); free some space, or choose another folder"
        ) from None


class JsonLines:
    """RUN/log.jsonl, one JSON object per step, flushed after each."""

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
            self.stream.flush()  # to the kernel, so the row survives if this process is killed

    def close(self) -> None:
        self.stream.close()


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, config: Mapping[str, Any], resume_step: int):
        writer = import_optional("torch.utils.tensorboard").SummaryWriter
        # readers ignore the rows of earlier files from purge_step on
        self.writer = writer(str(run / "tensorboard"), purge_step=resume_step + 1)
        self.writer.add_text("recipe", f"```json\n{json.dumps(dict(config), indent=2, default=str)}\n```", resume_step)

    def write(self, row: Row) -> None:
        for name, value in scalars(row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A Weights & Biases run in RUN/wandb. wandb's environment variables apply, such as WANDB_MODE and WANDB_PROJECT.

    Online, wandb ignores rows of steps it already has. That is harmless, because repeating a step gives the same loss.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], resume_step: int):
        wandb = import_optional("wandb")
        try:
            self.run = wandb.init(
                project=wandb.setup().settings.project or PROJECT,
                name=run.resolve().name,
                id=tracker_id(run / "wandb.id"),
                resume="allow",
                dir=str(run),
                config=dict(config),
                settings=wandb.Settings(console="off"),  # keep stdout to ourselves
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"wandb: {reason}; run `wandb login`, or set WANDB_MODE=offline") from None

    def write(self, row: Row) -> None:
        self.run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run in trackio's local database, shown by `trackio show`.

    trackio cannot delete single steps and writes with a delay, so a resumed run is rewritten from the JSON lines.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], resume_step: int):
        self.trackio = import_optional("trackio")
        name = f"{run.resolve().name}-{tracker_id(run / 'trackio.id')}"
        with redirect_stdout(io.StringIO()):  # its messages would mix with the rows of --json
            self._delete(name)
            self.trackio.init(project=PROJECT, name=name, config=dict(config), embed=False)
        if resume_step and (run / FILE).exists():
            for row in read_rows(run / FILE):
                if row["step"] <= resume_step:
                    self.write(row)

    def _delete(self, name: str) -> None:
        try:
            runs = list(self.trackio.Api().runs(PROJECT))
        except ValueError:  # no such project yet
            return
        for old in runs:
            if old.name == name:
                old.delete()

    def write(self, row: Row) -> None:
        self.trackio.log(scalars(row), step=row["step"])

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.trackio.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Log]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def scalars(row: Row) -> dict[str, float | int]:
    """The numbers of a row that trackers plot over steps."""
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}


def tracker_id(file: Path) -> str:
    """The id of this run in a tracker: eight hexadecimal digits, read from `file`, which is created if missing."""
    if not file.is_file():
        with new_file(file, 8) as partial:
            partial.write_text(secrets.token_hex(4), encoding="ascii")
    return file.read_text(encoding="ascii").strip()
