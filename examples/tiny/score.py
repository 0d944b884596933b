"""Scores a model on unseen scenes: `python -m examples.tiny.score MODEL --out scores.json`.

The seeds of the scenes are never used in training. One fifth of the scenes is asked about with held-back phrasings,
another fifth contains held-back pairs of things. The unseen style is scored if its pack is given, and is used for
nothing else.
"""

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from examples.tiny.dataset import TRAINING_SEEDS, know
from examples.tiny.glyphs import Glyphs
from examples.tiny.phrases import Phrasing
from examples.tiny.questions import Asker, Knowledge, Turn, dialogue, naming
from examples.tiny.truth import Truth
from examples.tiny.vocabulary import vocabulary
from examples.tiny.world import Pairs, draw
from llava.errors import ConfigError, LlavaError
from llava.eval.marks import Vocabulary, correct, found_and_invented

SUBSETS: dict[str, tuple[float, Phrasing, Pairs]] = {  # fraction, phrasings, pairs of things
    "fresh scenes": (0.6, "training", "training"),
    "held-back phrasings": (0.2, "held back", "training"),
    "held-back pairs": (0.2, "training", "held back"),
}
CONVERSATION = ("naming", "listing", "counting", "position", "colour", "yes or no", "reading", "absent")
TURNS = 4  # questions per scene

Answer = Callable[[Sequence[tuple[Image.Image, Turn]]], list[str]]


@dataclass(frozen=True)
class Item:
    """One question to the model."""

    seed: int
    style: str
    subset: str
    single: bool  # the scene has a single thing
    image: Image.Image
    turn: Turn


def items(glyphs: Glyphs, trained: Sequence[str], n: int, seed: int) -> Iterator[Item]:
    """Questions about n scenes, evenly divided among the styles. Their seeds are 2**31 and above.

    trained: the styles of training. In an unseen style, a colour is asked for only if it is the same as in those.
    """
    styles = glyphs.styles
    knowledge = {style: know(glyphs.only([*trained, style])) for style in styles}
    for i in range(n):
        scene_seed = TRAINING_SEEDS + random.Random(f"score {seed} {i}").randrange(TRAINING_SEEDS)
        style, subset = styles[i % len(styles)], subset_of(i // len(styles))
        yield from _asked(glyphs, knowledge[style], style, subset, scene_seed)


def subset_of(i: int) -> str:
    """The subset of the scene with index i of a style: of each ten, as many are in a subset as its fraction says."""
    subsets = [name for name, (share, *_) in SUBSETS.items() for _ in range(round(10 * share))]
    return subsets[i % len(subsets)]


def _asked(glyphs: Glyphs, knowledge: Knowledge, style: str, subset: str, seed: int) -> Iterator[Item]:
    _, phrasing, pairs = SUBSETS[subset]
    rng = random.Random(seed)
    # a pair needs two things
    n_objects = rng.randint(2, 6) if pairs == "held back" else None
    scene = draw(seed, glyphs, [style], pairs=pairs, n_objects=n_objects)
    ask, truth = Asker(rng, knowledge, phrasing), Truth(scene)
    single = len(scene.objects) == 1
    turns = dialogue(ask, scene, TURNS)
    if (name := naming(ask, truth)) and all(turn.kind != name.kind for turn in turns):
        turns.append(name)  # the name of a single thing is always asked for
    yield from (Item(seed, style, subset, single, scene.image, turn) for turn in turns)


def tally(items: Sequence[Item], replies: Sequence[str], words: Vocabulary) -> dict[str, Any]:
    """Fractions of correct replies for each style: per kind, over all conversation questions, and per subset."""
    right: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    described: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for item, reply in zip(items, replies, strict=True):
        kind = "naming of single objects" if item.single and item.turn.kind == "naming" else item.turn.kind
        right[item.style, item.subset, kind].append(_correct(item.turn, reply, words))
        if item.turn.measure == "detail":
            described[item.style].append(found_and_invented(item.turn.answer, reply, words))
    styles = list(dict.fromkeys(item.style for item in items))
    return {style: _of_style(style, right, described[style]) for style in styles}


def _correct(turn: Turn, reply: str, words: Vocabulary) -> bool:
    return correct(turn.measure, turn.answer, reply, words)


def _of_style(
    style: str, right: dict[tuple[str, str, str], list[bool]], described: list[tuple[int, int, int]]
) -> dict[str, Any]:
    kinds = sorted({kind for other, _, kind in right if other == style})

    def share(wanted: Callable[[str, str], bool]) -> dict[str, float | int]:
        marks = [mark for (s, subset, kind), m in right.items() if s == style and wanted(subset, kind) for mark in m]
        return {"right": round(sum(marks) / max(1, len(marks)), 4), "questions": len(marks)}

    def talked(kind: str) -> bool:
        return kind in (*CONVERSATION, "naming of single objects")

    found, there, invented = (sum(column) for column in zip(*described, strict=True)) if described else (0, 0, 0)
    return {
        "kinds": {kind: share(lambda _, k, kind=kind: k == kind) for kind in kinds},  # type: ignore[misc]
        "conversation": share(lambda _, kind: talked(kind)),
        "conversation by subset": {
            subset: share(lambda s, kind, subset=subset: s == subset and talked(kind))  # type: ignore[misc]
            for subset in SUBSETS
        },
        "detail": {
            "objects named": round(found / max(1, there), 4),
            "objects invented": round(invented / max(1, found + invented), 4),  # fraction of all objects named
            "descriptions": len(described),
        },
    }


def answers(model: str, *, device: str, batch_size: int, template: str | None, blind: bool) -> Answer:
    """Returns a function that gives a model's greedy replies. blind: asks the same questions without the picture."""
    import llava
    from llava.assistant import question_about

    assistant = llava.load(model, device=device, template=template)

    def answer(asked: Sequence[tuple[Image.Image, Turn]]) -> list[str]:
        replies = [""] * len(asked)
        for long in (False, True):  # descriptions are batched separately, so that short replies do not wait for them
            picked = [i for i, (_, turn) in enumerate(asked) if (turn.measure == "detail") == long]
            messages = [question_about(None if blind else asked[i][0], asked[i][1].question) for i in picked]
            most = 160 if long else 64
            said = assistant.generate_batch(messages, batch_size=batch_size, temperature=0.0, max_new_tokens=most)
            for i, reply in zip(picked, said, strict=True):
                replies[i] = reply.text.strip()
        return replies

    return answer


def table(scores: dict[str, Any]) -> Table:
    shown = Table("ability", *scores, title="right replies, %")
    kinds = sorted({kind for style in scores.values() for kind in style["kinds"]})
    for kind in kinds:
        shown.add_row(kind, *(_percent(style["kinds"].get(kind)) for style in scores.values()))
    shown.add_section()
    shown.add_row("all conversation", *(_percent(style["conversation"]) for style in scores.values()))
    for subset in SUBSETS:
        shown.add_row(f"  {subset}", *(_percent(style["conversation by subset"][subset]) for style in scores.values()))
    for what in ("objects named", "objects invented"):
        shown.add_row(f"detail: {what}", *(f"{100 * style['detail'][what]:.1f}" for style in scores.values()))
    return shown


def _percent(share: dict[str, float | int] | None) -> str:
    return f"{100 * share['right']:.1f}  of {share['questions']}" if share else "-"


def main(
    model: Annotated[str, typer.Argument(help="folder or Hub id of a LLaVA checkpoint")],
    glyphs: Annotated[Path, typer.Option(help="pack of glyphs")] = Path("build/tiny/glyphs.zip"),
    unseen: Annotated[Path | None, typer.Option(help="pack of a style not used in training")] = None,
    n: Annotated[int, typer.Option("--n", help="number of scenes")] = 2000,
    seed: Annotated[int, typer.Option(help="seed of the scenes")] = 0,
    entries: Annotated[int | None, typer.Option(help="use only this many things")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    batch_size: Annotated[int, typer.Option(help="batch size")] = 64,
    template: Annotated[str | None, typer.Option(help="conversation template; default: the checkpoint's")] = None,
    blind: Annotated[bool, typer.Option("--blind", help="ask without the pictures, to measure guessing")] = False,
    show: Annotated[int, typer.Option(help="print this many wrong replies")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Score a model on unseen scenes."""
    try:
        packs = Glyphs.load(glyphs, *([unseen] if unseen else [])).first(entries)
        if not packs.styles:
            raise ConfigError(f"{glyphs} contains no pictures; expected a pack with at least one style")
        asked = list(items(packs, Glyphs.load(glyphs).styles, n, seed))
        answer = answers(model, device=device, batch_size=batch_size, template=template, blind=blind)
        replies = answer([(item.image, item.turn) for item in asked])
    except LlavaError as error:
        typer.echo(f"score: {error}", err=True)
        raise typer.Exit(2) from None
    words = vocabulary(packs.entries)
    scores = tally(asked, replies, words)
    console = Console()
    console.print(table(scores))
    wrong = [(i, r) for i, r in zip(asked, replies, strict=True) if not _correct(i.turn, r, words)]
    for item, reply in wrong[:show]:
        console.print(
            f"{item.style} {item.seed} {item.turn.question!r}: {reply!r}; right: {item.turn.answer!r}", markup=False
        )
    if out:
        record = {
            "model": Path(model).name, "scenes": n, "questions": len(asked), "seed": seed, "things": len(packs.entries),
            "seeds of scenes": "2**31 and above", "blind": blind, "scores": scores,
        }  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
