"""The main workflow end to end: convert a checkpoint on disk and ask about a picture.

The checkpoint is llava-tiny, which this package ships, written in the format of LLaVA-1.5. The commands for a real
checkpoint are the same. `--svg FILE` also saves the terminal output as an image for the README.
"""

import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

PROJECT = Path(__file__).resolve().parent.parent
OUT = Path("build/demo")
PICTURE = "examples/pictures/kitchen.png"


def say(text: str) -> str:
    """Prints text immediately and returns it."""
    print(text, flush=True)
    return text


def run(*command: str) -> str:
    """Prints a command, runs it as a user would, and returns everything printed."""
    said = say(f"$ {shlex.join(command)}")
    program = [sys.executable, "-m", "llava.cli"] if command[0] == "llava" else [sys.executable]
    done = subprocess.run([*program, *command[1:]], check=True, cwd=PROJECT, stdout=subprocess.PIPE, encoding="utf-8")
    return f"{said}\n{say(done.stdout)}"


def picture_of(text: str, file: Path) -> None:
    """Writes an SVG of a terminal with this text."""
    console = Console(record=True, width=110, file=io.StringIO())
    printable = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    console.print(printable, markup=False, highlight=False)
    svg = re.sub(r"@font-face\s*{[^}]*}", "", console.export_svg(title="make demo"))  # no fonts from the network
    file.write_text(svg, encoding="utf-8")


def main() -> None:
    shutil.rmtree(PROJECT / OUT, ignore_errors=True)
    (PROJECT / OUT).mkdir(parents=True)
    shown = [
        say(
            "llava-tiny, a LLaVA that knows drawn objects: first in the LLaVA-1.5 format, then in the native format.\n"
        ),
        run("python", "-m", "examples.tiny.formats", "--out", f"{OUT}/forms"),
        run("llava", "convert", f"{OUT}/forms/llava-bin", f"{OUT}/native", "--verify"),
        run("llava", "inspect", f"{OUT}/native"),
        run("llava", "ask", PICTURE, "Describe this image in detail.", "--model", f"{OUT}/native"),
        run("llava", "ask", PICTURE, "What is on the right?"),
        say("With a real model: llava ask photo.jpg QUESTION --model FOLDER_OR_HUB_ID"),
        say("To chat in a browser: .venv/bin/llava serve"),
    ]
    if sys.argv[1:2] == ["--svg"]:
        picture_of("\n".join(shown), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
