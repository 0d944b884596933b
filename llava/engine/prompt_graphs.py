"""Runs whole prompts as CUDA graphs, padded to a multiple of 64 tokens.

A prompt with a picture takes 13 ms on an H200, but the host needs 12 to 30 ms to launch its kernels one by one,
depending on what else it does. A graph takes one launch.

S tokens of a prompt   D dim   V vocabulary size
"""

from collections.abc import Sequence as Rest

import numpy as np
import torch
from torch import Tensor

from llava.engine.batch import slots_of
from llava.engine.graphs import Captured, Graphs
from llava.engine.scheduler import Scheduled
from llava.model.fused import FusedDecoder, PackedAttention
from llava.model.paged import Chunk, PagedCache
from llava.model.staging import to_device

_MULTIPLE = 64
_MAX_TOKENS = 1024  # of a prompt; longer ones keep the GPU busy for longer than it takes to launch their kernels
_MAX_TOGETHER = 3072  # the same for the prompts of a step
_FULL = 512  # prompts of this length keep the GPU as busy one by one as in a packed row
_MAX_ROWS = 32  # more decoding rows take so long by themselves that a packed row, which reads weights once, is faster
_MAX_AGAIN = 128  # tokens in the prefix cache that are computed again, since a graph starts at the first token


class PromptGraphs:
    """Graphs of one decoder, for each padded length; captured when a length is needed for the second time."""

    def __init__(self, fused: FusedDecoder, cache: PagedCache, graphs: Graphs, max_tokens: int):
        """max_tokens: the longest sequence."""
        self.fused, self.cache, self.graphs, self.max_tokens = fused, cache, graphs, max_tokens
        self.captured: dict[int, tuple[Captured, Tensor, Tensor]] = {}  # graph, embeddings, indices
        self._seen: set[int] = set()

    def suit(self, prompts: Rest[Scheduled], n_rows: int) -> bool:
        """Returns whether graphs should compute these new tokens of prompts, one prompt after the other.

        n_rows: decoding rows in the same step, which then run as a graph of their own.

        A length that is never seen again is not worth a graph, so this is False for the first prompt of a length.
        """
        lengths = [self._length(one) for one in prompts]
        if not self.graphs.active or not all(lengths) or sum(lengths) > _MAX_TOGETHER or n_rows > _MAX_ROWS:
            return False
        if len(prompts) > 1 and min(one.n_tokens for one in prompts) < _FULL:
            return False
        known = self._seen.issuperset(lengths)
        self._seen.update(lengths)
        return known

    def _length(self, one: Scheduled) -> int:
        """Returns the padded length of the whole prompt, or 0 if no graph can compute it."""
        sequence, how = one.sequence, self.fused.how
        again = sequence.computed
        length = -(-(again + one.n_tokens) // _MULTIPLE) * _MULTIPLE
        is_rest = one.n_tokens == sequence.n_pending and again <= _MAX_AGAIN and not any(sequence.images_in(0, again))
        is_plain = how.slopes is None and (how.window is None or length <= how.window)  # attention without biases
        return length if is_rest and is_plain and length <= _MAX_TOKENS else 0

    def logits(self, one: Scheduled, x: Tensor) -> Tensor | None:
        """Computes the embeddings x [S, D] of a whole prompt. Returns logits [1, V], or None if a capture has failed.

        Keys and values go into the cache from `computed` on; those before are in pages that others may be reading.
        """
        n, length = len(x), self._length(one)
        if length not in self.captured and not self._capture(length, x):
            return None
        replay, inputs, indices = self.captured[length]
        values = np.full(2 * length + 1, -1, dtype=np.int64)
        values[one.sequence.computed : n] = slots_of(one, self.cache.page_size)
        values[length:-1] = np.minimum(np.arange(length), self.max_tokens - 1)
        values[-1] = n - 1
        indices.copy_(to_device(torch.from_numpy(values), torch.int64, x.device))
        inputs[:n] = x
        inputs[n:].zero_()  # NaN that an earlier prompt has left would pass the mask
        logits: Tensor = replay()
        return logits.clone()

    def _capture(self, length: int, like: Tensor) -> bool:
        inputs = like.new_zeros(length, like.shape[1])
        indices = torch.zeros(2 * length + 1, dtype=torch.int64, device=like.device)
        indices[:length] = -1  # nothing is written to the cache
        slots, positions, end = indices.split([length, length, 1])
        attend = PackedAttention(
            decoder=self.fused,
            cache=self.cache,
            slots=slots,
            positions=positions,
            chunks=[Chunk(start=0, n=length, position=0, pages=end)],
        )
        captured = self.graphs.capture(lambda: self.fused.logits(self.fused(inputs.clone(), attend, end)), "a prompt")
        if captured:
            self.captured[length] = captured, inputs, indices
        return captured is not None
