"""Does the model look at what it names? `python -m examples.tiny.attend MODEL --out attention.json`.

The model lists the things in a scene. For one of them, the patches with the most attention to its name are covered, a
tenth of the picture in one piece, and the model is asked again. The same is done with a piece of the same shape
elsewhere. If the attention means something, the first makes the model miss the thing much more often.

Patches are numbered (row, column).
"""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, ImageDraw
from rich.progress import track

from examples.tiny.dataset import TRAINING_SEEDS, know
from examples.tiny.glyphs import Glyphs
from examples.tiny.questions import Asker
from examples.tiny.truth import Truth
from examples.tiny.vocabulary import vocabulary
from examples.tiny.world import draw
from llava.assistant import Assistant, question_about
from llava.errors import LlavaError
from llava.explain.maps import AttentionMap

COVERED = 0.1  # of the patches that show the picture
MAX_NEW_TOKENS = 64
Z = 1.96  # standard deviations of a 95 % interval

Patch = tuple[int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Case:
    """A scene, the question about it, and the name of the thing whose attention is tested."""

    seed: int
    image: Image.Image
    question: str
    name: str


def cases(glyphs: Glyphs, n: int, seed: int) -> Iterator[Case]:
    """Yields scenes of several things, one of which has a name of its own. Their seeds are 2**31 and above."""
    knowledge, i = know(glyphs), 0
    while n:
        scene_seed = TRAINING_SEEDS + random.Random(f"attend {seed} {i}").randrange(TRAINING_SEEDS)
        i += 1
        rng = random.Random(scene_seed)
        scene = draw(scene_seed, glyphs, glyphs.styles)
        truth = Truth(scene)
        if len(truth.objects) > 1 and truth.clear:
            name = rng.choice(truth.clear).entry.name
            yield Case(scene_seed, scene.image, Asker(rng, knowledge).put("all"), name)
            n -= 1


def tokens_of(name: str, tokens: Sequence[str]) -> list[int]:
    """Returns the tokens of a name in a reply; none if it does not occur."""
    start = "".join(tokens).lower().find(name)
    found, at = [], 0
    for i, token in enumerate(tokens):
        if start >= 0 and at < start + len(name) and at + len(token) > start and token.strip():
            found.append(i)
        at += len(token)
    return found


def attention_to(name: str, found: AttentionMap) -> tuple[dict[Patch, Box], dict[Patch, float]]:
    """Returns the boxes of the patches, and the attention of the tokens of a name to each."""
    (picture,) = found.pictures
    lefts, tops = (sorted({box[side] for box in picture.boxes}) for side in (0, 1))
    patches = [(tops.index(box[1]), lefts.index(box[0])) for box in picture.boxes]
    shares = picture.shares[tokens_of(name, found.tokens)].mean(0).tolist()
    return dict(zip(patches, picture.boxes, strict=True)), dict(zip(patches, shares, strict=True))


def piece(shares: Mapping[Patch, float], n: int) -> set[Patch]:
    """Returns n connected patches: the one with the most attention, then always the neighbour with the most."""
    chosen = {max(shares, key=lambda patch: shares[patch])}
    while len(chosen) < n:
        beside = {(r + y, c + x) for r, c in chosen for y, x in ((0, 1), (1, 0), (0, -1), (-1, 0))} - chosen
        chosen.add(max(beside & shares.keys(), key=lambda patch: shares[patch]))
    return chosen


def elsewhere(patches: AbstractSet[Patch], chosen: AbstractSet[Patch], rng: random.Random) -> set[Patch] | None:
    """Returns a piece of the same shape at a random place, without a common patch; None if there is none."""
    rows, columns = (1 + max(patch[axis] for patch in patches) for axis in (0, 1))
    moved = [{(r + y, c + x) for r, c in chosen} for y in range(1 - rows, rows) for x in range(1 - columns, columns)]
    places = [one for one in moved if one <= patches and not one & chosen]
    return rng.choice(places) if places else None


def covered(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Returns the picture with its mean colour in some boxes."""
    image = image.copy()
    mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    for left, top, right, bottom in boxes:
        corners = (math.floor(left), math.floor(top), math.ceil(right) - 1, math.ceil(bottom) - 1)
        ImageDraw.Draw(image).rectangle(corners, fill=mean)
    return image


def measure(assistant: Assistant, glyphs: Glyphs, n: int, seed: int) -> dict[str, Any]:
    """Returns how often a thing is missed if what its name looks at is covered, and if something else is."""
    words = vocabulary(glyphs.entries)
    asked, whose, counts = [], [], {"scenes": 0, "not named before": 0, "no other place": 0}
    for case in track(cases(glyphs, n, seed), "attention", total=n):
        counts["scenes"] += 1
        found = assistant.attention_map(question_about(case.image, case.question), max_new_tokens=MAX_NEW_TOKENS)
        if case.name not in words.split(found.reply.text)[0] or not tokens_of(case.name, found.tokens):
            counts["not named before"] += 1
            continue
        boxes, shares = attention_to(case.name, found)
        chosen = piece(shares, round(COVERED * len(boxes)))
        other = elsewhere(boxes.keys(), chosen, random.Random(case.seed))
        if other is None:
            counts["no other place"] += 1
            continue
        for patches in (chosen, other):
            asked.append(question_about(covered(case.image, [boxes[one] for one in patches]), case.question))
        whose.append(case.name)
    replies = assistant.generate_batch(asked, max_new_tokens=MAX_NEW_TOKENS)
    missed = [name not in words.split(reply.text)[0] for name, reply in zip(_twice(whose), replies, strict=True)]
    on, off = sum(missed[::2]), sum(missed[1::2])
    return {
        **counts,
        "what its name looks at is covered": _rate(on, len(whose)),
        "the same shape elsewhere": _rate(off, len(whose)),
        "times as often": _ratio(on, off, len(whose)),
    }


def _twice(names: Sequence[str]) -> list[str]:
    return [name for name in names for _ in range(2)]


def _rate(missed: int, n: int) -> dict[str, Any]:
    """A fraction with its 95 % interval (Wilson, 1927)."""
    p, z = missed / n, Z**2 / n
    centre, half = (p + z / 2) / (1 + z), Z * math.sqrt(p * (1 - p) / n + z / (4 * n)) / (1 + z)
    return {"missed": missed, "of": n, "rate": round(p, 4), "95 %": [round(centre - half, 4), round(centre + half, 4)]}


def _ratio(on: int, off: int, n: int) -> dict[str, Any]:
    """A ratio of two rates with its 95 % interval, from the variance of its logarithm."""
    off = max(off, 1)
    half = Z * math.sqrt(1 / max(on, 1) + 1 / off - 2 / n)
    return {"ratio": round(on / off, 2), "95 %": [round(on / off * math.exp(sign * half), 2) for sign in (-1, 1)]}


def main(
    model: Annotated[str, typer.Argument(help="folder or Hub id of a LLaVA checkpoint")],
    glyphs: Annotated[Path, typer.Option(help="pack of glyphs")] = Path("build/tiny/glyphs.zip"),
    n: Annotated[int, typer.Option("--n", help="number of scenes")] = 2000,
    seed: Annotated[int, typer.Option(help="seed of the scenes")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Measure whether covering what a word looks at changes the answer."""
    import llava

    try:
        pack = Glyphs.load(glyphs)
        found = measure(llava.load(model, device=device), pack, n, seed)
    except LlavaError as error:
        typer.echo(f"attend: {error}", err=True)
        raise typer.Exit(2) from None
    record = {"model": Path(model).name, "seed": seed, "things": len(pack.entries), "styles": pack.styles, **found}
    typer.echo(json.dumps(record, indent=1))
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
