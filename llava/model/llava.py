"""The whole model: vision tower, projector and decoder, with image features inserted into the token sequence.

V views   N features per view   D dim   S sequence length   p patches along one side of a view
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from llava.config import IMAGE, LlavaConfig, TileGrid
from llava.model.decoder import Decoder
from llava.model.projector import Projector
from llava.model.vision import Vision


class Llava(nn.Module):
    """LLaVA, arXiv:2304.08485. If `config.vision` is None, contains only the language model."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.decoder = Decoder(config.decoder)
        self.vision = Vision(config.vision) if config.vision else None
        self.projector = Projector(config.projector) if config.projector else None
        self.newline = nn.Parameter(torch.empty(config.decoder.dim)) if config.newline else None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return self.decoder.norm.weight.dtype

    def embed(self, ids: Tensor, images: Sequence[Tensor] = ()) -> Tensor:
        """ids [S] with IMAGE at every image token -> embeddings [S, D].

        images: one tensor [tokens, D] per image, in order, as returned by `encode_images`.
        """
        return self.insert_images(self.decoder.lookup(ids), (ids == IMAGE).nonzero()[:, 0], images)

    def encode_images(
        self,
        pixels: Tensor,
        views: Sequence[int],
        grids: Sequence[TileGrid | None],
        *,
        vision_grad: bool = False,
    ) -> list[Tensor]:
        """pixels [V, 3, size, size] -> embeddings [tokens, D] of each image.

        views: number of views of each image. grids: tile arrangement of each image, or None if it has no tiles.
        vision_grad: whether to compute gradients through the vision tower, as needed to train it.
        """
        return self.pack_images(self.view_features(pixels, vision_grad=vision_grad), views, grids)

    def view_features(self, pixels: Tensor, *, vision_grad: bool = False) -> Tensor:
        """pixels [V, 3, size, size] -> projected features [V, N, D] of each view. vision_grad: see `encode_images`."""
        assert self.vision is not None
        assert self.projector is not None
        with torch.set_grad_enabled(vision_grad):
            features = self.vision(pixels.to(self.vision.cls.dtype))
        projected: Tensor = self.projector(features)
        return projected

    def pack_images(self, features: Tensor, views: Sequence[int], grids: Sequence[TileGrid | None]) -> list[Tensor]:
        """Projected features [V, N, D] of the views of several images -> embeddings [tokens, D] of each image."""
        images = features.split(list(views))  # [views, N, D] each
        return [self.pack(image, grid) for image, grid in zip(images, grids, strict=True)]

    def pack(self, features: Tensor, grid: TileGrid | None) -> Tensor:
        """Projected features [V, N, D] of one image -> [tokens, D]: the base view, then the joined tiles row by row.

        Without a grid, the views are concatenated.
        """
        if grid is None:
            return features.flatten(0, 1)
        p = round(features.shape[1] ** 0.5)
        tiles = features[1:].unflatten(1, (p, p)).unflatten(0, (grid.rows, grid.cols))  # [rows, cols, p, p, D]
        joined = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [rows p, cols p, D]
        cropped = joined[grid.top : grid.bottom, grid.left : grid.right]
        if grid.newline:
            assert self.newline is not None
            cropped = torch.cat([cropped, self.newline.to(cropped.dtype).expand(len(cropped), 1, -1)], dim=1)
        return torch.cat([features[0], cropped.flatten(0, 1)])

    def insert_images(self, x: Tensor, positions: Tensor, images: Sequence[Tensor]) -> Tensor:
        """Returns x [..., S, D] with the vectors at `positions` replaced by the vectors in `images`, in order.

        positions: int64 [image tokens], indices into x flattened to [-1, D].
        """
        if not images:
            return x
        return x.flatten(0, -2).index_copy(0, positions, torch.cat(list(images)).to(x.dtype)).view_as(x)


def meta_model(config: LlavaConfig) -> Llava:
    """Returns the model on the meta device, where weights take up no memory."""
    with torch.device("meta"):
        return Llava(config)


def shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each weight, keyed by its name in `Llava`. A head tied to the embedding table is omitted."""
    return dict(_shapes(config))


@lru_cache(maxsize=8)  # loading a checkpoint calls this several times
def _shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    state = meta_model(config).state_dict()
    return {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if not (config.decoder.tied and name == "decoder.head.weight")
    }
