"""Sprites on the device: each glyph in several drawing styles, and each printed word.

N pictures   S side in pixels   L mipmap levels

The styles made here (outlines, flat colours, inner edges, line art, blends of two artists) make the tower learn shapes
rather than the shading of one artist. `compose.py` adds further variation of colours and shapes when it draws a scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from examples.tiny.glyphs import Entry, Glyphs
from examples.tiny.world import FONT_VARIANTS, render_word

SIDE = 112  # pixels of a glyph
WORD_SIZE = (224, 56)  # width and height of a word sprite, with as many pixels as a glyph
LEVELS = 3  # full, half and quarter size

# relative frequency of each style of `variants`, in order
PLAIN, WEIGHTS = 0, (0.28, 0.10, 0.08, 0.10, 0.08, 0.14, 0.12, 0.04, 0.06)


@dataclass(frozen=True)
class Sprites:
    """Packed pictures and the offset of each. The classes are the glyphs in order, followed by the words.

    A picture is a glyph by one artist or a word in one font. They are ordered by artist, with the words at the end.
    """

    pixels: Tensor  # int32 [n_pixels]: premultiplied RGBA with red in the low byte; mip levels are concatenated
    extent: Tensor  # float32 [pictures, 2]: half width and height of the visible part; half the canvas height is 1
    drawable: Tensor  # int64: classes of glyphs that at least one artist drew
    turnable: Tensor  # bool [classes]: may be mirrored
    names: list[str]  # by class
    topics: list[str]  # group and subgroup of each class, for the text encoder
    n_glyphs: int
    styles: list[str]

    @property
    def n_words(self) -> int:
        return len(self.names) - self.n_glyphs

    def pictures(self, classes: Tensor, style: Tensor, font: Tensor) -> Tensor:
        """The picture indices of these classes. All arguments are int64 of the same shape."""
        words = len(self.styles) * self.n_glyphs + (classes - self.n_glyphs) * FONT_VARIANTS + font
        return torch.where(classes < self.n_glyphs, style * self.n_glyphs + classes, words)

    def starts(self, pictures: Tensor, variant: Tensor) -> Tensor:
        """The offsets of these pictures in `pixels`. Words have no variants."""
        glyphs = len(self.styles) * self.n_glyphs
        n = len(WEIGHTS)
        return torch.where(pictures < glyphs, pictures * n + variant, pictures + glyphs * (n - 1)) * LENGTH


LENGTH = sum((SIDE >> level) ** 2 for level in range(LEVELS))  # values per picture


def load_sprites(
    glyphs: Glyphs, styles: Sequence[str], words: Sequence[str], device: torch.device, *, plain: bool = False
) -> Sprites:
    """Loads the glyphs in these styles, and the words. Takes about 1.1 GB for 820 glyphs in two styles.

    `plain`: all variants are the original drawing, for evaluation.
    """
    drawn = [[_first(glyphs, entry, [style, *styles]) for entry in glyphs.entries] for style in styles]
    missing = {i for i, entry in enumerate(glyphs.entries) if not any(glyphs.has(entry, style) for style in styles)}
    fitted = [[fit(image, (SIDE, SIDE)) for image in images] for images in drawn]
    printed = [
        fit(render_word(w, 56, (255, 255, 255), font), WORD_SIZE) for w in words for font in range(FONT_VARIANTS)
    ]
    tensors = [torch.stack([canvas for canvas, _ in pictures]) for pictures in fitted]
    packed: list[Tensor] = []
    for i, own in enumerate(tensors):
        for one, two in zip(own.split(64), tensors[(i + 1) % len(tensors)].split(64), strict=True):
            x, other = _premultiplied(one.to(device)), _premultiplied(two.to(device))
            made = [x] * len(WEIGHTS) if plain else variants(x, other)
            packed.append(_packed(torch.stack(made, dim=1).flatten(0, 1)))
    if printed:
        packed.append(_packed(_premultiplied(torch.stack([canvas for canvas, _ in printed]).to(device))))
    names = [entry.name for entry in glyphs.entries]
    extents = [extent for pictures in (*fitted, printed) for _, extent in pictures]
    return Sprites(
        pixels=torch.cat(packed),
        extent=torch.tensor(extents, device=device),
        drawable=torch.tensor([i for i in range(len(names)) if i not in missing], device=device),
        turnable=torch.tensor([not {"left", "right"} & set(n.split()) for n in names] + [False] * len(words)).to(
            device
        ),
        names=[*names, *(f"the word {word}" for word in words)],
        topics=[*(f"{entry.group} {entry.subgroup}" for entry in glyphs.entries), *("printed text" for _ in words)],
        n_glyphs=len(names),
        styles=list(styles),
    )


def _first(glyphs: Glyphs, entry: Entry, styles: Sequence[str]) -> Image.Image:
    """The picture by the first of these artists who drew the glyph; an empty one if none did."""
    own = [style for style in styles if glyphs.has(entry, style)]
    return glyphs.image(entry, own[0]) if own else Image.new("RGBA", (SIDE, SIDE))


def fit(image: Image.Image, size: tuple[int, int]) -> tuple[Tensor, tuple[float, float]]:
    """Centres a picture on a canvas at the largest size that fits: uint8 [4, H, W], and its extent."""
    scale = min(size[0] / image.width, size[1] / image.height)
    w, h = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    canvas = Image.new("RGBA", size)
    canvas.paste(image.resize((w, h), Image.Resampling.BICUBIC), ((size[0] - w) // 2, (size[1] - h) // 2))
    return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1), (w / size[1], h / size[1])


def _premultiplied(pixels: Tensor) -> Tensor:
    """uint8 [N, 4, H, W] -> float32 0..1, with premultiplied alpha."""
    wide = pixels.float() / 255
    return torch.cat([wide[:, :3] * wide[:, 3:], wide[:, 3:]], dim=1)


def _packed(x: Tensor) -> Tensor:
    """float [N, 4, H, W] -> int32 [N * LENGTH], all levels of a picture together."""
    levels = []
    for level in range(LEVELS):
        small = F.avg_pool2d(x, 2**level) if level else x
        levels.append((small * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).reshape(len(x), -1, 4))
    return torch.cat(levels, dim=1).contiguous().view(torch.int32).flatten()


def variants(x: Tensor, other: Tensor) -> list[Tensor]:
    """The styles that WEIGHTS lists, [N, 4, S, S] each, from the pictures x and those of another artist."""
    small = _shrunk(x)
    flat = _flat(small, levels=4)
    edges = _edges(small)
    return [
        x,
        _outlined(small, width=2),
        _outlined(small, width=4),
        _outlined(_inked(small, edges), width=2),
        _flat(x, levels=5),
        _outlined(_inked(flat, edges), width=3),
        _outlined(_inked(_flat(small, levels=3), _edges(flat)), width=3),
        _outlined(_inked(torch.cat([small[:, 3:].expand(-1, 3, -1, -1), small[:, 3:]], dim=1), edges), width=3),
        (x + other) / 2,
    ]


def _shrunk(x: Tensor) -> Tensor:
    """Shrinks slightly, to leave room for an outline."""
    inner = SIDE - 10
    return F.pad(F.interpolate(x, (inner, inner), mode="bilinear", antialias=True, align_corners=False), (5, 5, 5, 5))


def _outlined(x: Tensor, width: int) -> Tensor:
    """Adds a dark line around the silhouette, `width` pixels wide."""
    alpha = x[:, 3:]
    for i in range(width):  # alternating a square and a diamond gives a nearly round shape
        wide = F.max_pool2d(alpha, (3, 1), 1, (1, 0)), F.max_pool2d(alpha, (1, 3), 1, (0, 1))
        alpha = torch.maximum(*wide) if i % 2 else F.max_pool2d(alpha, 3, 1, 1)
    return torch.cat([x[:, :3], torch.maximum(alpha, x[:, 3:])], dim=1)


def _flat(x: Tensor, levels: int) -> Tensor:
    """Reduces colours: smooths, then rounds each channel to one of `levels`."""
    alpha = x[:, 3:]
    smooth = F.avg_pool2d(x, 5, 1, 2)
    color = smooth[:, :3] / smooth[:, 3:].clamp(min=1e-3)
    return torch.cat([(color * (levels - 1)).round() / (levels - 1) * alpha, alpha], dim=1)


def _edges(x: Tensor) -> Tensor:
    """Strength of colour changes inside a picture, 0..1 [N, 1, S, S]."""
    smooth = F.avg_pool2d(x[:, :3] + 0.5 * (1 - x[:, 3:]), 3, 1, 1)
    change = (F.max_pool2d(smooth, 3, 1, 1) + F.max_pool2d(-smooth, 3, 1, 1)).amax(1, keepdim=True)
    inside = -F.max_pool2d(-x[:, 3:], 5, 1, 2)
    return ((change - 0.12) / 0.1).clamp(0, 1) * inside


def _inked(x: Tensor, edges: Tensor) -> Tensor:
    """Draws edges in a dark colour."""
    return torch.cat([x[:, :3] * (1 - edges), x[:, 3:]], dim=1)
