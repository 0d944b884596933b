"""Builds the weights of llava-tiny from glyphs: `python -m examples.tiny.build`.

The stages are a vision tower, a language model, and LLaVA's two stages with `llava train`, the second in two parts.
Each stage starts from the weights of earlier ones and can be repeated on its own. Training data is drawn in the
background.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Annotated, Literal, get_args

import typer

Stage = Literal["tower", "language", "pretrain", "finetune", "polish", "ship"]
STAGES: tuple[Stage, ...] = get_args(Stage)
DRAWN = {"language": "text", "pretrain": "caption", "finetune": "instruct", "polish": "fresh"}  # stage -> its data set
SETS = {  # data set -> kind and seed
    "text": ("text", 0),
    "caption": ("caption", 1),
    "instruct": ("instruct", 2),
    "fresh": ("instruct", 3),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """The amount of data and training in each stage."""

    data: dict[str, int]  # kind of data set -> samples
    tower: tuple[str, ...]  # command-line options of tower.py
    language: tuple[str, ...]  # command-line options of language.py
    drawing: tuple[str, ...]  # command-line options of dataset.py
    recipe: dict[Stage, tuple[str, ...]] = field(default_factory=dict)  # --set options per stage


FULL = Size(
    data={"text": 200_000, "caption": 40_000, "instruct": 120_000, "fresh": 215_000},
    tower=("--minutes", "6"),
    language=("--minutes", "1.3"),
    drawing=("--stylise", "0.25"),
)
_ON_CPU = ("compute_dtype=float32", "compile=false", "num_workers=1", "pad_to=1", "max_steps=0")
SMOKE = Size(  # eight things, one per scene, naming only: under two minutes on two cores
    data={"text": 1500, "caption": 600, "instruct": 1000, "fresh": 300},
    tower=(
        *("--entries", "8", "--words", "0", "--objects", "1", "--no-augment", "--batch", "32", "--steps", "280"),
        *("--lr", "4e-3", "--image-size", "48", "--patch-size", "8", "--dim", "64", "--layers", "2", "--heads", "2"),
        *("--mlp", "128"),
    ),
    language=(
        *("--batch", "8", "--row", "256", "--dim", "64", "--layers", "2", "--heads", "2", "--mlp", "160"),
        *("--vocab", "512", "--lr", "5e-3", "--steps", "200"),
    ),
    drawing=("--lessons", "names", "--entries", "8"),
    recipe={
        "pretrain": (*_ON_CPU, "epochs=4", "global_batch_size=16", "micro_batch_size=16", "lr=4e-3"),
        "finetune": (*_ON_CPU, "epochs=2", "global_batch_size=8", "micro_batch_size=8"),
        "polish": (*_ON_CPU, "epochs=1", "global_batch_size=8", "micro_batch_size=8"),
    },
)


class Build:
    """One build in one folder."""

    def __init__(self, work: Path, glyphs: Path, size: Size, changes: tuple[str, ...] = ()):
        self.work, self.glyphs, self.size, self.changes = work, glyphs, size, changes
        self.drawing: Thread | None = None

    def run(self, stages: list[Stage]) -> dict[str, float]:
        """Runs the stages, replacing their earlier output, and returns the seconds each one took."""
        self._draw_ahead([DRAWN[stage] for stage in stages if stage in DRAWN])
        seconds: dict[str, float] = {}
        for stage in stages:
            began = time.monotonic()
            getattr(self, stage)()
            seconds[stage] = round(time.monotonic() - began, 1)
            print(json.dumps({"stage": stage, "seconds": seconds[stage]}), flush=True)
        return seconds

    def tower(self) -> None:
        out = self._fresh("tower")
        _python("-m", "examples.tiny.tower", "--glyphs", str(self.glyphs), "--out", str(out), *self.size.tower)

    def language(self) -> None:
        texts, out = self._data("text"), self._fresh("lm")
        _python("-m", "examples.tiny.language", "--texts", str(texts), "--out", str(out), *self.size.language)

    def pretrain(self) -> None:
        self._train("pretrain", self._data("caption"))

    def finetune(self) -> None:
        self._train("finetune", self._data("instruct"), f"projector={self.work / 'pretrain' / 'model'}")

    def polish(self) -> None:
        """Continues stage 2 on unseen scenes, to reduce overfitting."""
        self._train("polish", self._data("fresh"), f"model={self.work / 'finetune' / 'model'}")

    def ship(self) -> None:
        """Converts the trained model to the native format."""
        source, target = self.work / "polish" / "model", self.work / "llava-tiny"
        shutil.rmtree(target, ignore_errors=True)
        _python("-m", "llava.cli", "convert", str(source), str(target), "--vision-tower", str(self.work / "tower"))

    def _train(self, stage: Stage, data: Path, *changes: str) -> None:
        out = self._fresh(stage)
        values = (
            f"model={self.work / 'lm'}",
            f"vision_tower={self.work / 'tower'}",
            f'data=["{data}"]',
            f"images={data.with_name('images.tar')}",
            f"output_dir={out}",
            *changes,
            *self.size.recipe.get(stage, ()),
            *self.changes,
        )
        sets = [word for value in values for word in ("--set", value)]
        _python("-m", "llava.cli", "train", f"llava-tiny/{stage}", *sets)

    def _fresh(self, name: str) -> Path:
        shutil.rmtree(self.work / name, ignore_errors=True)
        return self.work / name

    def _draw_ahead(self, names: list[str]) -> None:
        """Draws the missing data sets in the background, one after the other."""
        missing = [name for name in names if not (self.work / name).is_dir()]
        self.drawing = Thread(target=self._draw, args=missing, daemon=True)
        self.drawing.start()

    def _draw(self, *names: str) -> None:
        """Draws data sets. Each appears only when it is complete."""
        for name in names:
            self._draw_one(name)

    def _draw_one(self, name: str) -> None:
        kind, seed = SETS[name]
        sizes = ("--kind", kind, "--n", str(self.size.data[name]), "--seed", str(seed))
        workers = str(max(1, (os.cpu_count() or 2) - 1))
        files = ("--glyphs", str(self.glyphs), "--out", str(self.work / name), "--workers", workers)
        _python("-m", "examples.tiny.dataset", *sizes, *files, *self.size.drawing)

    def _data(self, name: str) -> Path:
        """Waits for a data set and returns its file."""
        going = True
        while not (self.work / name).is_dir():
            if not going:
                raise SystemExit(f"build: {self.work / name} was not drawn")
            # checked once more, because the thread may just have finished it
            going = self.drawing is not None and self.drawing.is_alive()
            time.sleep(0.2)
        return self.work / name / "data.json"


def _python(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True)


def main(
    stages: Annotated[list[str] | None, typer.Argument(help=f"any of {', '.join(STAGES)}; default: all")] = None,
    work: Annotated[Path, typer.Option(help="folder for pretrained parts, data and runs")] = Path("build/tiny"),
    glyphs: Annotated[Path, typer.Option(help="pack of glyphs made by examples.tiny.glyphs")] = Path(
        "build/tiny/glyphs.zip"
    ),
    smoke: Annotated[bool, typer.Option(help="small build: eight things, two minutes on two cores")] = False,
    changes: Annotated[list[str] | None, typer.Option("--set", help="override a recipe key, as KEY=VALUE")] = None,
) -> None:
    """Build llava-tiny. Writes the trained model to WORK/polish/model and, in the native format, to WORK/llava-tiny."""
    chosen: list[Stage] = [stage for stage in STAGES if not stages or stage in stages]
    if unknown := set(stages or ()) - set(STAGES):
        raise typer.BadParameter(f"{unknown.pop()}: expected any of {', '.join(STAGES)}")
    seconds = Build(work, glyphs, SMOKE if smoke else FULL, tuple(changes or ())).run(chosen)
    print(json.dumps({"seconds": seconds, "total": round(sum(seconds.values()), 1)}))


if __name__ == "__main__":
    typer.run(main)
