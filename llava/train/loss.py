"""What is trained: a LLaVA from a batch to its loss.

B rows   S places   D dim   N learnt tokens   V vocabulary rows
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
        x = self.model.decoder(self.embed(batch), context_of(batch))
        learnt = x.flatten(0, 1)[batch.at]
        # a rank whose batch holds nothing to learn still takes part: its gradients are zeros, not absent
        loss = cross_entropy(self.model.decoder, learnt, batch.to, head_learns=not len(self.rows))
        return loss + 0 * x[0, 0].float().sum()

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings of a batch [B, S, D], image features included.

        All ranks run tower and projector in every micro-batch: a rank that skipped them would block the others.
        """
        x = self.model.decoder.lookup(batch.ids)
        if len(self.rows):
            x = torch.where(torch.isin(batch.ids, self.rows)[..., None], x, x.detach())
        if self.model.vision is None:
            return x
        if batch.pixels is None:
            return x + self._zero_of_image_weights(x)
        images = self.model.encode_images(batch.pixels, batch.views, batch.grids, vision_grad=self.tower_learns)
        return self.model.insert_images(x, batch.pictures, images)

    def _zero_of_image_weights(self, x: Tensor) -> Tensor:
        """A zero that depends on tower, projector and newline, so that their gradients are zero and not missing."""
        assert self.model.config.vision is not None
        size = self.model.config.vision.image_size
        blank = torch.zeros(1, 3, size, size, device=x.device)
        (image,) = self.model.encode_images(blank, [1], [None], vision_grad=self.tower_learns)
        if self.model.newline is not None:
            image = image + 0 * self.model.newline
        return 0 * image.to(x.dtype).sum()


def context_of(batch: Batch) -> AttentionContext:
    """How a batch attends: within each sample of a packed row, or causally in each padded row."""
    if batch.segments is None:
        return CausalContext(positions=batch.pos[0], seq_len=batch.longest)
    return VarlenContext(positions=batch.pos, seq_len=batch.longest, segments=batch.segments)


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
