"""Scenes: one to six things on a background, sometimes with printed words. `python -m examples.tiny.world` draws three.

A scene depends only on its seed. Boxes are (left, top, right, bottom) in pixels of the scene.
"""

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from PIL import Image, ImageOps

from examples.tiny.glyphs import Entry, Glyphs
from examples.tiny.paint import (
    COLORS,
    TEXTURES,
    contrasting,
    jitter,
    lost_on,
    main_color,
    paint,
    stylise,
)
from examples.tiny.paint import FONT_VARIANTS as FONT_VARIANTS  # exported for code that draws only words
from examples.tiny.paint import WORDS as WORDS
from examples.tiny.paint import render_word as render_word
from examples.tiny.things import many
from llava.errors import LlavaError

Box = tuple[int, int, int, int]

HELD_BACK = 10  # one pair of things in this many never occurs together in a training scene
Pairs = Literal["training", "held back", "any"]


@dataclass(frozen=True)
class Placed:
    """A thing at its position. The box encloses its visible pixels."""

    entry: Entry
    style: str
    box: Box
    stylised: bool = False  # its colours may differ from the glyph's


@dataclass(frozen=True)
class PlacedWord:
    text: str
    color_name: str
    box: Box


@dataclass(frozen=True)
class Background:
    kind: str  # plain, gradient, or the name of a texture
    color: str | None  # its colour; None if it has two


@dataclass(frozen=True)
class Scene:
    """A picture and its ground truth."""

    image: Image.Image = field(compare=False)
    objects: list[Placed]
    words: list[PlacedWord]
    background: Background
    size: tuple[int, int]


def held_back(a: Entry, b: Entry) -> bool:
    """Whether a pair is held back: always the same one in HELD_BACK of all pairs of different things."""
    low, high = sorted((a.code, b.code))
    return low != high and zlib.crc32(f"{low} {high}".encode()) % HELD_BACK == 0


# ---------------------------------------------------------------- choice of things


def choose(rng: random.Random, entries: Sequence[Entry], n: int, pairs: Pairs) -> list[Entry]:
    """n things: all different, some repeated, or some from one subgroup."""
    if pairs == "held back" and n >= 2:
        chosen = list(_held_pair(rng, entries))
        allowed: Pairs = "any"
    else:
        chosen, allowed = [rng.choice(entries)], pairs
    lot = rng.random()
    if lot < 0.30 and many(chosen[0].name):  # repeat one, if its name has a plural
        chosen += [chosen[0]] * rng.randint(0, n - len(chosen))
    alike = [entry for entry in entries if entry.subgroup == chosen[0].subgroup] if 0.30 <= lot < 0.55 else entries
    for _ in range(100):
        if len(chosen) >= n:
            break
        candidate = rng.choice(alike if rng.random() < 0.7 else entries)
        if candidate not in chosen and not (allowed == "training" and any(held_back(candidate, e) for e in chosen)):
            chosen.append(candidate)
    rng.shuffle(chosen)
    return chosen


def _held_pair(rng: random.Random, entries: Sequence[Entry]) -> tuple[Entry, Entry]:
    for _ in range(1000):
        a, b = rng.choice(entries), rng.choice(entries)
        if held_back(a, b):
            return a, b
    raise LlavaError(f"no pair among {len(entries)} entries is held back; use more entries")


# ---------------------------------------------------------------- things


@lru_cache(maxsize=4096)
def _shares(glyphs: Glyphs, entry: Entry, style: str) -> tuple[float, ...]:
    """The fraction of a glyph's pixels that would be invisible on a background of each of COLORS."""
    return lost_on(glyphs.image(entry, style))


@lru_cache(maxsize=4096)
def color_of(glyphs: Glyphs, entry: Entry) -> str | None:
    """The colour of a thing in all styles of these packs; None if it has several, or if the styles differ."""
    found = {main_color(glyphs.image(entry, style)) for style in glyphs.styles if glyphs.has(entry, style)}
    return found.pop() if len(found) == 1 else None


def _sprite(rng: random.Random, glyph: Image.Image, side: float) -> Image.Image:
    """The glyph at its size, slightly rotated, cropped to its visible pixels."""
    scale = side / max(glyph.size)
    small = glyph.resize(
        (max(2, round(glyph.width * scale)), max(2, round(glyph.height * scale))), Image.Resampling.BOX
    )
    if rng.random() < 0.6:
        small = small.rotate(rng.uniform(-14, 14), Image.Resampling.BICUBIC, expand=True)
    box = small.getchannel("A").point(lambda a: 255 if a > 40 else 0).getbbox()
    return small.crop(box) if box else small


def overlap(a: Box, b: Box) -> float:
    """The common area as a fraction of the smaller box."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _place(
    rng: random.Random, size: tuple[int, int], extent: tuple[int, int], taken: list[Box], most: float
) -> Box | None:
    """A box of this extent that overlaps the others by at most `most`; None if none was found."""
    (width, height), (w, h) = size, extent
    if w > width - 4 or h > height - 4:
        return None
    for _ in range(40):
        x, y = rng.randint(2, width - w - 2), rng.randint(2, height - h - 2)
        box = (x, y, x + w, y + h)
        if all(overlap(box, other) <= most for other in taken):
            return box
    return None


def side_of(rng: random.Random, size: tuple[int, int], n: int) -> float:
    """The longer side of a thing in pixels, for n things in a scene of this size."""
    low, high = ((0.42, 0.85), (0.30, 0.52), (0.26, 0.44), (0.24, 0.38), (0.22, 0.34), (0.21, 0.30))[min(n, 6) - 1]
    side = rng.uniform(low, high) * math.sqrt(size[0] * size[1])
    most = min(0.92 * min(size), 170.0 if n == 1 else 110.0)
    return max(28.0, 0.15 * max(size), min(side, most))


# ---------------------------------------------------------------- scenes


def draw(
    seed: int,
    glyphs: Glyphs,
    styles: Sequence[str],
    *,
    n_objects: int | None = None,
    size: tuple[int, int] | None = None,
    pairs: Pairs = "training",
    chosen: Sequence[Entry] | None = None,
    words: Sequence[str] | None = None,
    stylise_p: float = 0.0,
) -> Scene:
    """Draws the scene of a seed.

    n_objects: 1 to 6. size: width, height. pairs: whether held-back pairs may, may not or must occur together. chosen:
    the things to draw. words: the words to print. stylise_p: the probability that a thing is drawn in another style.
    """
    rng = random.Random(seed)
    size = size or (rng.randint(120, 256), rng.randint(120, 256))
    n = n_objects or rng.choices((1, 2, 3, 4, 5, 6), (20, 22, 20, 16, 12, 10))[0]
    entries = list(chosen) if chosen is not None else choose(rng, glyphs.entries, n, pairs)
    style = rng.choice(list(styles))
    mixed = rng.random() < 0.25
    sprites: list[tuple[Placed, Image.Image]] = []
    lost: list[tuple[float, ...]] = []  # for each thing, the fraction invisible on each colour
    for entry in entries:
        own = [s for s in ([*styles] if mixed else [style, *styles]) if glyphs.has(entry, s)]
        drawn = rng.choice(own) if mixed else own[0]
        glyph = glyphs.image(entry, drawn)
        restyled = rng.random() < stylise_p
        if restyled:
            glyph = stylise(rng, glyph)
        if found := _fit_in(rng, glyph, size, len(entries), [thing.box for thing, _ in sprites]):
            sprites.append((Placed(entry, drawn, found[1], restyled), found[0]))
            lost.append(lost_on(glyph) if restyled else _shares(glyphs, entry, drawn))
    objects = [thing for thing, _ in sprites]
    background, names = _background(rng, lost)
    image = paint(rng, size, background.kind, names)
    for thing, sprite in sprites:
        image.paste(sprite, thing.box[:2], sprite)
    printed = _print(rng, image, names, [thing.box for thing in objects], words)
    return Scene(image, objects, printed, background, size)


def _fit_in(
    rng: random.Random, glyph: Image.Image, size: tuple[int, int], n: int, taken: list[Box]
) -> tuple[Image.Image, Box] | None:
    """The sprite, shrunk until it fits, and its position. None if the scene is full."""
    side = side_of(rng, size, n)
    smallest = max(28.0, 0.15 * max(size))
    while True:
        sprite = _sprite(rng, glyph, side)
        if box := _place(rng, size, sprite.size, taken, most=0.08):
            return sprite, box
        if side <= smallest:
            return None
        side = max(smallest, 0.85 * side)


def _background(rng: random.Random, lost: list[tuple[float, ...]]) -> tuple[Background, list[str]]:
    """A background on which everything is visible, and the names of its colours."""
    worst = np.array(lost).max(axis=0) if lost else np.zeros(len(COLORS))
    good = [name for name, share in zip(COLORS, worst, strict=True) if share < 0.3]
    good = good or [list(COLORS)[int(worst.argmin())]]
    kind = rng.choices(("plain", "gradient", rng.choice(TEXTURES)), (50, 22, 28))[0]
    if kind == "gradient" and len(good) >= 2:
        return Background(kind, None), rng.sample(good, 2)
    name = rng.choice(good)
    return Background("plain" if kind == "gradient" else kind, name), [name]


def _print(
    rng: random.Random, image: Image.Image, names: list[str], taken: list[Box], words: Sequence[str] | None
) -> list[PlacedWord]:
    """Prints words into free areas, as long as there is room."""
    inks = contrasting(names)
    wanted = rng.choices((0, 1, 2), (68, 22, 10))[0]
    texts = list(words) if words is not None else rng.sample(WORDS, wanted)
    printed: list[PlacedWord] = []
    for text in texts if inks else []:
        ink, longest = rng.choice(inks), max(image.size)
        variant, height = rng.randrange(FONT_VARIANTS), round(rng.uniform(0.11, 0.2) * longest)
        color = jitter(rng, ink)
        while height >= 0.09 * longest:
            letters = render_word(text, height, color, variant)
            if box := _place(rng, image.size, letters.size, taken, most=0.0):
                image.paste(letters, box[:2], letters)
                printed.append(PlacedWord(text, ink, box))
                taken = [*taken, (box[0] - 4, box[1] - 4, box[2] + 4, box[3] + 4)]
                break
            height = int(0.85 * height)
    return printed


def imagine(seed: int, entries: Sequence[Entry]) -> Scene:
    """The ground truth of a scene that is not drawn, for text-only dialogues."""
    rng = random.Random(seed)
    size = (rng.randint(120, 256), rng.randint(120, 256))
    objects: list[Placed] = []
    for entry in choose(rng, entries, rng.randint(1, 6), "training"):
        side = round(side_of(rng, size, 5))
        if box := _place(rng, size, (side, side), [thing.box for thing in objects], most=0.05):
            objects.append(Placed(entry, "", box))
    words = [
        PlacedWord(text, rng.choice(list(COLORS)), box)
        for text in rng.sample(WORDS, rng.choices((0, 1, 2), (60, 28, 12))[0])
        if (box := _place(rng, size, (50, 20), [thing.box for thing in objects], most=0.05))
    ]
    background = Background("plain", rng.choice(list(COLORS)))
    return Scene(Image.new("RGB", (1, 1)), objects, words, background, size)


# ---------------------------------------------------------------- the example pictures

# file: seed, style, width and height, things, words
EXAMPLES: dict[str, tuple[int, str, tuple[int, int], tuple[str, ...], tuple[str, ...]]] = {
    "kitchen.png": (7, "noto", (256, 192), ("teapot", "red apple", "croissant", "carrot"), ("MENU",)),
    "beach.png": (11, "noto", (240, 180), ("palm tree", "crab", "sailboat"), ("SUMMER",)),
    "zoo.png": (105, "twemoji", (180, 240), ("lion", "penguin", "penguin", "giraffe"), ("ZOO",)),
}


def main(
    glyphs: Annotated[Path, typer.Option(help="pack of glyphs")] = Path("build/tiny/glyphs.zip"),
    out: Annotated[Path, typer.Option(help="folder to write the pictures to")] = Path("examples/pictures"),
    sheet: Annotated[int, typer.Option(help="draw a contact sheet of this many scenes instead, to sheet.png")] = 0,
    seed: Annotated[int, typer.Option(help="seed of the first scene of the contact sheet")] = 0,
    stylise_p: Annotated[
        float, typer.Option("--stylise", help="probability that a thing is drawn in another style, 0 to 1")
    ] = 0.0,
) -> None:
    """Draw the three example pictures."""
    pack = Glyphs.load(glyphs)
    out.mkdir(parents=True, exist_ok=True)
    if sheet:
        contact_sheet([draw(seed + i, pack, pack.styles, stylise_p=stylise_p).image for i in range(sheet)]).save(
            out / "sheet.png"
        )
        return
    by_name = {entry.name: entry for entry in pack.entries}
    for file, (number, style, size, names, words) in EXAMPLES.items():
        scene = draw(number, pack, [style], size=size, chosen=[by_name[name] for name in names], words=words)
        scene.image.save(out / file, optimize=True)
        typer.echo(f"{out / file}: {', '.join(thing.entry.name for thing in scene.objects)}")


def contact_sheet(images: Sequence[Image.Image], columns: int = 8, cell: int = 180) -> Image.Image:
    """Scenes in a grid, each at its own size, or scaled down if too large."""
    sheet = Image.new("RGB", (columns * cell, -(-len(images) // columns) * cell), (90, 90, 90))
    for i, image in enumerate(images):
        sheet.paste(ImageOps.contain(image, (cell - 4, cell - 4)), (i % columns * cell + 2, i // columns * cell + 2))
    return sheet


if __name__ == "__main__":
    typer.run(main)
