"""The module that is trained: a LLaVA that maps a batch to its loss.

B rows   S positions   D dim   T target tokens   V vocabulary size
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava.model.decoder import Decoder
from llava.model.llava import Llava
from llava.train.batch import Batch

_CHUNK_VALUES = 2**26  # logits computed at a time: 256 MiB in float32


class LlavaWithLoss(nn.Module):
    """A model together with its loss, so that FSDP sees a single forward call."""

    trained_rows: Tensor

    def __init__(self, model: Llava, *, trained_rows: Sequence[int] = (), train_vision: bool = False):
        """trained_rows: the token ids whose input embeddings are trained; () for no restriction."""
        super().__init__()
        self.model = model
        self.train_vision = train_vision
        self.register_buffer("trained_rows", torch.tensor(list(trained_rows)), persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """The sum of -log p over all target tokens, float32."""
        x = self.embed(batch)
        mask = batch.segments
        pos = batch.positions if mask else batch.positions[0]
        x = self.model.decoder(x, pos, mask=mask, length=batch.max_seqlen)
        predicting = x.flatten(0, 1)[batch.target_positions]  # [T, D]
        loss = cross_entropy(self.model.decoder, predicting, batch.targets, train_head=not len(self.trained_rows))
        # without any target, the gradients must be zero rather than missing, because the other ranks wait for them
        return loss + 0 * x[0, 0].float().sum()

    def embed(self, batch: Batch) -> Tensor:
        """Embeds ids and pixels: [B, S, D]."""
        x = self.model.decoder.lookup(batch.ids)
        if len(self.trained_rows):
            x = torch.where(torch.isin(batch.ids, self.trained_rows)[..., None], x, x.detach())
        if self.model.vision is None:
            return x
        features = self.image_features(batch).to(x.dtype)
        if batch.pixels is None:
            return x + 0 * features.sum()
        return x.flatten(0, 1).index_copy(0, batch.image_positions, features).view_as(x)

    def image_features(self, batch: Batch) -> Tensor:
        """The features of all images in the batch, [image positions, D]; of an all-zero image if there are none.

        Every rank runs the tower and the projector in every micro-batch. If one skipped them, the others would hang.
        """
        assert self.model.vision is not None
        assert self.model.projector is not None
        assert self.model.config.vision is not None
        size = self.model.config.vision.image_size
        empty = batch.pixels is None
        pixels = torch.zeros(1, 3, size, size, device=batch.ids.device) if empty else batch.pixels
        assert pixels is not None
        with torch.set_grad_enabled(self.train_vision):
            hidden = self.model.vision(pixels.to(self.model.vision.cls.dtype))
        features = self.model.projector(hidden)
        if empty:
            newline = self.model.newline
            return features.flatten(0, 1) if newline is None else features.flatten(0, 1) + 0 * newline
        images = features.split(batch.views)
        return torch.cat([self.model.pack(one, grid) for one, grid in zip(images, batch.grids, strict=True)])


def cross_entropy(decoder: Decoder, x: Tensor, targets: Tensor, *, train_head: bool = True) -> Tensor:
    """The sum of -log p: x [T, D] and targets [T] -> scalar, float32.

    The logits [T, V] are computed in chunks and recomputed in the backward pass, so they never exist as a whole.
    train_head: False if only some rows of the input embedding are trained. With tied weights (MPT) the head is that
    table, and a gradient through the head would change all of its rows.
    """
    chunk = max(1, _CHUNK_VALUES // decoder.embed.num_embeddings)  # rows
    total = x.new_zeros((), dtype=torch.float32)
    for x_chunk, target_chunk in zip(x.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(_chunk_loss, decoder, x_chunk, target_chunk, train_head, use_reentrant=False)
    return total


def _chunk_loss(decoder: Decoder, x: Tensor, targets: Tensor, train_head: bool) -> Tensor:
    logits = decoder.logits(x) if train_head else F.linear(x, decoder.head.weight.detach()).float()
    return F.cross_entropy(logits, targets, reduction="sum")
