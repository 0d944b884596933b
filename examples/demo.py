"""The main job from end to end: a checkpoint on disk, converted, answers about a picture.

The checkpoint is a small one with random weights, written here in the layout of LLaVA-1.5, so the answer is noise; with
a real checkpoint the commands are the same. `--svg FILE` also draws what was shown, for the README.
"""

import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from rich.console import Console

PROJECT = Path(__file__).resolve().parent.parent
OUT = Path("build/demo")


def draw(file: Path) -> None:
    """A lake in the evening."""
    image = Image.new("RGB", (480, 320), (250, 190, 140))
    pen = ImageDraw.Draw(image)
    pen.ellipse((300, 90, 380, 170), fill=(250, 90, 60))
    pen.polygon([(0, 200), (120, 80), (240, 200)], fill=(80, 80, 120))
    pen.rectangle((0, 200, 480, 320), fill=(60, 110, 170))
    image.save(file)


def say(text: str) -> str:
    """Shows text at once, and returns it."""
    print(text, flush=True)
    return text


def run(*command: str) -> str:
    """Shows a command and runs it as a user would; returns all that was shown."""
    said = say(f"$ {shlex.join(command)}")
    program = [sys.executable, "-m", "llava.cli"] if command[0] == "llava" else [sys.executable]
    done = subprocess.run([*program, *command[1:]], check=True, cwd=PROJECT, stdout=subprocess.PIPE, encoding="utf-8")
    return f"{said}\n{say(done.stdout)}"


def picture_of(text: str, file: Path) -> None:
    """A terminal with this text in it, as SVG."""
    console = Console(record=True, width=110, file=io.StringIO())
    printable = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    console.print(printable, markup=False, highlight=False)
    svg = re.sub(r"@font-face\s*{[^}]*}", "", console.export_svg(title="make demo"))  # no fonts from afar
    file.write_text(svg, encoding="utf-8")


def main() -> None:
    shutil.rmtree(PROJECT / OUT, ignore_errors=True)
    (PROJECT / OUT).mkdir(parents=True)
    draw(PROJECT / OUT / "picture.png")
    model = ["--model", f"{OUT}/native", "--max-new-tokens", "24"]
    shown = [
        say("A small LLaVA with RANDOM weights: every step is real, the answer is noise.\n"),
        run("python", "-m", "tests.tiny", f"{OUT}"),
        run("llava", "convert", f"{OUT}/llava", f"{OUT}/native", "--vision-tower", f"{OUT}/clip", "--verify"),
        run("llava", "inspect", f"{OUT}/native"),
        run("llava", "ask", f"{OUT}/picture.png", "What is in the picture?", *model),
        say("Noise: the weights are random. With a real model: llava ask photo.jpg QUESTION --model FOLDER_OR_HUB_ID"),
    ]
    if sys.argv[1:2] == ["--svg"]:
        picture_of("\n".join(shown), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
