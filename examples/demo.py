"""The main job from end to end: a checkpoint on disk, converted, answers about a picture.

The checkpoint is a small one with random weights, written here in the layout of LLaVA-1.5, so the answer is noise; with
a real checkpoint the commands are the same.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

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


def run(*command: str) -> None:
    """Shows a command and runs it as a user would."""
    print(f"$ {shlex.join(command)}", flush=True)
    program = [sys.executable, "-m", "llava.cli"] if command[0] == "llava" else [sys.executable]
    subprocess.run([*program, *command[1:]], check=True, cwd=PROJECT)
    print(flush=True)


def main() -> None:
    shutil.rmtree(PROJECT / OUT, ignore_errors=True)
    (PROJECT / OUT).mkdir(parents=True)
    print("A small LLaVA with RANDOM weights: every step is real, the answer is noise.\n", flush=True)
    draw(PROJECT / OUT / "picture.png")
    run("python", "-m", "tests.tiny", f"{OUT}")
    run("llava", "convert", f"{OUT}/llava", f"{OUT}/native", "--vision-tower", f"{OUT}/clip", "--verify")
    run("llava", "inspect", f"{OUT}/native")
    options = ["--model", f"{OUT}/native", "--max-new-tokens", "24"]
    run("llava", "ask", f"{OUT}/picture.png", "What is in the picture?", *options)
    print(
        "That was noise from random weights. With a real model: llava ask photo.jpg QUESTION --model FOLDER_OR_HUB_ID"
    )


if __name__ == "__main__":
    main()
