"""Runs the fused decoder for steps of the engine, as CUDA graphs where that pays.

A decoding step is captured once for each number of rows in `BUCKETS`: from the token pool to the next token in the
token pool. Without graphs, the same code runs eagerly. Whole prompts have graphs of their own (prompt_graphs.py).

B rows of a graph   P pages   S tokens   D dim   V vocabulary size
"""

from collections.abc import Sequence as Rest
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llava.engine.batch import chunk_of, positions_of, slots_of
from llava.engine.graphs import Captured, Graphs
from llava.engine.prompt_graphs import PromptGraphs
from llava.engine.rows import Rows, n_groups, row_values
from llava.engine.scheduler import Scheduled
from llava.kernels.attend import Scratch
from llava.kernels.embed_rows import embed_rows
from llava.kernels.greedy import greedy
from llava.kernels.paged_attention import n_splits
from llava.model.decoder import Decoder
from llava.model.fused import FusedDecoder, PackedAttention, PackedChunks, RowAttention, with_biases
from llava.model.paged import Chunk, PagedCache
from llava.model.staging import copy_to_device, to_device

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class Decoded(NamedTuple):
    """The result of a decoding step, valid until the next replay of any graph."""

    logits: Tensor  # [rows, V] float32
    ids: Tensor  # int64 [rows], of the highest logits


class FusedRunner:
    """Computes the steps of one decoder."""

    def __init__(self, decoder: Decoder, fused: FusedDecoder, cache: PagedCache, pool: Tensor, graphs: Graphs):
        """pool: the token pool."""
        self.decoder, self.fused, self.cache, self.pool, self.graphs = decoder, fused, cache, pool, graphs
        self.max_tokens = min(fused.config.max_seq, cache.n_pages * cache.page_size)
        self.max_pages = -(-self.max_tokens // cache.page_size)
        config, how = fused.config, fused.how
        self._can_share = config.n_heads == config.n_kv_heads and how.slopes is None and how.window is None
        self._rows: dict[int, Rows] = {}  # by bucket
        self._scratch: dict[tuple[int, bool], Scratch] = {}
        self._decoding: dict[tuple[int, bool, bool], Captured] = {}
        self.prompts = PromptGraphs(fused, cache, graphs, self.max_tokens)

    # --- decoding ---------------------------------------------------------------------------------------------------

    def decode(self, scheduled: Rest[Scheduled], *, keep: bool) -> Decoded:
        """Computes the newest token of decoding sequences. keep: whether the token pool receives the greedy choice."""
        n = len(scheduled)
        is_graph = self.graphs.active and n <= BUCKETS[-1]
        bucket = next(bucket for bucket in BUCKETS if bucket >= n) if is_graph else n
        rows, sharing = self._filled(scheduled, bucket, keep_memory=is_graph)
        key = bucket, keep, sharing
        if is_graph and key not in self._decoding:
            before = self.pool.clone()  # the step runs once before it is captured, and would read its own tokens
            captured = self.graphs.capture(lambda: self._step(rows, keep, sharing), "a decoding step")
            self.pool.copy_(before)
            if captured:
                self._decoding[key] = captured
        replay = self._decoding.get(key) if is_graph else None
        logits, ids = replay() if replay else self._step(rows, keep, sharing)
        return Decoded(logits[:n], ids[:n])

    def _filled(self, scheduled: Rest[Scheduled], bucket: int, *, keep_memory: bool) -> tuple[Rows, bool]:
        """Returns the inputs of the rows, and whether rows begin alike. keep_memory: use the graphs'."""
        values, sharing = row_values(
            scheduled, bucket, self.max_pages, self.cache.page_size if self._can_share else None
        )
        host = torch.from_numpy(values)
        if not keep_memory:
            return Rows.of(to_device(host, torch.int32, self.pool.device), bucket), sharing
        if bucket not in self._rows:
            self._rows[bucket] = Rows.of(torch.empty(len(host), dtype=torch.int32, device=self.pool.device), bucket)
        copy_to_device(host, self._rows[bucket].flat)
        return self._rows[bucket], sharing

    def _step(self, rows: Rows, keep: bool, sharing: bool) -> tuple[Tensor, Tensor]:
        x = embed_rows(rows.ids, rows.slots, self.pool, self.decoder.embed.weight)
        states = self.fused(x, self._row_attention(rows, sharing))
        logits = self.fused.logits(states)
        return logits, greedy(logits, keep=(rows.slots, self.pool) if keep else None)

    def _row_attention(self, rows: Rows, sharing: bool = False) -> RowAttention:
        n, key = len(rows.positions), (len(rows.positions), sharing)
        if key not in self._scratch:
            config = self.fused.config
            self._scratch[key] = Scratch(
                n,
                config.n_heads,
                config.n_kv_heads,
                config.head_dim,
                n_splits(n, config.n_kv_heads, self.max_tokens),
                self.pool.device,
                shared_splits=n_splits(n_groups(n), config.n_kv_heads, self.max_tokens) if sharing else 0,
            )
        return RowAttention(
            decoder=self.fused,
            cache=self.cache,
            tables=rows.tables,
            positions=rows.positions,
            max_tokens=self.max_tokens,
            scratch=self._scratch[key],
            shared=rows.shared if sharing else None,
        )

    # --- prompts ----------------------------------------------------------------------------------------------------

    def prefill(self, scheduled: Rest[Scheduled], x: Tensor, ends: Rest[int]) -> Tensor:
        """Computes a packed row of embeddings x [S, D], decoding rows first. Returns logits [ends, V].

        ends: indices of the sequences in `scheduled` whose last new token needs logits.
        """
        starts = [0, *accumulate(one.n_tokens for one in scheduled)]
        last = to_device([starts[i + 1] - 1 for i in ends], torch.int64, x.device)
        n_rows = sum(one.sequence.is_decoding for one in scheduled)
        chunks, size = scheduled[n_rows:], self.cache.page_size
        slots = to_device([slot for one in chunks for slot in slots_of(one, size)], torch.int64, x.device)
        positions = to_device([i for one in chunks for i in positions_of(one)], torch.int64, x.device)
        packed = self._packed(chunks, x)
        attend = PackedAttention(
            decoder=self.fused,
            cache=self.cache,
            slots=slots,
            positions=positions,
            n_rows=n_rows,
            rows=self._some_rows(scheduled[:n_rows]) if n_rows else None,
            chunks=[] if packed else self._one_by_one(chunks, x),
            packed=packed,
        )
        return self.fused.logits(self.fused(x, attend, last)) if ends else self._without_logits(x, attend)

    def _without_logits(self, x: Tensor, attend: PackedAttention) -> Tensor:
        self.fused(x, attend, torch.zeros(1, dtype=torch.int64, device=x.device))
        return x.new_empty(0, len(self.fused.head), dtype=torch.float32)

    def _some_rows(self, scheduled: Rest[Scheduled]) -> RowAttention:
        """Returns the attention of rows beside chunks, for few different numbers of rows, so that few are compiled."""
        n = len(scheduled)
        rows, _ = self._filled(scheduled, next((one for one in BUCKETS if one >= n), n), keep_memory=False)
        return self._row_attention(rows)

    def _one_by_one(self, scheduled: Rest[Scheduled], x: Tensor) -> list[Chunk]:
        starts = [0, *accumulate(one.n_tokens for one in scheduled)]
        chunks = [chunk_of(one, start, self.cache) for one, start in zip(scheduled, starts, strict=False)]
        return with_biases(self.fused, chunks, x.dtype)

    def _packed(self, scheduled: Rest[Scheduled], x: Tensor) -> PackedChunks | None:
        """Returns what one kernel needs to attend with all chunks, or None if it cannot, or there is a faster one."""
        is_whole_prompt = len(scheduled) == 1 and scheduled[0].sequence.computed == 0
        if is_whole_prompt or not self.fused.can_pack(x):
            return None
        starts = [0, *accumulate(one.n_tokens for one in scheduled)]
        lengths = [one.sequence.computed + one.n_tokens for one in scheduled]
        past = None
        if any(one.sequence.computed for one in scheduled):
            past = to_device(np.concatenate([self._past(one) for one in scheduled]), torch.int64, x.device)
        bounds = [starts, [0, *accumulate(lengths)]]
        cu_seqlens = to_device(bounds, torch.int32, x.device)
        longest = max(one.n_tokens for one in scheduled), max(lengths)
        return PackedChunks((cu_seqlens[0], cu_seqlens[1]), longest, past)

    def _past(self, one: Scheduled) -> NDArray[np.int64]:
        """Returns the slots of a sequence's tokens up to its last new one."""
        size = self.cache.page_size
        pages = np.array(one.sequence.block_table, dtype=np.int64)
        slots = (pages[:, None] * size + np.arange(size)).ravel()
        return slots[: one.sequence.computed + one.n_tokens]
