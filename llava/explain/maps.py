"""Attention to image tokens, mapped to the pixels of the pictures that they show.

N tokens of the reply   B boxes   H, W height and width of a picture
"""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from llava.config import LlavaConfig
from llava.engine.capture import Captured
from llava.engine.reply import Reply
from llava.explain.attention import Focus
from llava.preprocess.boxes import token_boxes
from llava.preprocess.inputs import ModelInput
from llava.preprocess.raster import Box, Size
from llava.preprocess.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False, kw_only=True)
class PictureMap:
    """The attention to one picture: a share for each of its image tokens, and the box of pixels that the token shows.

    Image tokens that show nothing of the picture, such as those of padding, are left out.
    """

    size: Size  # (width, height) of the picture in pixels
    boxes: list[Box]  # (left, top, right, bottom) in pixels
    shares: Tensor  # [N, B]

    def pixels(self, token: int | slice) -> Tensor:
        """Returns the attention of a token of the reply, or the mean of several, for each pixel: [H, W].

        The share of a box is spread over its area, so the sum over all pixels is the sum of the shares.
        """
        shares = self.shares[token]
        return self._spread(shares.mean(0) if shares.dim() == 2 else shares)

    def _spread(self, shares: Tensor) -> Tensor:
        """shares [..., B] -> [..., H, W]"""
        x, y, area = self._edges
        return torch.einsum("...b,bh,bw->...hw", shares / area, y, x)

    @cached_property
    def _edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """The part of each column and row of pixels that is within each box, [B, W] and [B, H], and its area [B]."""
        left, top, right, bottom = torch.tensor(self.boxes, dtype=torch.float32).reshape(-1, 4).T
        x, y = _covered(left, right, self.size[0]), _covered(top, bottom, self.size[1])
        return x, y, (right - left) * (bottom - top)


def _covered(first: Tensor, last: Tensor, n: int) -> Tensor:
    """first, last [B] -> [B, n]"""
    at = torch.arange(n)
    return (torch.minimum(last[:, None], at + 1) - torch.maximum(first[:, None], at)).clamp(min=0)


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionMap:
    """A reply, and what its tokens look at when they are predicted."""

    reply: Reply
    tokens: list[str]
    pictures: list[PictureMap]

    @cached_property
    def maps(self) -> list[Tensor]:
        """For each picture [N, H, W] float32: the attention to each of its pixels, see `PictureMap.pixels`."""
        return [one._spread(one.shares) for one in self.pictures]

    @property
    def words(self) -> list[tuple[str, slice]]:
        """The words of the reply with the range of their tokens. White space and the like belong to a word."""
        return _grouped(self.tokens)


def words_of(pieces: Iterable[bytes]) -> list[tuple[str, slice]]:
    """Returns the words of which these are the tokens, with the range of their tokens."""
    return _grouped(_texts(pieces))


def _texts(pieces: Iterable[bytes]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character can have several tokens: the last has it
    return [decoder.decode(piece) for piece in pieces]


def _grouped(tokens: list[str]) -> list[tuple[str, slice]]:
    starts = [i for i, token in enumerate(tokens) if i == 0 or token[:1].isspace()]
    ranges = [slice(first, last) for first, last in pairwise([*starts, len(tokens)])]
    return [("".join(tokens[one]).strip(), one) for one in ranges]


def attention_map(
    reply: Reply, captured: Captured, input: ModelInput, config: LlavaConfig, tokenizer: Tokenizer, focus: Focus
) -> AttentionMap:
    """Returns what the tokens of a reply look at, from what the engine has recorded for `focus.capture()`."""
    shares = focus.shares(captured, len(input.ids))[: len(reply.token_ids)]
    lengths = [len(image) for image in captured.images]
    tokens = _texts(tokenizer.piece(id) for id in reply.token_ids)
    return AttentionMap(reply=reply, tokens=tokens, pictures=_picture_maps(shares, input, config, lengths))


def _picture_maps(shares: Tensor, input: ModelInput, config: LlavaConfig, lengths: Sequence[int]) -> list[PictureMap]:
    """shares [N, T] of the tokens of all pictures, of which each has `lengths` -> a map for each picture"""
    vision, image = config.vision, config.image
    assert vision
    assert image
    found = []
    per_picture = shares.split(list(lengths), dim=1)
    for own, size, grid in zip(per_picture, input.image_sizes, input.grids, strict=True):
        boxes = token_boxes(size, image, vision.grid, grid, vision.n_features)
        kept = [i for i, box in enumerate(boxes) if box]
        found.append(PictureMap(size=size, boxes=[box for box in boxes if box], shares=own[:, kept]))
    return found
