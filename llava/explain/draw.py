"""Heat maps over pictures, and a sheet of them: one for each word of a reply."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from llava.explain.maps import AttentionMap

_COLOURS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark to light, as in inferno
_OPACITY = 0.75  # of the strongest colour
_SIDE = 220  # pixels of a picture on the sheet
_COLUMNS = 6
_LABEL = 18  # pixels below a picture, for its word


def colours(strength: Tensor) -> Tensor:
    """strength [H, W] from 0 to 1 -> RGB uint8 [H, W, 3]"""
    table = torch.tensor(_COLOURS, dtype=torch.float32)
    at = strength.clamp(0, 1) * (len(table) - 1)
    low = at.floor().long().clamp(max=len(table) - 2)
    part = (at - low)[..., None]
    return ((1 - part) * table[low] + part * table[low + 1]).round().to(torch.uint8)


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """Lays a map [H, W] over a picture of this size; where the map is highest, the picture shines through least."""
    strength = heat / heat.amax().clamp(min=1e-12)
    rgb = Image.fromarray(np.asarray(colours(strength)))
    mask = Image.fromarray(np.asarray((255 * _OPACITY * strength.sqrt()).to(torch.uint8)))
    return Image.composite(rgb, picture.convert("RGB"), mask)


def sheet(found: AttentionMap, pictures: Sequence[Image.Image]) -> Image.Image:
    """A picture with all words of the reply: below each, the word; over it, what the word looks at.

    With several pictures, each has rows of its own.
    """
    words = found.words
    cells = [(i, word, tokens) for i in range(len(pictures)) for word, tokens in words]
    per_picture = -(-len(words) // _COLUMNS)
    height = _SIDE + _LABEL
    page = Image.new("RGB", (_COLUMNS * _SIDE, len(pictures) * per_picture * height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    for n, (i, word, tokens) in enumerate(cells):
        row, column = divmod(n - i * len(words), _COLUMNS)
        left, top = column * _SIDE, (i * per_picture + row) * height
        small = overlay(pictures[i], found.pictures[i].pixels(tokens))
        small.thumbnail((_SIDE - 4, _SIDE - 4))
        page.paste(small, (left + (_SIDE - small.width) // 2, top + (_SIDE - small.height) // 2))
        draw.text((left + _SIDE / 2, top + _SIDE + _LABEL / 2), word, fill="black", font=font, anchor="mm")
    return page
