"""The table of advice: each row makes a situation, runs a command that gives advice, and follows it."""

import contextlib
import io
import logging
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import typer

from llava.cli import app, main
from llava.cli.advice import AdviceFormatter, Command
from llava.errors import LlavaError


@dataclass(frozen=True)
class Said:
    """What a command or a call printed, with its warnings, and whether it succeeded."""

    well: bool
    text: str

    def advised(self, **places: object) -> list[str]:
        """The last command in the text, up to the end of its line, with `places` for placeholders such as OUT."""
        names = "|".join(sorted({name.split()[0] for name in Command.running(typer.main.get_command(app), []).others}))
        found = re.findall(rf"(?=\bllava ((?:{names}) .*))", self.text)
        return [str(places.get(word, word)) for word in shlex.split(found[-1])]


Run = Sequence[object] | Callable[[], object]  # arguments of `llava`, or a call in Python
Steps = Generator[Run, Said, None]


@dataclass(frozen=True)
class World:
    """A folder for this row, and checkpoints and data that rows only read."""

    tmp: Path
    shared: Mapping[str, Path]
    stdin: io.BytesIO = field(default_factory=io.BytesIO)

    def __getattr__(self, name: str) -> Path:
        try:
            return self.shared[name]
        except KeyError:
            raise AttributeError(name) from None

    def __truediv__(self, name: str) -> Path:
        return self.tmp / name

    def copy(self, name: str) -> Path:
        """A copy of a shared folder, to change."""
        return Path(shutil.copytree(self.shared[name], self.tmp / f"copy-of-{name}"))

    def in_the_hub_cache(self, name: str, folder: Path) -> str:
        """Puts a folder into the hub's cache (the test's own), and returns its id."""
        cached = self.tmp / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, cached / "snapshots" / "ab")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("ab")
        return name


@dataclass(frozen=True)
class Row:
    message: str  # part of a message with advice, as in the source code, with {} for inserted values
    follow: Callable[[World], Steps]
    succeeds: bool  # the second run succeeds; otherwise only this message is gone


ROWS: list[Row] = []


def advice(message: str, *, succeeds: bool = True) -> Callable[[Callable[[World], Steps]], Callable[[World], Steps]]:
    """Adds a row. Its function yields what to run, receives what was said, follows the advice, and may yield another
    run, such as the advised command; otherwise the first is repeated.
    """

    def add(follow: Callable[[World], Steps]) -> Callable[[World], Steps]:
        ROWS.append(Row(message, follow, succeeds))
        return follow

    return add


def say(run: Run, stdin: io.BytesIO | None = None) -> Said:
    """Runs a command or a call in this process. Warnings are formatted as on the command line."""
    line = [] if callable(run) else [str(word) for word in run]
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(AdviceFormatter(Command.running(typer.main.get_command(app), line)))
    log = logging.getLogger("llava")
    log.addHandler(handler)
    pipe = io.TextIOWrapper(stdin or io.BytesIO())
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            mock.patch.object(sys, "stdin", pipe),
            mock.patch.object(sys, "argv", ["llava", *line]),
        ):
            return Said(_succeeds(run, line, out), out.getvalue())
    finally:
        log.removeHandler(handler)
        pipe.detach()


def _succeeds(run: Run, line: list[str], out: io.StringIO) -> bool:
    try:
        if callable(run):
            run()
            return True
        main(line)
    except LlavaError as error:
        out.write(f"{error}\n")
        return False
    except SystemExit as end:
        return not end.code
    return True
