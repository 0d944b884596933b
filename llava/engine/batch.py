"""Builds the tensors of a step: one packed row of new tokens from all scheduled sequences.

S new tokens
"""

from collections.abc import Sequence as Rest
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from llava.engine.scheduler import Scheduled
from llava.engine.sequence import Sequence
from llava.kernels.invariant_attention import Queries
from llava.model.batch_invariant import InvariantContext
from llava.model.paged import Chunk, PagedCache, PagedContext, Row, Rows, paged_rows
from llava.model.row_cache import RowCaches
from llava.model.staging import to_device

_ROWS = 64  # decoding rows whose pages are gathered together, to limit the memory for the copies


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """The scheduled sequences of one decoder, decoding rows first, and the tensors for its forward pass."""

    scheduled: Rest[Scheduled]
    starts: Rest[int]  # index of each sequence's first new token in the packed row
    context: PagedContext | InvariantContext

    @property
    def observed(self) -> bool:
        """See `is_observed`."""
        return is_observed(self.scheduled)

    def adapters(self) -> list[tuple[str | None, slice]]:
        """Returns the ranges of consecutive tokens that belong to the same adapter."""
        ranges = []
        pairs = list(zip(self.scheduled, self.starts, strict=True))
        for name, group in groupby(pairs, key=lambda pair: pair[0].sequence.adapter):
            members = list(group)
            last, start = members[-1]
            ranges.append((name, slice(members[0][1], start + last.n_tokens)))
        return ranges


def is_observed(scheduled: Rest[Scheduled]) -> bool:
    """Returns whether a request asks for something about its prompt or for intermediate results."""
    return any(one.sequence.capture or one.sequence.params.prompt_logprobs for one in scheduled)


def new_ids(scheduled: Rest[Scheduled]) -> list[int]:
    """Returns the ids of the new tokens, with IMAGE for image tokens and PENDING for tokens in flight."""
    ids: list[int] = []
    for one in scheduled:
        start = one.sequence.computed
        ids += one.sequence.tokens[start : start + one.n_tokens]
    return ids


def in_flight(scheduled: Rest[Scheduled]) -> list[tuple[int, int]]:
    """Returns (index among the new tokens, slot in the token pool) of those whose ids only the device knows.

    Only the newest token of a decoding sequence can be one.
    """
    found, start = [], 0
    for one in scheduled:
        if one.sequence.n_in_flight:
            found.append((start, one.sequence.pool_slot))
        start += one.n_tokens
    return found


def build(
    scheduled: Rest[Scheduled],
    cache: PagedCache,
    dense: RowCaches | None,
    *,
    dynamic_rope: bool = False,
    batch_invariant: bool = False,
) -> Batch:
    """Builds the batch.

    dense: copies of the decoding rows, on a CPU. dynamic_rope: whether the rotation of a token depends on the length of
    its sequence.
    """
    n_decoding = sum(one.sequence.is_decoding for one in scheduled)
    starts = [0, *accumulate(one.n_tokens for one in scheduled)][:-1]
    placed = list(zip(scheduled, starts, strict=True))
    device = cache.k.device
    new: Any = {
        "cache": cache,
        "positions": to_device([i for one in scheduled for i in positions_of(one)], torch.int64, device)[None],
        "seq_len": _seq_lens(scheduled, device) if dynamic_rope else max(one.sequence.total for one in scheduled),
        "slots": to_device([i for one in scheduled for i in slots_of(one, cache.page_size)], torch.int64, device),
        "watched": [
            chunk_of(*pair, cache, n_skipped(pair[0])) for pair in placed if n_skipped(pair[0]) < pair[0].n_tokens
        ],
    }
    context: PagedContext | InvariantContext
    if batch_invariant:
        context = InvariantContext(**new, queries=_queries(scheduled, new["positions"][0], cache.page_size))
    else:
        rows = _rows([one.sequence for one in scheduled[:n_decoding]], cache, dense)
        context = PagedContext(**new, rows=rows, chunks=[chunk_of(*pair, cache) for pair in placed[n_decoding:]])
    return Batch(scheduled=scheduled, starts=starts, context=context)


def n_skipped(one: Scheduled) -> int:
    """Returns how many of the first new tokens of a sequence are not watched: their attention is not captured."""
    capture = one.sequence.capture
    if capture is None or not capture.attention:
        return one.n_tokens
    return min(one.n_tokens, max(0, capture.first_query - one.sequence.computed))


def _queries(scheduled: Rest[Scheduled], positions: Tensor, page_size: int) -> Queries:
    """Returns the pages of the sequences and, for each of the new tokens at `positions` [S], its row there."""
    tables = [one.sequence.block_table for one in scheduled]
    longest = max(map(len, tables))
    rows = [row for row, one in enumerate(scheduled) for _ in range(one.n_tokens)]
    device = positions.device
    return Queries(
        positions=positions.int(),
        rows=to_device(rows, torch.int32, device),
        pages=to_device([[*one, *[0] * (longest - len(one))] for one in tables], torch.int32, device),
        page_size=page_size,
    )


def positions_of(one: Scheduled) -> range:
    """Returns the positions of the new tokens of a sequence."""
    return range(one.sequence.computed, one.sequence.computed + one.n_tokens)


def slots_of(one: Scheduled, page_size: int) -> list[int]:
    """Returns the slots of the new tokens of a sequence in the cache."""
    table = one.sequence.block_table
    return [table[i // page_size] * page_size + i % page_size for i in positions_of(one)]


def _seq_lens(scheduled: Rest[Scheduled], device: torch.device) -> Tensor:
    """Returns [1, S]: for a prompt token, the length of the prompt; for a generated one, the length up to it.

    The lengths are those of a whole prompt followed by single steps, whatever the chunks are.
    """
    lengths = [max(one.sequence.n_prompt, i + 1) for one in scheduled for i in positions_of(one)]
    return to_device(lengths, torch.int64, device)[None]


def chunk_of(one: Scheduled, start: int, cache: PagedCache, skip: int = 0) -> Chunk:
    """Returns the new tokens of a sequence, without the first `skip`. start: index of the first in the packed row."""
    return Chunk(
        start=start + skip,
        n=one.n_tokens - skip,
        position=one.sequence.computed + skip,
        pages=to_device(one.sequence.block_table, torch.int64, cache.k.device),
    )


def _rows(decoding: Rest[Sequence], cache: PagedCache, dense: RowCaches | None) -> Rest[Rows]:
    """Groups the decoding rows by their lengths, so that little of what is read is padding."""
    rows = [Row(one.id, one.block_table, one.computed, one.n_reused) for one in decoding]
    if dense is not None:
        return dense.rows(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].pages))
    return [paged_rows(cache, rows, order[i : i + _ROWS]) for i in range(0, len(order), _ROWS)]
