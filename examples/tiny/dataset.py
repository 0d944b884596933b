"""Writes training data in LLaVA's format: `python -m examples.tiny.dataset --kind instruct --n 9 …`.

The output is data.json and, except for `text`, images.tar. It does not depend on the number of workers.
"""

import io
import json
import multiprocessing
import os
import random
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import track

from examples.tiny.glyphs import Glyphs
from examples.tiny.questions import Asker, Knowledge, Turn, caption, description, dialogue
from examples.tiny.talk import talk
from examples.tiny.things import a
from examples.tiny.truth import Truth
from examples.tiny.world import Scene, color_of, draw, imagine
from llava.errors import ConfigError, LlavaError
from llava.tensors.atomic import new_folder

DataKind = Literal["caption", "instruct", "text"]
Lessons = Literal["all", "names"]  # names: one thing per scene, and only its name is asked for
TRAINING_SEEDS = 2**31  # training scenes have seeds below this, scoring scenes from here on
TEXT_SHARE = 0.08  # fraction of instruct samples without a picture
CHUNK = 100  # samples per task of a worker
BRIEFLY = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Give a short description of the image.",
    "What is in the picture, in short?",
    "Summarise the picture.",
    "Write a short caption.",
)


@dataclass(frozen=True)
class Job:
    """Everything that determines a data set except the number of samples."""

    glyphs: tuple[Path, ...]
    kind: DataKind
    seed: int
    entries: int | None  # use only this many things of the pack
    stylise: float
    lessons: Lessons = "all"

    def writer(self) -> "Writer":
        """The writer of this job's samples."""
        if self.lessons == "all":
            return Writer(self)
        from examples.tiny.naming import Namer

        return Namer(self)


class Writer:
    """Makes samples one by one. Each depends only on its index."""

    def __init__(self, job: Job):
        self.job = job
        self.glyphs = Glyphs.load(*job.glyphs).first(job.entries)
        self.knowledge = know(self.glyphs)

    def sample(self, i: int) -> tuple[dict[str, object], bytes | None]:
        """A sample as in the JSON, and its picture as JPEG."""
        rng = random.Random(f"{self.job.kind} {self.job.seed} {i}")
        ask, name = Asker(rng, self.knowledge), f"{self.job.kind}-{self.job.seed}-{i:06}"
        if self.job.kind == "text" or (self.job.kind == "instruct" and rng.random() < TEXT_SHARE):
            return {"id": name, "conversations": conversations(self.words(ask), "")}, None
        scene = draw(rng.randrange(TRAINING_SEEDS), self.glyphs, self.glyphs.styles, stylise_p=self.job.stylise)
        turns = dialogue(ask, scene, rng.randint(3, 6)) if self.job.kind == "instruct" else [brief(ask, scene)]
        picture = f"{name}.jpg"
        return {"id": name, "image": picture, "conversations": conversations(turns, "<image>\n")}, jpeg(scene)

    def words(self, ask: Asker) -> list[Turn]:
        """A text-only dialogue. For language model training, also scenes described in words."""
        if self.job.kind == "instruct" or ask.rng.random() < 0.3:
            return talk(ask, ask.rng.randint(1, 4))
        scene = imagine(ask.rng.randrange(TRAINING_SEEDS), self.glyphs.entries)
        turns = dialogue(ask, scene, ask.rng.randint(2, 6))
        first = turns[0]
        told = f"{description(Truth(scene))}\n{first.question}"
        return [Turn(first.kind, first.measure, told, first.answer), *turns[1:]]


def know(glyphs: Glyphs) -> Knowledge:
    return Knowledge(glyphs.entries, {entry: shade for entry in glyphs.entries if (shade := color_of(glyphs, entry))})


def brief(ask: Asker, scene: Scene) -> Turn:
    """The single exchange for stage 1: everything in the picture, in one sentence."""
    text = caption(Truth(scene)).removesuffix(".")
    if scene.background.color:
        text += f" on {a(scene.background.color)} background"
    if scene.words:
        text += f" with the text {' and '.join(word.text for word in scene.words)}"
    return Turn("caption", "names", ask.rng.choice(BRIEFLY), f"{text}.")


def conversations(turns: list[Turn], before: str) -> list[dict[str, str]]:
    """Turns in LLaVA's format. before: text in front of the first question."""
    said = []
    for turn in turns:
        said += [{"from": "human", "value": before + turn.question}, {"from": "gpt", "value": turn.answer}]
        before = ""
    return said


def jpeg(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    scene.image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


# ---------------------------------------------------------------- worker processes

_writer: Writer | None = None  # the writer of this worker process


def _begin(job: Job) -> None:
    global _writer  # the only way to keep state in a pool worker
    _writer = job.writer()


def _chunk(numbers: range) -> list[tuple[dict[str, object], bytes | None]]:
    assert _writer is not None
    return [_writer.sample(i) for i in numbers]


def samples(job: Job, n: int, workers: int) -> Iterator[list[tuple[dict[str, object], bytes | None]]]:
    """Samples 0 to n - 1 in order, in chunks."""
    chunks = [range(i, min(i + CHUNK, n)) for i in range(0, n, CHUNK)]
    if workers <= 1:
        writer = job.writer()
        yield from ([writer.sample(i) for i in chunk] for chunk in chunks)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _begin, (job,)) as pool:
        yield from pool.imap(_chunk, chunks)


def write(job: Job, out: Path, n: int, workers: int = 1) -> None:
    """Writes the folder, which appears only when it is complete. Raises ConfigError if it already exists."""
    if out.exists():
        raise ConfigError(f"{out} already exists; delete it, or choose a new folder")
    with new_folder(out, 0) as unfinished:
        _fill(unfinished, job, n, workers)


def _fill(folder: Path, job: Job, n: int, workers: int) -> None:
    console = Console(stderr=True)
    chunks = track(
        samples(job, n, workers), "samples", total=-(-n // CHUNK), console=console, disable=not sys.stderr.isatty()
    )
    said: list[dict[str, object]] = []
    with tarfile.open(folder / "images.tar", "w", format=tarfile.USTAR_FORMAT) as images:
        for sample, picture in (pair for chunk in chunks for pair in chunk):
            said.append(sample)
            if picture is not None:
                member = tarfile.TarInfo(str(sample["image"]))
                member.size = len(picture)
                images.addfile(member, io.BytesIO(picture))
    if job.kind == "text":
        (folder / "images.tar").unlink()
    (folder / "data.json").write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")


def main(
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    kind: Annotated[str, typer.Option(help="kind of samples: caption, instruct or text")],
    n: Annotated[int, typer.Option("--n", help="number of samples")],
    glyphs: Annotated[list[Path], typer.Option(help="pack of glyphs; repeatable")] = [  # noqa: B006
        Path("build/tiny/glyphs.zip")
    ],
    seed: Annotated[int, typer.Option(help="seed of the scenes")] = 0,
    workers: Annotated[int, typer.Option(help="number of processes")] = os.cpu_count() or 1,
    entries: Annotated[int | None, typer.Option(help="use only this many things")] = None,
    stylise: Annotated[float, typer.Option(help="probability that a thing is drawn in another style, 0 to 1")] = 0.0,
    lessons: Annotated[str, typer.Option(help="all, or names: one thing per scene, asking only for its name")] = "all",
) -> None:
    """Draw scenes and write dialogues about them."""
    try:
        if kind not in ("caption", "instruct", "text"):
            raise ConfigError(f"--kind is {kind!r}; expected caption, instruct or text")
        if lessons not in ("all", "names"):
            raise ConfigError(f"--lessons is {lessons!r}; expected all or names")
        write(Job(tuple(glyphs), kind, seed, entries, stylise, lessons), out, n, workers)  # type: ignore[arg-type]
    except LlavaError as error:
        typer.echo(f"dataset: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
