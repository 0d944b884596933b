"""What is trained: a LLaVA from a batch to its loss.

B rows   S places   D dim   N learnt tokens   V vocabulary rows
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava.model.decoder import Decoder
from llava.model.llava import Llava
from llava.train.batch import Batch

_CHUNK_VALUES = 2**26  # logits held at a time: 256 MiB in float32


class Trainee(nn.Module):
    """The model with its loss inside, so that what shards it sees one forward call."""

    rows: Tensor

    def __init__(self, model: Llava, *, rows: Sequence[int] = (), tower_learns: bool = False):
        """rows: ids of which alone the input embedding learns; () for all."""
        super().__init__()
        self.model = model
        self.tower_learns = tower_learns
        self.register_buffer("rows", torch.tensor(list(rows)), persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """The sum over all learnt tokens of -log p, float32."""
        x = self.embed(batch)
        mask = batch.segments
        pos = batch.pos if mask else batch.pos[0]
        x = self.model.decoder(x, pos, mask=mask, length=batch.longest)
        learnt = x.flatten(0, 1)[batch.at]
        # a rank whose batch holds nothing to learn still takes part: its gradients are zeros, not absent
        loss = cross_entropy(self.model.decoder, learnt, batch.to, head_learns=not len(self.rows))
        return loss + 0 * x[0, 0].float().sum()

    def embed(self, batch: Batch) -> Tensor:
        """ids and pixels -> [B, S, D]"""
        x = self.model.decoder.lookup(batch.ids)
        if len(self.rows):
            x = torch.where(torch.isin(batch.ids, self.rows)[..., None], x, x.detach())
        if self.model.vision is None:
            return x
        places = self.pictures(batch).to(x.dtype)
        if batch.pixels is None:
            return x + 0 * places.sum()
        return x.flatten(0, 1).index_copy(0, batch.pictures, places).view_as(x)

    def pictures(self, batch: Batch) -> Tensor:
        """What stands for the batch's pictures, [places, D]; without any, that of an empty one.

        All ranks run tower and projector in every micro-batch: one that left them out would leave the others waiting.
        """
        assert self.model.vision is not None
        assert self.model.projector is not None
        assert self.model.config.vision is not None
        size = self.model.config.vision.image_size
        empty = batch.pixels is None
        pixels = torch.zeros(1, 3, size, size, device=batch.ids.device) if empty else batch.pixels
        assert pixels is not None
        with torch.set_grad_enabled(self.tower_learns):
            seen = self.model.vision(pixels.to(self.model.vision.cls.dtype))
        features = self.model.projector(seen)
        if empty:
            newline = self.model.newline
            return features.flatten(0, 1) if newline is None else features.flatten(0, 1) + 0 * newline
        pictures = features.split(batch.views)
        return torch.cat([self.model.pack(one, grid) for one, grid in zip(pictures, batch.grids, strict=True)])


def cross_entropy(decoder: Decoder, x: Tensor, to: Tensor, *, head_learns: bool = True) -> Tensor:
    """x [N, D], tokens to [N] -> the sum of -log p. Logits [N, V] are never held whole, nor kept to go back.

    head_learns: False where rows of the input embedding learn, which may be the head too (MPT): all of it would.
    """
    rows = max(1, _CHUNK_VALUES // decoder.embed.num_embeddings)
    total = x.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(x.split(rows), to.split(rows), strict=True):
        total = total + checkpoint(_part, decoder, part, wanted, head_learns, use_reentrant=False)
    return total


def _part(decoder: Decoder, x: Tensor, to: Tensor, head_learns: bool) -> Tensor:
    logits = decoder.logits(x) if head_learns else F.linear(x, decoder.head.weight.detach()).float()
    return F.cross_entropy(logits, to, reduction="sum")
