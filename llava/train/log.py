"""What a run writes down step by step: JSON lines always, and the experiment trackers that the recipe names.

A row is of one optimizer step: step (counted from 1), epoch, loss, rate, grad_norm, tokens, tokens_per_s, mfu,
samples, skipped, elapsed_s, memory_bytes. RUN/log.jsonl is the truth; the trackers are given the same rows.
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
PROJECT = "llava"  # what trackers file runs under


class Log(Protocol):
    """Where rows go."""

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


def open_logs(run: Path, names: Sequence[str], config: Mapping[str, Any], resume_step: int) -> list[Log]:
    """The logs of a run that goes on after `resume_step` (0: from the start), JSON lines first. For rank 0 alone.

    What an earlier process wrote of later steps is taken back, so that each step stands there once. `config` is shown
    by the trackers. Raises ConfigError for an unknown tracker, one that is not installed, or one that refuses;
    LlavaError where `run` cannot be written, as the logs' own `write` does.
    """
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ConfigError(f"logs: {unknown[0]!r} is not known; expected some of {', '.join(TRACKERS)}")
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
    trackers = [TRACKERS[name](run, config, resume_step) for name in names]  # first: if one fails, the file is whole
    return [JsonLines(run / FILE, resume_step), *trackers]


def require(module: str) -> Any:
    """An optional package's module. Raises ConfigError naming what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        install = "pip install 'llava-native[train]'"
        raise ConfigError(f"{module} can not be imported ({error}); install it with {install}") from None


def to_json(row: Row) -> str:
    """One line. NaN and Inf, which JSON does not have, become null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log.jsonl, without a last line that was torn when its writer was killed.

    Raises DataError if there is no such file, or another line is not a row.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{file}: no log to read ({error.strerror}); expected a run's folder with {FILE}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row
        elif number < len(lines):
            raise DataError(f"{file}: line {number} is not a JSON object with a step; mend or remove that line")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk or a forbidden folder is a LlavaError that names it."""
    try:
        yield
    except OSError as error:
        raise LlavaError(f"{path}: can not be written ({error.strerror}); make room, or name another folder") from None


class JsonLines:
    """RUN/log.jsonl, one object a step, on disk as soon as it is written."""

    def __init__(self, file: Path, resume_step: int):
        if file.exists():
            kept = "".join(to_json(row) + "\n" for row in read_rows(file) if row["step"] <= resume_step).encode()
            with new_file(file, len(kept)) as partial:
                partial.write_bytes(kept)
        self.file = file
        with writing(file):
            self.out = file.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        with writing(self.file):
            self.out.write(to_json(row) + "\n")
            self.out.flush()  # to the kernel: kept if this process is killed

    def close(self) -> None:
        self.out.close()


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, config: Mapping[str, Any], resume_step: int):
        writer = require("torch.utils.tensorboard").SummaryWriter
        # Readers drop what earlier files say from purge_step on
        self.writer = writer(str(run / "tensorboard"), purge_step=resume_step + 1)
        self.writer.add_text("recipe", f"```json\n{json.dumps(dict(config), indent=2, default=str)}\n```", resume_step)

    def write(self, row: Row) -> None:
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A Weights & Biases run in RUN/wandb. Its own environment variables hold: WANDB_MODE=offline, WANDB_PROJECT, …

    Online, rows of steps that it has already are ignored by wandb; a step's loss is the same however often it is run.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], resume_step: int):
        wandb = require("wandb")
        try:
            self.run = wandb.init(
                project=wandb.setup().settings.project or PROJECT,
                name=run.resolve().name,
                id=identity(run / "wandb.id"),
                resume="allow",
                dir=str(run),
                config=dict(config),
                settings=wandb.Settings(console="off"),  # stdout stays ours
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"wandb: {reason}; run `wandb login`, or set WANDB_MODE=offline") from None

    def write(self, row: Row) -> None:
        self.run.log(numbers(row), step=row["step"])

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run in trackio's database on this machine, which `trackio show` draws.

    trackio cannot take back single steps, and writes with some delay; a run that goes on is filled again from the
    JSON lines.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], resume_step: int):
        self.trackio = require("trackio")
        name = f"{run.resolve().name}-{identity(run / 'trackio.id')}"
        with redirect_stdout(io.StringIO()):  # its greetings would stand among the rows of --json
            self._forget(name)
            self.trackio.init(project=PROJECT, name=name, config=dict(config), embed=False)
        if resume_step and (run / FILE).exists():
            for row in read_rows(run / FILE):
                if row["step"] <= resume_step:
                    self.write(row)

    def _forget(self, name: str) -> None:
        try:
            runs = list(self.trackio.Api().runs(PROJECT))
        except ValueError:  # no such project yet
            return
        for old in runs:
            if old.name == name:
                old.delete()

    def write(self, row: Row) -> None:
        self.trackio.log(numbers(row), step=row["step"])

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.trackio.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Log]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def numbers(row: Row) -> dict[str, float | int]:
    """What can be drawn over the steps."""
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}


def identity(file: Path) -> str:
    """The name that a tracker knows this run by: eight hexadecimal digits, kept in `file`, made if it is not there."""
    if not file.is_file():
        with new_file(file, 8) as partial:
            partial.write_text(secrets.token_hex(4), encoding="ascii")
    return file.read_text(encoding="ascii").strip()
