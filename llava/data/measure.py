"""How many places a sample takes and how many of its tokens are learnt: by the training function, without pixels."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from llava.checkpoint.open import open_checkpoint
from llava.config import IGNORE, IMAGE, DecoderConfig, ImageConfig, LlavaConfig, ProjectorConfig, VisionConfig
from llava.data.samples import Sample
from llava.errors import ConfigError
from llava.formats.tokenizer import load_tokenizer
from llava.preprocess.image import Size, choose_canvas, tile_grid
from llava.preprocess.inputs import Preprocessor
from llava.preprocess.tokenizer import Tokenizer

_UNCUT = 1 << 28  # places, the most that a config can state
# A tower and a picture of one pixel: the training function then puts one place for each picture.
_ONE_PIXEL = VisionConfig(dim=1, n_layers=2, n_heads=1, mlp_dim=1, image_size=1, patch_size=1)
_ONE_PIXEL_IMAGE = ImageConfig(size=1, mean=(0, 0, 0), std=(1, 1, 1), aspect="square")


class Tokens(NamedTuple):
    """Of one sample, in places of the sequence."""

    total: int  # pictures' places included
    learnt: int  # within the limit


class Measure:
    """Counts for one tokenizer, template and way with pictures."""

    def __init__(
        self, tokenizer: Tokenizer, config: LlavaConfig | None, *, template: str, limit: int, picture_tokens: int
    ):
        """config: of the model that will learn; None, or one without a tower: a picture takes `picture_tokens`."""
        self.limit = limit
        self.picture_tokens = picture_tokens
        self.config = config
        small = replace(
            config or LlavaConfig(decoder=_decoder(tokenizer.size)),
            vision=_ONE_PIXEL,
            projector=ProjectorConfig(in_dim=1, out_dim=config.decoder.dim if config else 2, depth=1),
            image=_ONE_PIXEL_IMAGE,
        )
        self._preprocessor = Preprocessor(small, tokenizer, template=template)
        self._picture = Image.new("RGB", (1, 1))

    @property
    def needs_sizes(self) -> bool:
        """Whether a picture's places depend on its size."""
        return self.config is not None and self.config.image is not None and self.config.image.aspect == "anyres"

    def __call__(self, sample: Sample, sizes: Sequence[Size]) -> Tokens:
        """sizes: of the sample's pictures, (w, h) in pixels; not looked at unless needed. Raises PromptError."""
        input = self._preprocessor.prepare_training(
            sample.turns, [self._picture] * len(sample.images), max_length=_UNCUT
        )
        widths = torch.ones_like(input.ids)
        places = [self._places(size) for size in sizes] if self.needs_sizes else [self._places()] * len(sample.images)
        widths[input.ids == IMAGE] = torch.tensor(places, dtype=widths.dtype)
        ends = widths.cumsum(0)
        return Tokens(int(ends[-1]), int(((input.labels != IGNORE) & (ends <= self.limit)).sum()))

    def _places(self, size: Size | None = None) -> int:
        if self.config is None or self.config.vision is None or self.config.image is None:
            return self.picture_tokens
        vision, image = self.config.vision, self.config.image
        if size is None:
            return vision.n_features
        canvas = choose_canvas(size, image)
        grid = tile_grid(size, canvas, image, vision.grid)
        tiles = canvas[0] // image.size * (canvas[1] // image.size)
        return vision.n_features + (grid.n_tokens if grid else vision.n_features * tiles)


def open_measure(
    tokenizer: Path | None, model: str | None, *, template: str | None, limit: int, picture_tokens: int | None
) -> Measure | None:
    """For a folder with a tokenizer, or a checkpoint (its tower and template then count); None where neither is given.

    Raises LlavaError.
    """
    if tokenizer and model:
        raise ConfigError("--tokenizer and --model are both given: name one of them")
    if not tokenizer and not model:
        return None
    options = {"limit": limit, "picture_tokens": picture_tokens or 576}
    if tokenizer:
        return Measure(load_tokenizer(tokenizer), None, template=template or "vicuna_v1", **options)
    assert model
    opened = open_checkpoint(model, fetch_tower=False)
    config = (
        opened.config if picture_tokens is None else replace(opened.config, vision=None, projector=None, image=None)
    )
    return Measure(opened.tokenizer, config, template=template or config.template or "vicuna_v1", **options)


def _decoder(vocab_size: int) -> DecoderConfig:
    """A decoder that refuses no token."""
    return DecoderConfig(
        kind="llama",
        n_layers=1,
        dim=2,
        n_heads=1,
        n_kv_heads=1,
        head_dim=2,
        mlp_dim=1,
        vocab_size=vocab_size,
        max_seq=_UNCUT,
        eps=1e-5,
    )
