"""The easiest lessons: one thing a scene, and only its name is asked. `python -m examples.tiny.naming`.

The smoke build of llava-tiny learns from them what a few hundred steps can teach: the language model to repeat a name
that it was told, the projector to say it where the picture stands. Options and files are those of
`examples.tiny.dataset`.
"""

import io
import json
import random
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from examples.tiny.dataset import TRAINING_SEEDS, Job, Writer, brief, conversations, jpeg
from examples.tiny.questions import Asker, Turn, naming
from examples.tiny.truth import Truth
from examples.tiny.world import Scene, draw, imagine
from llava.checkpoint.write import new_folder
from llava.errors import ConfigError, LlavaError

CAPTIONS_ALONE = 0.3  # share of the texts
MOST_BYTES = 200_000_000  # room to be had before a set is begun


class Namer(Writer):
    """Samples of one thing each; each depends on its number alone."""

    def sample(self, i: int) -> tuple[dict[str, object], bytes | None]:
        """A sample as the JSON has it, and its picture as JPEG."""
        kind, name = self.job.kind, f"{self.job.kind}-{self.job.seed}-{i:06}"
        rng = random.Random(f"one {kind} {self.job.seed} {i}")
        ask, seed = Asker(rng, self.knowledge), rng.randrange(TRAINING_SEEDS)
        if kind == "text":
            return {"id": name, **told(ask, seed)}, None
        scene = draw(seed, self.glyphs, self.glyphs.styles, n_objects=1, words=())
        turn = brief(ask, scene) if kind == "caption" else name_of(ask, scene)
        return {"id": name, "image": f"{name}.jpg", "conversations": conversations([turn], "<image>\n")}, jpeg(scene)


def told(ask: Asker, seed: int) -> dict[str, object]:
    """A caption alone, or told in place of the picture with the question what it is."""
    scene = imagine(seed, ask.knowledge.entries)
    scene = replace(scene, objects=scene.objects[:1], words=[])
    caption = brief(ask, scene).answer
    if ask.rng.random() < CAPTIONS_ALONE:
        return {"text": caption}
    turn = name_of(ask, scene)
    return {"conversations": conversations([replace(turn, question=f"{caption}\n{turn.question}")], "")}


def name_of(ask: Asker, scene: Scene) -> Turn:
    turn = naming(ask, Truth(scene))
    assert turn is not None  # one thing can always be named
    return turn


def write(job: Job, out: Path, n: int) -> None:
    """Writes the folder; it appears when it is whole. Raises ConfigError where there is one already."""
    if out.exists():
        raise ConfigError(f"{out} is there already; expected a folder that is not there yet: delete it or name another")
    namer, said = Namer(job), list[dict[str, object]]()
    with new_folder(out, MOST_BYTES) as folder:
        with tarfile.open(folder / "images.tar", "w", format=tarfile.USTAR_FORMAT) as images:
            for sample, picture in map(namer.sample, range(n)):
                said.append(sample)
                if picture is None:
                    continue
                member = tarfile.TarInfo(str(sample["image"]))
                member.size = len(picture)
                images.addfile(member, io.BytesIO(picture))
        if job.kind == "text":
            (folder / "images.tar").unlink()
        (folder / "data.json").write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")


def main(
    out: Annotated[Path, typer.Option(help="folder to write; must not be there yet")],
    kind: Annotated[str, typer.Option(help="caption, instruct or text")],
    n: Annotated[int, typer.Option("--n", help="samples")],
    glyphs: Annotated[Path, typer.Option(help="pack of glyphs")] = Path("build/tiny/glyphs.zip"),
    seed: Annotated[int, typer.Option(help="another seed, other scenes")] = 0,
    workers: Annotated[int, typer.Option(help="processes; one is enough for so little")] = 1,
    entries: Annotated[int | None, typer.Option(help="use so many of the things only")] = None,
) -> None:
    """Draws scenes of one thing and writes what it is."""
    try:
        if kind not in ("caption", "instruct", "text"):
            raise ConfigError(f"--kind is {kind!r}; expected caption, instruct or text")
        write(Job((glyphs,), kind, seed, entries, 0.0), out, n)  # type: ignore[arg-type]
    except LlavaError as error:
        typer.echo(f"naming: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
