"""Counts a sample's tokens and target tokens with the training preprocessing, without loading its pictures."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from llava.checkpoint.open import open_checkpoint
from llava.config import (
    IGNORE,
    IMAGE,
    DecoderConfig,
    ImageConfig,
    LlavaConfig,
    LoadOptions,
    ProjectorConfig,
    VisionConfig,
)
from llava.data.layouts import Sample
from llava.errors import ConfigError
from llava.formats.tokenizer import load_tokenizer
from llava.preprocess.image import choose_canvas, tile_grid
from llava.preprocess.inputs import Preprocessor
from llava.preprocess.raster import Size
from llava.preprocess.tokenizer import Tokenizer
from llava.zoo.bases import advice

_UNLIMITED = 1 << 28  # in tokens; the highest value that a config accepts for max_seq
# With a one-patch vision tower and one-pixel pictures, preprocessing inserts exactly one token per picture.
_ONE_PIXEL = VisionConfig(dim=1, n_layers=2, n_heads=1, mlp_dim=1, image_size=1, patch_size=1)
_ONE_PIXEL_IMAGE = ImageConfig(size=1, mean=(0, 0, 0), std=(1, 1, 1), aspect="square")


class Tokens(NamedTuple):
    """The token counts of one sample."""

    total: int  # includes image tokens
    targets: int  # target tokens among the first `limit` tokens


class Measure:
    """Counts the tokens of samples for a given tokenizer, template and model config."""

    def __init__(
        self, tokenizer: Tokenizer, config: LlavaConfig | None, *, template: str, limit: int, picture_tokens: int
    ):
        """limit: maximum number of tokens per sample, lowered to the model's context.

        config: the model's config; if it is None or has no tower, each picture counts as `picture_tokens` tokens.
        """
        self.context = config.decoder.max_seq if config else None  # in tokens
        self.limit = min(limit, self.context or limit)
        self.picture_tokens = picture_tokens
        self.config = config
        decoder = replace(config.decoder, max_seq=_UNLIMITED) if config else _decoder(tokenizer.size)
        small = replace(
            config or LlavaConfig(decoder=decoder),
            decoder=decoder,
            vision=_ONE_PIXEL,
            projector=ProjectorConfig(in_dim=1, out_dim=decoder.dim, depth=1),
            image=_ONE_PIXEL_IMAGE,
        )
        self._preprocessor = Preprocessor(small, tokenizer, template=template)
        self._picture = Image.new("RGB", (1, 1))

    @property
    def needs_sizes(self) -> bool:
        """Whether the token count of a picture depends on its size."""
        return self.config is not None and self.config.image is not None and self.config.image.aspect == "anyres"

    def __call__(self, sample: Sample, sizes: Sequence[Size]) -> Tokens:
        """Counts tokens. sizes: (w, h) of each picture in pixels, used only if `needs_sizes`. Raises PromptError."""
        input = self._preprocessor.prepare_training(
            sample.turns, [self._picture] * len(sample.images), system=sample.system, max_length=_UNLIMITED
        )
        widths = torch.ones_like(input.ids)  # number of tokens per position; corrected for pictures below
        if self.needs_sizes:
            per_image = [self._image_tokens(size) for size in sizes]
        else:
            per_image = [self._image_tokens()] * len(sample.images)
        widths[input.ids == IMAGE] = torch.tensor(per_image, dtype=widths.dtype)
        ends = widths.cumsum(0)
        return Tokens(int(ends[-1]), int(((input.labels != IGNORE) & (ends <= self.limit)).sum()))

    def limit_text(self, n_tokens: int) -> str:
        """Describes the limit that a sample of `n_tokens` exceeds, and what training does with the sample."""
        if self.context is not None and n_tokens > self.context:
            return f"the model's context is {self.context}, so training skips the sample"
        return f"the limit is {self.limit}, so training truncates the sample"

    def _image_tokens(self, size: Size | None = None) -> int:
        if self.config is None or self.config.vision is None or self.config.image is None:
            return self.picture_tokens
        vision, image = self.config.vision, self.config.image
        if size is None:
            return vision.n_features
        canvas = choose_canvas(size, image)
        grid = tile_grid(size, canvas, image, vision.grid)
        tiles = canvas[0] // image.size * (canvas[1] // image.size)
        return vision.n_features + (grid.n_tokens if grid else vision.n_features * tiles)


@advice()
def open_measure(
    tokenizer: Path | None,
    model: str | None,
    *,
    template: str | None,
    limit: int,
    picture_tokens: int | None,
    base: str | None = None,
) -> Measure | None:
    """Creates a measure from a tokenizer folder or a model checkpoint, or returns None if neither is given.

    Raises LlavaError.
    """
    if tokenizer and model:
        raise ConfigError("--tokenizer and --model are mutually exclusive; specify only one of them")
    if not tokenizer and not model:
        return None
    options = {"limit": limit, "picture_tokens": picture_tokens or 576}
    if tokenizer:
        return Measure(load_tokenizer(tokenizer), None, template=template or "vicuna_v1", **options)
    assert model
    opened = open_checkpoint(model, LoadOptions(fetch_tower=False, base=base))
    config = (
        opened.config if picture_tokens is None else replace(opened.config, vision=None, projector=None, image=None)
    )
    return Measure(opened.tokenizer, config, template=template or config.template or "vicuna_v1", **options)


def _decoder(vocab_size: int) -> DecoderConfig:
    """Returns a decoder config that accepts samples of any length."""
    return DecoderConfig(
        kind="llama",
        n_layers=1,
        dim=2,
        n_heads=1,
        n_kv_heads=1,
        head_dim=2,
        mlp_dim=1,
        vocab_size=vocab_size,
        max_seq=_UNLIMITED,
        eps=1e-5,
    )
