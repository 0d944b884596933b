"""The Typer application, one-line error reports, and the progress bar."""

import atexit
import logging
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from llava.cli.advice import AdviceFormatter, Command
from llava.errors import LlavaError


@contextmanager
def guarded(command: Command | None = None) -> Iterator[None]:
    """Turns a LlavaError into one line on stderr and exit code 2, and Ctrl-C or SIGTERM into exit code 130.

    command: whose options the line may advise; None for a script that has none of them.
    """
    try:
        with _interrupt_on_sigterm():
            yield
    except LlavaError as error:
        print(f"llava: {(command or Command()).render(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.unraisablehook = lambda _: None  # objects that were interrupted in their constructor cannot be closed
        print("llava: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the program reading the output closed the pipe
        sys.stderr.close()
        raise SystemExit(0) from None


@contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt, so that commands remove their temporary files."""
    if threading.current_thread() is not threading.main_thread():  # other threads cannot set signal handlers
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def command_line() -> str:
    """Returns the command that was run, for messages. Under torchrun, it is known only to torchrun itself."""
    if "RANK" in os.environ:
        return "the same torchrun command"
    program = Path(sys.argv[0])
    words = ["python", "-m", "llava.cli"] if program.name == "__main__.py" else [program.name]
    return shlex.join([*words, *sys.argv[1:]])


class _Guarded(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = Command.running(self, list(args))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with guarded(ctx.obj):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Guarded,
    help="LLaVA in native PyTorch: load, convert, train and chat with every published checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextmanager
def progress_bar(what: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar with rate and remaining time if stderr is a terminal.

    Yields a callback that receives the amount done and the total.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    per_s = TextColumn("{task.fields[rate]:,.1f} " + f"{unit}/s")
    rate = (DownloadColumn(), Speed()) if unit == "bytes" else (MofNCompleteColumn(), per_s)
    started = time.perf_counter()
    with Progress("{task.description}", BarColumn(), *rate, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, rate=0)
        yield lambda done, total: bar.update(
            task, completed=done, total=total, rate=done / (time.perf_counter() - started)
        )


def main(args: list[str] | None = None) -> None:
    """Entry point of the `llava` console script."""
    line = sys.argv[1:] if args is None else args
    try:
        with guarded():  # also while the commands are put together
            # Pillow warns about large photos, which are read nevertheless; it refuses those of twice that size
            warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
            group = typer.main.get_command(app)
            handler = logging.StreamHandler()
            handler.setFormatter(AdviceFormatter(Command.running(group, line)))
            logging.basicConfig(handlers=[handler], level=logging.WARNING)
            group(line, prog_name="llava")  # app(…) would put the commands together once more
    finally:
        # registered last, so it runs first: Ctrl-C during the shutdown prints no traceback
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
