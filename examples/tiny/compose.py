"""Draws batches of labelled scenes on the device, on which the vision tower is trained.

B scenes   K maximum objects   S image side in pixels   P patches

A batch is drawn in two steps. `_sample` makes all random decisions, with a seeded generator. `_layer` then draws one
object per scene; it takes nearly all of the time, and it is deterministic so that it can be compiled.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.tiny.sprites import LEVELS, PLAIN, SIDE, WEIGHTS, WORD_SIZE, Sprites
from examples.tiny.world import FONT_VARIANTS
from llava.formats.clip import MEAN, STD

BACKGROUND, UNCLEAR = -1, -2  # labels of patches with no object, or with too little of one
BAR = tuple(int(255 * channel) / 255 for channel in MEAN)  # the colour that LLaVA pads images with

_COUNTS = (0.14, 0.16, 0.17, 0.18, 0.18, 0.17)  # fractions of scenes with 1, 2, … objects
_WORDS = 0.18  # fraction of objects that are printed words, if words are given
_BARS = 0.6  # fraction of scenes that are not square
_COVERED, _BARE = 0.4, 0.15  # coverage of a patch: minimum to be labelled as an object, maximum as background
_PEAK = 0.2  # an object below _COVERED everywhere labels its best patch, from this coverage on
# probabilities of backgrounds: plain, linear and radial gradient, clouds, blobs, fine noise, stripes, checks, dots
_KINDS = (0.36, 0.12, 0.08, 0.1, 0.08, 0.06, 0.08, 0.06, 0.06)


@dataclass(frozen=True)
class Scenes:
    """Images and their labels."""

    images: Tensor  # float32 [B, 3, S, S], normalized as for CLIP
    labels: Tensor  # int64 [B, P]: class, BACKGROUND or UNCLEAR
    owners: Tensor  # int64 [B, P]: index of the object that the label refers to, -1 for none
    classes: Tensor  # int64 [B, K], padded with -1
    boxes: Tensor  # float32 [B, K, 4]: left, top, right, bottom in pixels, ignoring occlusion


@dataclass(frozen=True)
class _Plan:
    """All random decisions about a batch, as [B, K] and [B] tensors."""

    classes: Tensor
    boxes: Tensor
    pose: Tensor  # [B, K, 15], see `_layer`
    color: Tensor  # [B, K, 3, 4]: matrix from red, green, blue, alpha to each channel
    start: Tensor
    width: Tensor
    height: Tensor
    content: Tensor  # [B, 4]: the area between the bars: left, top, right, bottom
    ground: Tensor  # [B, 2, 3]: two colours
    kind: Tensor  # [B, len(_KINDS)]: one-hot
    wave: Tensor  # [B, 3]: angle, frequency, phase
    noise: Tensor  # [B, 4, n, n]
    grain: Tensor  # [B]: strength


class Composer:
    """An endless stream of scenes from one seed. `augment` False: glyphs in their original form, for evaluation."""

    def __init__(
        self,
        sprites: Sprites,
        *,
        size: int = 160,
        patch: int = 16,
        max_objects: int = 6,
        seed: int = 0,
        augment: bool = True,
        compiled: bool = False,
    ):
        self.sprites, self.size, self.patch, self.max_objects, self.augment = sprites, size, patch, max_objects, augment
        self.device = sprites.pixels.device
        self.random = torch.Generator(self.device).manual_seed(seed)
        self.layer: Callable[..., tuple[Tensor, Tensor]] = torch.compile(_layer, dynamic=False) if compiled else _layer
        self.finish: Callable[..., Tensor] = torch.compile(_finish, dynamic=False) if compiled else _finish
        middles = torch.arange(size, device=self.device) + 0.5
        self.y, self.x = torch.meshgrid(middles, middles, indexing="ij")  # [S, S]
        # constants are kept on the device, because copying one there would synchronize
        self.limits: dict[tuple[float, ...], Tensor] = {}
        self.waves = torch.tensor([2 * math.pi, 30.0, 2 * math.pi], device=self.device)
        cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=self.device) / math.sqrt(3)
        self.turn = torch.eye(3, device=self.device), torch.full((3, 3), 1 / 3, device=self.device), cross
        self.grain = self._uniform(8, 3, size, size, low=-1, high=1)

    @torch.no_grad()
    def draw(self, batch: int) -> Scenes:
        """Draws the next batch of scenes."""
        plan = self._sample(batch)
        seen = torch.zeros(batch, 3, self.size, self.size, device=self.device)
        left = torch.ones(batch, self.size, self.size, device=self.device)  # remaining visibility of what is behind
        covers = []
        for k in range(self.max_objects):  # front to back
            one = (plan.pose[:, k], plan.color[:, k], plan.start[:, k], plan.width[:, k], plan.height[:, k])
            rgb, alpha = self.layer(self.sprites.pixels, self.x, self.y, plan.content, *one)
            seen += left[:, None] * rgb
            covers.append(F.avg_pool2d(left * alpha, self.patch))
            left = left * (1 - alpha)
        noise = F.interpolate(plan.noise, (self.size, self.size), mode="bicubic", align_corners=False)
        grain = self.grain[torch.arange(batch, device=self.device) % len(self.grain)] * plan.grain[:, None, None, None]
        images = self.finish(seen, left, self.x, self.y, plan.content, plan.ground, plan.kind, plan.wave, noise, grain)
        labels, owners = _labels(torch.stack(covers, 1).flatten(2), plan.classes)
        return Scenes(images, labels, owners, plan.classes, plan.boxes)

    def _uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self.random, device=self.device) * (high - low) + low

    def _chance(self, p: float, *shape: int) -> Tensor:
        """bool tensor, true with probability `p`."""
        return self._uniform(*shape) < p

    def _pick(self, weights: tuple[float, ...], *shape: int) -> Tensor:
        """int64 indices into `weights`, drawn with these weights."""
        if weights not in self.limits:
            self.limits[weights] = torch.tensor(weights, device=self.device).cumsum(0)
        limits = self.limits[weights]
        return torch.bucketize(self._uniform(*shape) * limits[-1], limits).clamp(max=len(weights) - 1)

    def _one_of(self, n: int, *shape: int) -> Tensor:
        """int64, uniform below n."""
        return (self._uniform(*shape) * n).long().clamp(max=n - 1)

    def _sample(self, b: int) -> _Plan:
        ground = self._grounds(b)
        count = 1 + self._pick(_COUNTS[: self.max_objects], b)
        classes = self._classes(b, count)
        content = self._content(b)
        is_word = classes >= self.sprites.n_glyphs
        style = self._one_of(len(self.sprites.styles), b, self.max_objects)
        pictures = self.sprites.pictures(classes.clamp(min=0), style, self._one_of(FONT_VARIANTS, *style.shape))
        extent = self.sprites.extent[pictures]
        center, half = self._places(b, count, content, extent, is_word)
        pose, bounds = self._poses(center, half, extent, classes)
        start, width, height = self._sources(pictures, half, is_word)
        return _Plan(
            classes=classes,
            boxes=torch.cat([center - bounds, center + bounds], dim=-1),
            pose=torch.where((classes >= 0)[..., None], pose, _nowhere(pose)),
            color=self._colors(is_word, ground),
            start=start,
            width=width,
            height=height,
            content=content,
            ground=ground,
            kind=F.one_hot(self._pick(_KINDS, b), len(_KINDS)).float(),
            wave=self._uniform(b, 3) * self.waves,
            noise=self._uniform(b, 4, 6, 6),
            grain=0.01 + self._chance(0.25, b) * self._uniform(b, high=0.06),
        )

    def _grounds(self, b: int) -> Tensor:
        """Two background colours per scene, [B, 2, 3]: any, pale or dark. The second is often close to the first."""
        colors = self._uniform(b, 2, 3)
        pale, dark = self._chance(0.35, b, 1, 1), self._chance(0.15, b, 1, 1)
        colors = torch.where(pale, 1 - 0.25 * colors, torch.where(dark, 0.25 * colors, colors))
        near = colors[:, :1] + self._uniform(b, 1, 1, low=-0.2, high=0.2) + self._uniform(b, 1, 3, low=-0.06, high=0.06)
        second = torch.where(self._chance(0.6, b, 1, 1), near.clamp(0, 1), colors[:, 1:])
        return torch.cat([colors[:, :1], second], dim=1)

    def _classes(self, b: int, count: Tensor) -> Tensor:
        """Classes [B, K]: all glyphs and all words with equal frequency. In some scenes a class is repeated."""
        k, glyphs, words = self.max_objects, self.sprites.n_glyphs, self.sprites.n_words
        classes = self.sprites.drawable[self._one_of(len(self.sprites.drawable), b, k)]
        if words:
            word = glyphs + self._one_of(words, b, k)
            classes = torch.where(self._chance(_WORDS, b, k), word, classes)
        repeated = self._chance(0.25, b, 1) & self._chance(0.6, b, k)
        classes = torch.where(repeated, classes[:, :1], classes)
        return torch.where(torch.arange(k, device=self.device) < count[:, None], classes, -1)

    def _content(self, b: int) -> Tensor:
        """The area between the bars, [B, 4]."""
        ratio = torch.where(self._chance(_BARS, b), self._uniform(b, low=0.47), 1.0)
        wide = self._chance(0.5, b)
        size = self.size * torch.stack([torch.where(wide, 1.0, ratio), torch.where(wide, ratio, 1.0)], 1)
        return torch.cat([(self.size - size) / 2, (self.size + size) / 2], dim=1)

    def _places(self, b: int, count: Tensor, content: Tensor, extent: Tensor, is_word: Tensor) -> tuple[Tensor, Tensor]:
        """Centres [B, K, 2] in the cells of a random grid, and half heights [B, K], in pixels."""
        k, unit = self.max_objects, self.size / 160
        size = content[:, 2:] - content[:, :2]
        long = torch.where(count == 1, 1, torch.where((count > 4) | self._chance(0.35, b), 3, 2))  # cells
        short = torch.maximum((long * size.amin(1) / size.amax(1)).round().long(), (count + long - 1) // long)
        cells = torch.stack([torch.where(size[:, i] < size[:, 1 - i], short, long) for i in range(2)], 1)  # [B, 2]
        order = self._uniform(b, 9) + 2 * (torch.arange(9, device=self.device) >= cells.prod(1, keepdim=True))
        cell = order.argsort(dim=1)[:, :k]
        corner = torch.stack([cell % cells[:, :1], cell // cells[:, :1]], dim=-1)  # [B, K, 2]
        room = (size / cells)[:, None]  # [B, 1, 2]
        least = room.amin(-1)
        alone = torch.exp(self._uniform(b, 1, low=math.log(0.25), high=math.log(0.98)))
        share = torch.where(count[:, None] == 1, alone, self._uniform(b, k, low=0.6, high=1.02))
        half = (least * share / 2).clamp(min=11.5 * unit)
        letters = torch.minimum(half * self._uniform(b, k, low=0.25, high=0.8), 0.5 * room[..., 0] / extent[..., 0])
        half = torch.where(is_word, letters.clamp(min=5.5 * unit), half)
        slack = (room - 2 * half[..., None] * extent).clamp(min=0) + 0.03 * room
        jitter = self._uniform(b, k, 2, low=-0.5, high=0.5) * slack
        return content[:, None, :2] + (corner + 0.5) * room + jitter, half

    def _poses(self, center: Tensor, half: Tensor, extent: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Poses [B, K, 15] for `_layer`, and half widths and heights of the boxes [B, K, 2]."""
        shape, is_word = half.shape, classes >= self.sprites.n_glyphs
        calm = torch.where(is_word, 0.2, 1.0)
        angle = self._uniform(*shape, low=-1, high=1) * math.radians(20) * self._chance(0.75, *shape) * calm
        cos, sin = angle.cos(), angle.sin()
        stretch = torch.exp(self._uniform(*shape, low=-0.16, high=0.16) * self.augment * calm)
        aspect = torch.where(is_word, WORD_SIZE[0] / WORD_SIZE[1], 1.0)
        w, h = half * aspect * stretch, half / stretch
        shear = self._uniform(*shape, low=-0.18, high=0.18) * self.augment * calm
        turned = self._chance(0.1 * self.augment, *shape) & self.sprites.turnable[classes.clamp(min=0)]
        mirror = torch.where(turned, -1.0, 1.0)
        uu, uv, vu, vv = cos / w, sin / w, -sin / h, cos / h  # inverse rotation, then scaling to -1..1
        bend = self._chance(0.6, *shape, 1) * self._uniform(*shape, 2, high=0.06) * (self.augment * calm)[..., None]
        beat, phase = self._uniform(*shape, 2, low=1.5, high=5), self._uniform(*shape, 2, high=6.3)
        hole = self._uniform(*shape, 3, low=-0.9, high=0.9)
        hole[..., 2] = torch.where(self._chance(0.1 * self.augment, *shape) & ~is_word, hole[..., 2].abs() * 0.4, 0)
        first = torch.stack([mirror * (uu + shear * vu), mirror * (uv + shear * vv), vu, vv], dim=-1)
        tx, ty = w / aspect * extent[..., 0], h * extent[..., 1]
        bounds = torch.stack([cos.abs() * tx + sin.abs() * ty, sin.abs() * tx + cos.abs() * ty], dim=-1)
        return torch.cat([center, first, bend, beat, phase, hole], dim=-1), bounds

    def _sources(self, pictures: Tensor, half: Tensor, is_word: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Start, width and height of the sprite level that fits the size of each object."""
        variant = self._pick(WEIGHTS, *half.shape) if self.augment else torch.full_like(pictures, PLAIN)
        start = self.sprites.starts(pictures, variant)
        height = torch.where(is_word, WORD_SIZE[1], SIDE)
        level = (height / (2 * half)).log2().sub(0.2).round().long() + self._chance(0.12 * self.augment, *half.shape)
        level = level.clamp(0, LEVELS - 1)
        below = sum((level > i) * (SIDE >> i) ** 2 for i in range(LEVELS - 1))
        return start + below, torch.where(is_word, WORD_SIZE[0], SIDE) >> level, height >> level

    def _colors(self, is_word: Tensor, ground: Tensor) -> Tensor:
        """Colour matrices [B, K, 3, 4]: jittered brightness, contrast, saturation and hue, or one colour for words."""
        shape = is_word.shape
        eye, gray, cross = self.turn
        hue = self._uniform(*shape, 1, 1, low=-0.3, high=0.3)
        turned = gray + (eye - gray) * hue.cos() + cross * hue.sin()  # rotation around the gray axis
        vivid = self._uniform(*shape, 1, 1, low=0.5, high=1.5) * ~self._chance(0.04, *shape, 1, 1)
        contrast, light = self._uniform(2, *shape, 1, 1, low=0.75, high=1.25)
        matrix = contrast * light * (gray + (turned - gray) * vivid)
        offset = (0.5 * (1 - contrast) * light).expand(*shape, 3, 1)
        if not self.augment:
            matrix, offset = eye.expand_as(matrix), torch.zeros_like(offset)
        ink = self._inks(shape[1], ground)[..., None]
        matrix = torch.where(is_word[..., None, None], 0, matrix)
        return torch.cat([matrix, torch.where(is_word[..., None, None], ink, offset)], dim=-1)

    def _inks(self, k: int, ground: Tensor) -> Tensor:
        """A colour for each word that contrasts with the background, [B, K, 3]."""
        ink = self._uniform(len(ground), k, 3)
        ink = torch.where(self._chance(0.6, len(ground), k, 1), ink.round(), ink)
        behind = ground.mean((1, 2))[:, None, None]
        close = (ink.mean(-1, keepdim=True) - behind).abs() < 0.2
        return torch.where(close, (behind < 0.5).float(), ink)


def _nowhere(pose: Tensor) -> Tensor:
    """A pose outside the image."""
    away = torch.zeros_like(pose)
    away[..., 0] = 1e6
    away[..., 2] = away[..., 5] = 1.0
    return away


def _layer(
    pixels: Tensor,
    x: Tensor,
    y: Tensor,
    content: Tensor,
    pose: Tensor,
    color: Tensor,
    start: Tensor,
    w: Tensor,
    h: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draws one object per scene: premultiplied colours [B, 3, S, S] and alpha [B, S, S].

    pose [B, 15]: centre; 2x2 matrix from pixels to -1..1 in the sprite; amplitude, frequency and phase of a wave
    distortion along x and y; centre and half side of a square hole.
    """
    p = pose[:, :, None, None].unbind(1)
    dx, dy = x - p[0], y - p[1]
    u, v = p[2] * dx + p[3] * dy, p[4] * dx + p[5] * dy
    u = u + p[6] * torch.sin(p[8] * v + p[10])
    v = v + p[7] * torch.sin(p[9] * u + p[11])
    left, top, right, bottom = content[:, :, None, None].unbind(1)
    shown = (x > left) & (x < right) & (y > top) & (y < bottom)
    shown = shown & ((u - p[12]).abs().maximum((v - p[13]).abs()) >= p[14])
    w, h, start = w[:, None, None], h[:, None, None], start[:, None, None]
    across, down = _taps(u, w), _taps(v, h)
    channels = [torch.zeros_like(u) for _ in range(4)]
    for yi, wy in down:
        row = start + yi * w
        wy = wy * shown / 255
        for xi, wx in across:
            value, weight = pixels[row + xi], wx * wy
            channels = [c + ((value >> 8 * i) & 255) * weight for i, c in enumerate(channels)]
    alpha = channels[3]
    m = color[..., None, None]  # [B, 3, 4, 1, 1]
    mixed = [sum((m[:, c, i] * channels[i] for i in range(4)), torch.zeros_like(u)) for c in range(3)]
    return torch.stack([c.clamp(min=0).minimum(alpha) for c in mixed], dim=1), alpha


def _taps(u: Tensor, n: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two of n pixels next to u (-1..1 inside) and their interpolation weights, which are 0 outside."""
    place = ((u + 1) / 2 * n - 0.5).clamp(-2, 4 * SIDE)
    first = place.floor()
    found = []
    for i, share in ((first, 1 - place + first), (first + 1, place - first)):
        found.append((i.clamp(min=0).minimum(n - 1).long(), share * ((i >= 0) & (i < n))))
    return found


def _finish(
    seen: Tensor, left: Tensor, x: Tensor, y: Tensor, content: Tensor, ground: Tensor, kind: Tensor, wave: Tensor,
    noise: Tensor, grain: Tensor,
) -> Tensor:  # fmt: skip
    """Adds background, grain and bars, and normalizes: noise [B, 4, S, S] -> [B, 3, S, S]."""
    size = x.shape[0]
    angle, often, phase = wave[:, :, None, None].unbind(1)
    dx, dy = x / size - 0.5, y / size - 0.5
    along = dx * angle.cos() + dy * angle.sin()
    beat = 16 + often
    mesh = torch.sin(dx * beat + phase) * torch.sin(dy * beat + phase)
    mix = [
        torch.zeros_like(along),
        0.5 + 0.7 * along,
        1.6 * (dx * dx + dy * dy).sqrt(),
        noise[:, 3],
        torch.sigmoid(12 * (noise[:, 3] - 0.55)),
        0.5 + 8 * grain.mean(1),
        torch.sigmoid(8 * torch.sin(along * beat + phase)),
        torch.sigmoid(20 * mesh),
        torch.sigmoid(10 * (mesh - 0.5)),
    ]
    k = kind[:, :, None, None].unbind(1)
    share = sum((a * b for a, b in zip(k, mix, strict=True)), torch.zeros_like(along)).clamp(0, 1)[:, None]
    first, second = ground[:, 0, :, None, None], ground[:, 1, :, None, None]
    back = first + (second - first) * share + k[4][:, None] * 0.3 * (noise[:, :3] - 0.5)
    image = (seen + left[:, None] * back.clamp(0, 1) + grain).clamp(0, 1)
    x0, y0, x1, y1 = content[:, :, None, None].unbind(1)
    inside = ((x > x0) & (x < x1) & (y > y0) & (y < y1))[:, None]
    bar, mean, std = (image.new_tensor(v).view(3, 1, 1) for v in (BAR, MEAN, STD))
    return (torch.where(inside, image, bar) - mean) / std


def _labels(cover: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and owners [B, P] from `cover` [B, K, P], the fraction of each patch that shows each object."""
    best, owner = cover.max(1)
    total = cover.sum(1)
    peak = cover.amax(2).gather(1, owner)  # the highest cover of this owner in any patch
    clear = (best >= _COVERED) | ((best >= _PEAK) & (best >= peak))
    clear &= best >= 0.6 * total
    owner = torch.where(clear, owner, -1)
    label = classes.gather(1, owner.clamp(min=0))
    label = torch.where(clear, label, torch.where(total < _BARE, BACKGROUND, UNCLEAR))
    return label, owner
