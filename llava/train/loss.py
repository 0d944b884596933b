"""The module to train, which wraps a LLaVA model and maps a batch to its loss.

B batch   S sequence length   D dim   T target tokens   V vocabulary size
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava.model.attention import AttentionContext, CausalContext, VarlenContext
from llava.model.decoder import Decoder
from llava.model.llava import Llava
from llava.train.batch import Batch

_CHUNK_VALUES = 2**26  # maximum number of logits per chunk (256 MiB in float32)


class LlavaWithLoss(nn.Module):
    """A model together with its loss, so that FSDP sees a single forward call."""

    trained_rows: Tensor

    def __init__(self, model: Llava, *, trained_rows: Sequence[int] = (), train_vision: bool = False):
        """trained_rows: if not empty, only the input embeddings of these token ids are trained."""
        super().__init__()
        self.model = model
        self.train_vision = train_vision
        self.register_buffer("trained_rows", torch.tensor(list(trained_rows)), persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """Returns the sum of -log p over all target tokens, in float32."""
        x = self.model.decoder(self.embed(batch), attention_context(batch))
        predicting = x.flatten(0, 1)[batch.target_positions]  # [T, D]
        loss = cross_entropy(self.model.decoder, predicting, batch.targets, train_head=not len(self.trained_rows))
        # without target tokens, the gradients must be zero rather than missing, because the other ranks wait for them
        return loss + 0 * x[0, 0].float().sum()

    def embed(self, batch: Batch) -> Tensor:
        """Returns the input embeddings of a batch, including image features: [B, S, D].

        If the batch has no images, the tower and the projector run on a blank image, because FSDP requires every rank
        to take part in the same collectives.
        """
        x = self.model.decoder.lookup(batch.ids)
        if len(self.trained_rows):
            x = torch.where(torch.isin(batch.ids, self.trained_rows)[..., None], x, x.detach())
        if self.model.vision is None:
            return x
        if batch.pixels is None:
            return x + self._zero_of_image_weights(x)
        images = self.model.encode_images(batch.pixels, batch.views, batch.grids, vision_grad=self.train_vision)
        return self.model.insert_images(x, batch.image_positions, images)

    def _zero_of_image_weights(self, x: Tensor) -> Tensor:
        """Returns a zero that depends on the tower, projector and newline, so that their gradients are 0, not None."""
        assert self.model.config.vision is not None
        size = self.model.config.vision.image_size
        blank = torch.zeros(1, 3, size, size, device=x.device)
        (image,) = self.model.encode_images(blank, [1], [None], vision_grad=self.train_vision)
        if self.model.newline is not None:
            image = image + 0 * self.model.newline
        return 0 * image.to(x.dtype).sum()


def attention_context(batch: Batch) -> AttentionContext:
    """Returns the attention context of a batch: causal within each packed sample or each padded row."""
    if batch.segments is None:
        return CausalContext(positions=batch.positions, seq_len=batch.seq_len)
    return VarlenContext(positions=batch.positions, seq_len=batch.seq_len, segments=batch.segments)


def cross_entropy(decoder: Decoder, x: Tensor, targets: Tensor, *, train_head: bool = True) -> Tensor:
    """Returns the sum of -log p: x [T, D] and targets [T] -> scalar, float32.

    The logits [T, V] are computed in chunks and recomputed in the backward pass, which keeps memory use low.
    train_head: False if only some rows of the input embedding are trained. With tied weights (MPT), the head is the
    same table, and a gradient through the head would change all of its rows.
    """
    chunk = max(1, _CHUNK_VALUES // decoder.embed.num_embeddings)  # rows
    total = x.new_zeros((), dtype=torch.float32)
    for x_chunk, target_chunk in zip(x.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(_chunk_loss, decoder, x_chunk, target_chunk, train_head, use_reentrant=False)
    return total


def _chunk_loss(decoder: Decoder, x: Tensor, targets: Tensor, train_head: bool) -> Tensor:
    logits = decoder.logits(x) if train_head else F.linear(x, decoder.head.weight.detach()).float()
    return F.cross_entropy(logits, targets, reduction="sum")
