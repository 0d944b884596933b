"""The whole model: vision tower, projector, decoder, and how picture features take their places among the tokens.

V views   N features a view   D dim   S places   P patches a side of a view
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llava.config import IMAGE, LlavaConfig, TileGrid
from llava.model.decoder import Decoder
from llava.model.projector import Projector
from llava.model.vision import Vision


class Llava(nn.Module):
    """LLaVA, arXiv:2304.08485; without a vision part, the language model alone."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.decoder = Decoder(config.decoder)
        self.vision = Vision(config.vision) if config.vision else None
        self.projector = Projector(config.projector) if config.projector else None
        self.newline = nn.Parameter(torch.empty(config.decoder.dim)) if config.newline else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.decoder.norm.weight.dtype

    def encode_images(self, pixels: Tensor, views: Sequence[int], grids: Sequence[TileGrid | None]) -> list[Tensor]:
        """pixels [V, 3, S, S], so many views a picture -> what stands for each picture in the sequence, [places, D]."""
        assert self.vision is not None
        assert self.projector is not None
        features = self.projector(self.vision(pixels))  # [V, N, D]
        pictures = features.split(list(views))
        return [self.pack(picture, grid) for picture, grid in zip(pictures, grids, strict=True)]

    def pack(self, features: Tensor, grid: TileGrid | None) -> Tensor:
        """Features [V, N, D] of one picture -> [places, D]: base view, then the kept rows of the tiles put together."""
        if grid is None:
            return features.flatten(0, 1)
        p = round(features.shape[1] ** 0.5)
        tiles = features[1:].unflatten(1, (p, p)).unflatten(0, (grid.rows, grid.cols))  # [rows, cols, p, p, D]
        whole = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [rows p, cols p, D]
        kept = whole[grid.top : grid.bottom, grid.left : grid.right]
        if grid.newline:
            assert self.newline is not None
            kept = torch.cat([kept, self.newline.to(kept.dtype).expand(len(kept), 1, -1)], dim=1)
        return torch.cat([features[0], kept.flatten(0, 1)])

    def embed(self, ids: Tensor, pictures: Sequence[Tensor] = ()) -> Tensor:
        """ids [S] with IMAGE at each place of a picture, pictures' [places, D] in order -> [S, D]"""
        x = self.decoder.lookup(ids)
        if pictures:
            x[ids == IMAGE] = torch.cat(list(pictures)).to(x.dtype)
        return x


def meta_model(config: LlavaConfig) -> Llava:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Llava(config)


def shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Our tensor names and shapes of a model; a tied head counts once."""
    state = meta_model(config).state_dict()
    return {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if not (config.decoder.tied and name == "decoder.head.weight")
    }
