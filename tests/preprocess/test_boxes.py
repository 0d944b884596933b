"""Boxes of image tokens: each patch shows what is in its box of the picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava.config import ImageConfig
from llava.preprocess.boxes import token_boxes
from llava.preprocess.image import to_views

SIDE, PATCHES = 112, 8  # of a view: pixels, patches along one side
SIZES = [(56, 56), (200, 100), (100, 200), (311, 97), (110, 301), (640, 480)]
PINPOINTS = ((112, 224), (224, 112), (224, 224), (336, 112))


def config(**values: object) -> ImageConfig:
    fixed = {"size": SIDE, "mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0), "pinpoints": PINPOINTS}
    return ImageConfig(**fixed | values)  # type: ignore[arg-type]


def ramps(size: tuple[int, int]) -> Image.Image:
    """A picture whose red is the position from left to right, and green from top to bottom; blue marks it as such."""
    w, h = size
    x, y = (np.linspace(0, 1, n, endpoint=False) + 0.5 / n for n in (w, h))
    channels = [np.broadcast_to(x[None], (h, w)), np.broadcast_to(y[:, None], (h, w)), np.ones((h, w))]
    return Image.fromarray(np.rint(np.stack(channels, -1) * 255).astype(np.uint8))


def patches_of(pixels: torch.Tensor) -> torch.Tensor:
    """pixels [views, 3, S, S] -> mean colours [views, PATCHES, PATCHES, 3]"""
    return torch.nn.functional.avg_pool2d(pixels + 0.5, SIDE // PATCHES).permute(0, 2, 3, 1)


def check(colour: torch.Tensor, box: tuple[float, float, float, float] | None, size: tuple[int, int]) -> bool:
    """Compares a patch with its box, unless it is partly padding. Returns whether it was compared."""
    if colour[2] < 0.99:  # the padding is darker
        return False
    assert box is not None
    middle = (box[0] + box[2]) / 2 / size[0], (box[1] + box[3]) / 2 / size[1]
    assert abs(colour[0] - middle[0]) < 0.04, (colour, box)
    assert abs(colour[1] - middle[1]) < 0.04, (colour, box)
    return True


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("aspect", "mode"), [("square", "original"), ("pad", "original"), ("pad", "hf")])
@pytest.mark.parametrize("class_token", [0, 1])
def test_each_patch_of_a_view_shows_its_box(size: tuple[int, int], aspect: str, mode: str, class_token: int) -> None:
    settings = config(aspect=aspect, mode=mode)
    views = to_views(ramps(size), settings, PATCHES)
    boxes = token_boxes(size, settings, PATCHES, views.grid, PATCHES**2 + class_token)
    assert boxes[:class_token] == [None] * class_token
    colours = patches_of(views.pixels).flatten(0, 2)
    assert sum(check(*pair, size) for pair in zip(colours, boxes[class_token:], strict=True)) >= PATCHES


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("mode", ["original", "hf"])
def test_each_patch_of_the_tiles_shows_its_box(size: tuple[int, int], merge: str, mode: str) -> None:
    settings = config(aspect="anyres", merge=merge, mode=mode)
    views = to_views(ramps(size), settings, PATCHES)
    boxes = token_boxes(size, settings, PATCHES, views.grid, PATCHES**2)
    base, *tiles = patches_of(views.pixels)
    expected = list(base.flatten(0, 1))
    if views.grid is None:
        expected += [colour for tile in tiles for colour in tile.flatten(0, 1)]
    else:
        grid = views.grid
        rows = [torch.cat(tiles[i * grid.cols : (i + 1) * grid.cols], dim=1) for i in range(grid.rows)]
        for row in torch.cat(rows)[grid.top : grid.bottom, grid.left : grid.right]:
            expected += [*row, *[torch.zeros(3)] * grid.newline]
    n = PATCHES**2 * len(views.pixels) if views.grid is None else PATCHES**2 + views.grid.n_tokens
    assert len(boxes) == len(expected) == n
    assert sum(check(*pair, size) for pair in zip(expected, boxes, strict=True)) >= PATCHES**2
