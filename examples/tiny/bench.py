"""Writes the benchmark of `llava eval run` about drawn scenes: `python -m examples.tiny.bench`.

The output is questions.jsonl, vocabulary.json and images/, in the layout that `llava eval tasks` describes. Each scene
is asked about three times in the manner of a conversation, described once, and asked about once with a reason. As in
`score.py`, the seeds of the scenes are never used in training, one fifth of the scenes is asked about with held-back
phrasings, and another fifth contains held-back pairs of things.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from examples.tiny.dataset import TRAINING_SEEDS, jpeg, know
from examples.tiny.glyphs import Glyphs
from examples.tiny.paint import COLORS, WORDS
from examples.tiny.questions import Asker, Turn, complex_, detail, dialogue
from examples.tiny.score import CONVERSATION, SUBSETS, subset_of
from examples.tiny.truth import Truth
from examples.tiny.vocabulary import forms, vocabulary
from examples.tiny.world import Scene, draw
from llava.errors import LlavaError
from llava.eval.marks import Vocabulary
from llava.tensors.atomic import new_folder

CONVERSATIONS = 3  # questions per scene, of different kinds
DRAWS = 12  # questions drawn, of which some are of the other categories
TRIES = 16  # to find a complex question, which not every scene has
NAMED = 0.8  # probability that the answer to it is a thing, if one is found


def files(glyphs: Glyphs, n: int, seed: int) -> dict[str, bytes]:
    """Returns the files of the questions about n scenes, by their paths."""
    knowledge, words, pictures, lines = know(glyphs), vocabulary(glyphs.entries), {}, []
    for i in range(n):
        rng = random.Random(f"bench {seed} {i}")
        style, subset = glyphs.styles[i % len(glyphs.styles)], subset_of(i // len(glyphs.styles))
        _, phrasing, pairs = SUBSETS[subset]
        told = {"style": style, "subset": subset, "seed": TRAINING_SEEDS + rng.randrange(TRAINING_SEEDS)}
        n_objects = rng.randint(2, 6) if pairs == "held back" else None  # a pair needs two things
        scene = draw(told["seed"], glyphs, [style], pairs=pairs, n_objects=n_objects)
        pictures[f"images/{i:03}.jpg"] = jpeg(scene)
        lines += [line | told for line in _asked(f"{i:03}", scene, Asker(rng, knowledge, phrasing), words)]
    known = {"things": forms(glyphs.entries), "colors": [*COLORS], "printed": [*WORDS]}
    return {"questions.jsonl": b"".join(map(_dumped, lines)), "vocabulary.json": _dumped(known), **pictures}


def _asked(name: str, scene: Scene, ask: Asker, words: Vocabulary) -> Iterator[dict[str, Any]]:
    """Yields the lines of questions.jsonl about a scene."""
    talked = {turn.kind: turn for turn in dialogue(ask, scene, DRAWS) if turn.kind in CONVERSATION}
    truth = Truth(scene)
    turns = [("conv", turn) for turn in [*talked.values()][:CONVERSATIONS]]
    turns += [("detail", detail(ask, truth)), *(("complex", turn) for turn in _reasoned(ask, truth, words))]
    for k, (category, turn) in enumerate(turns):
        yield {"question_id": f"{name}-{k}", "image": f"{name}.jpg", "text": turn.question} | _rule(category, turn)


def _reasoned(ask: Asker, truth: Truth, words: Vocabulary) -> list[Turn]:
    """Returns a complex question, or none. The answer to most of them is a thing that the question does not name."""
    tried = [turn for _ in range(TRIES) if (turn := complex_(ask, truth))]
    named = [turn for turn in tried if words.split(turn.answer)[0] - words.split(turn.question)[0]]
    nothing = [turn for turn in tried if not words.split(turn.answer)[0]]
    return (named if named and ask.rng.random() < NAMED else nothing)[:1]


def _rule(category: str, turn: Turn) -> dict[str, str]:
    return {"category": category, "kind": turn.kind, "measure": turn.measure, "answer": turn.answer}


def _dumped(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def main(
    glyphs: Annotated[Path, typer.Option(help="pack of glyphs")] = Path("build/tiny/glyphs.zip"),
    n: Annotated[int, typer.Option("--n", help="number of scenes")] = 100,
    seed: Annotated[int, typer.Option(help="seed of the scenes")] = 0,
    out: Annotated[Path, typer.Option(help="folder to write, which must not exist")] = Path("build/tiny/bench"),
) -> None:
    """Write the scenes, questions and rules of the benchmark."""
    try:
        made = files(Glyphs.load(glyphs), n, seed)
        n_bytes = sum(map(len, made.values()))
        with new_folder(out, n_bytes) as partial:
            (partial / "images").mkdir()
            for name, data in made.items():
                (partial / name).write_bytes(data)
    except LlavaError as error:
        typer.echo(f"bench: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{out}: {n} scenes, {n_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
