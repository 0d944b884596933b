"""Where image tokens are in the picture: the inverse of `to_views`.

Boxes are (left, top, right, bottom) in pixels of the picture before cropping, padding or resizing.
"""

from collections.abc import Callable, Iterator

from llava.config import ImageConfig, TileGrid
from llava.preprocess.image import choose_canvas, fitted
from llava.preprocess.raster import Box, Size

_Map = Callable[[float, float], tuple[float, float]]  # a point of a view -> the point of the picture


def token_boxes(
    size: Size, config: ImageConfig, patches: int, grid: TileGrid | None, n_features: int
) -> list[Box | None]:
    """Returns the box of each token of a picture, clipped to it; None for tokens that show nothing of it.

    These are class tokens, the learned vectors at the ends of rows, and patches of padding. size: of the picture.
    patches: along one side of a view. grid: see `Views`. n_features: tokens of a view, with or without a class token.
    """
    s, class_tokens = config.size, [None] * (n_features - patches**2)
    if config.aspect != "anyres":
        return [*class_tokens, *_boxes(size, s / patches, range(patches), range(patches), _view(size, config))]
    boxes = [*class_tokens, *_boxes(size, s / patches, range(patches), range(patches), _squeezed(size, s))]
    canvas = choose_canvas(size, config)
    on_canvas = _on_canvas(size, canvas)
    if grid is None:
        for top in range(0, canvas[1] // s * patches, patches):
            for left in range(0, canvas[0] // s * patches, patches):
                rows, cols = range(top, top + patches), range(left, left + patches)
                boxes += [*class_tokens, *_boxes(size, s / patches, rows, cols, on_canvas)]
        return boxes
    for row in range(grid.top, grid.bottom):
        boxes += _boxes(size, s / patches, range(row, row + 1), range(grid.left, grid.right), on_canvas)
        boxes += [None] * grid.newline
    return boxes


def _boxes(size: Size, step: float, rows: range, cols: range, to_picture: _Map) -> Iterator[Box | None]:
    """Yields the boxes of patches, row by row. step: side of a patch in pixels of the view or canvas."""
    for row in rows:
        for col in cols:
            left, top = to_picture(col * step, row * step)
            right, bottom = to_picture((col + 1) * step, (row + 1) * step)
            left, right = (min(max(x, 0.0), float(size[0])) for x in (left, right))
            top, bottom = (min(max(y, 0.0), float(size[1])) for y in (top, bottom))
            yield (left, top, right, bottom) if left < right and top < bottom else None


def _view(size: Size, config: ImageConfig) -> _Map:
    """Returns the inverse of padding to a square, or of resizing the shorter edge and cropping the centre."""
    w, h = size
    if config.aspect == "pad" and config.mode == "original":
        side = max(size)
        return lambda x, y: (x * side / config.size - (side - w) // 2, y * side / config.size - (side - h) // 2)
    short = min(size)
    after = [config.size if edge == short else int(config.size * edge / short) for edge in size]
    start = [(edge - config.size) // 2 for edge in after]
    return lambda x, y: ((x + start[0]) * w / after[0], (y + start[1]) * h / after[1])


def _squeezed(size: Size, side: int) -> _Map:
    return lambda x, y: (x * size[0] / side, y * size[1] / side)


def _on_canvas(size: Size, canvas: Size) -> _Map:
    """Returns the inverse of fitting a picture into the centre of a canvas."""
    width, height = fitted(size, canvas)
    left, top = (canvas[0] - width) // 2, (canvas[1] - height) // 2
    return lambda x, y: ((x - left) * size[0] / width, (y - top) * size[1] / height)
