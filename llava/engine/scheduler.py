"""Chooses what each step computes: which sequences, and how many of their tokens.

A step has a budget of tokens. Every sequence that it contains raises its `computed` count, so a decode step, a chunk
of a long prompt, a prompt whose beginning is cached and a request that was preempted all take the same path.

A step may be planned while the one before it is in flight. A page that is released may then still be written by that
step, for a sequence that has ended or was preempted. The device computes steps in order, so whoever gets the page
writes it later, and reads only what it has written.
"""

import time
from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from llava.engine.block_manager import BlockManager, PageKey
from llava.engine.feature_cache import FeatureCache, FeatureKey
from llava.engine.sequence import PlacedImage, Sequence


@dataclass(eq=False, kw_only=True)
class Scheduled:
    """The part of a sequence that a step computes."""

    sequence: Sequence
    n_tokens: int  # the tokens from `computed` on
    copy: tuple[int, int] | None = None  # (from, to): a page shared with another sequence, copied before it is written


@dataclass(eq=False, kw_only=True)
class Step:
    """What one step computes."""

    scheduled: dict[int, Scheduled] = field(default_factory=dict)  # by sequence id
    n_tokens: int = 0
    n_views: int = 0  # views that the vision tower has to encode
    to_encode: set[FeatureKey] = field(default_factory=set)
    page_hashes: set[bytes] = field(default_factory=set)  # hashes of the pages that this step completes

    def add(self, one: Scheduled, page_size: int) -> None:
        sequence = one.sequence
        self.scheduled[sequence.id] = one
        self.n_tokens += one.n_tokens
        first = sequence.computed // page_size
        end = min(sequence.computed + one.n_tokens, sequence.n_known) // page_size
        if end > first:
            self.page_hashes.update(key.hash for key in sequence.keys(page_size, end * page_size)[first:])

    def drop(self, sequence: Sequence) -> None:
        one = self.scheduled.pop(sequence.id, None)
        if one is not None:
            self.n_tokens -= one.n_tokens


class Scheduler:
    """Keeps the waiting and the running sequences, each in the order in which they are served."""

    def __init__(self, blocks: BlockManager, features: FeatureCache, *, max_batch: int, chunk_tokens: int):
        """max_batch: running sequences; chunk_tokens: tokens computed in a step, at least one per running sequence."""
        self.blocks, self.features = blocks, features
        self.max_batch, self.chunk_tokens = max_batch, max(chunk_tokens, max_batch)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._pool_slots = list(range(max_batch))  # free ones
        self.prefix_hit_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Adds a sequence to the waiting ones."""
        insort(self.waiting, sequence, key=_order)

    def add_beam(self, sequence: Sequence) -> None:
        """Adds a new beam, which has the pages of the beam that it continues, unless that one has been preempted."""
        insort(self.running if sequence.block_table else self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Removes a finished sequence and releases its pages and features."""
        for sequences in (self.waiting, self.running):
            if sequence in sequences:
                sequences.remove(sequence)
        self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Releases the pages, the slot in the token pool and the features of a sequence."""
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        if sequence.pool_slot >= 0:
            self._pool_slots.append(sequence.pool_slot)
            sequence.pool_slot = -1
        self.features.release([feature_key(sequence, one) for one in sequence.images], sequence.id)

    def preempt(self, sequence: Sequence) -> None:
        """Makes a running sequence wait again."""
        self.running.remove(sequence)
        self.release(sequence)
        sequence.forget_computed()
        self.add(sequence)

    def may_preempt(self) -> bool:
        """Whether the next step may preempt a sequence, which drops its token in flight."""
        if self.waiting and self.running and self.waiting[0].order < self.running[-1].order:
            return True
        missing = sum(self._n_pages(one.total) - len(one.block_table) for one in self.running)
        n_beams = sum(one.params.num_beams > 1 for one in self.running)  # may have to copy a page before writing it
        return missing + n_beams > self.blocks.n_free

    def schedule(self, view_budget: int | None = None) -> Step:
        """Plans the next step and allocates its pages. Sequences that have to wait for a token in flight are left out.

        view_budget: number of views that the tower may encode, so that pictures do not delay the running replies; at
        least one picture is always encoded. None: no limit.
        """
        step = Step()
        running = [one for one in self.running if one.n_pending and not one.awaits_token]
        for sequence in [one for one in running if one.is_decoding]:
            if sequence.block_table:  # empty: preempted by a sequence before it
                self._extend(step, sequence, 1)
        for sequence in [one for one in running if not one.is_decoding]:
            if sequence.block_table:
                self._extend(step, sequence, self._chunk(step, sequence, view_budget))
        self._admit(step, view_budget)
        return step

    def _admit(self, step: Step, view_budget: int | None) -> None:
        """Starts waiting sequences, in order, while there is room."""
        for sequence in list(self.waiting):
            if step.n_tokens >= self.chunk_tokens:
                return
            pages = self.blocks.match(self._reusable(sequence))
            if self._is_being_computed(step, sequence, len(pages)):
                continue  # in the next step, its beginning is in the prefix cache
            if not self._make_room(step, sequence, pages):
                return
            self._start(sequence, pages)
            self._extend(step, sequence, self._chunk(step, sequence, view_budget))
            if sequence.id in step.scheduled:
                n_cached = len(pages) * self.blocks.page_size
                self.prefix_hit_tokens += n_cached
                if not sequence.admitted:  # later, it may find pages of its own
                    sequence.n_cached, sequence.admitted = n_cached, time.perf_counter()
            elif sequence in self.running:  # the picture at its start exceeds the budget
                self.preempt(sequence)

    def _start(self, sequence: Sequence, pages: list[int]) -> None:
        """Moves a waiting sequence to the running ones, with the pages of its cached prefix."""
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_order)
        if sequence.params.num_beams == 1:  # beams have no tokens in flight, and there may be more than max_batch
            sequence.pool_slot = self._pool_slots.pop()
        self.blocks.acquire(pages)
        sequence.block_table = list(pages)
        sequence.computed = len(pages) * self.blocks.page_size
        sequence.n_reused = sequence.n_registered = len(pages)

    def _reusable(self, sequence: Sequence) -> list[PageKey]:
        """Returns the keys of the pages that may be taken from the prefix cache: at least one token is computed."""
        return sequence.keys(self.blocks.page_size, sequence.total - 1) if sequence.uses_prefix_cache else []

    def _is_being_computed(self, step: Step, sequence: Sequence, n_pages: int) -> bool:
        """Returns whether this step computes the first page that is missing from the prefix cache for `sequence`."""
        missing = self._reusable(sequence)[n_pages : n_pages + 1] if self.blocks.prefix_cache else []
        return any(key.hash in step.page_hashes for key in missing)

    def _make_room(self, step: Step, sequence: Sequence, pages: list[int]) -> bool:
        """Makes room for all pending tokens of a waiting sequence, preempting later ones if there are any."""
        while True:
            n_cached = sum(not self.blocks.in_use(page) for page in pages)
            others = [one for one in self.running if one.request != sequence.request]  # not beams of the same search
            reserve = len(others) // 4  # pages that the running replies are about to need
            needed = self._n_pages(sequence.total) - len(pages) + n_cached + reserve
            if len(others) < self.max_batch and (needed <= self.blocks.n_free or not self.running):
                return True
            if not self.running or self.running[-1].order <= sequence.order:
                return False
            self._preempt_last(step)

    def _chunk(self, step: Step, sequence: Sequence, view_budget: int | None) -> int:
        """Returns how many tokens of a sequence to compute, which may end before a picture that exceeds the budget."""
        start = sequence.computed
        n = min(sequence.n_pending, self.chunk_tokens - step.n_tokens)
        for image in sequence.images_in(start, start + n):
            key = feature_key(sequence, image)
            if key in step.to_encode or self.features.acquire(key, sequence.id) is not None:
                continue
            n_views = len(image.pixels)
            if view_budget is not None and step.n_views and step.n_views + n_views > view_budget:
                return max(0, image.start - start)
            step.n_views += n_views
            step.to_encode.add(key)
        return n

    def _extend(self, step: Step, sequence: Sequence, n: int) -> None:
        """Schedules `n` tokens of a running sequence. If pages run out, preempts the last sequence, or this one."""
        if n <= 0:
            return
        scheduled = Scheduled(sequence=sequence, n_tokens=n)
        table, size = sequence.block_table, self.blocks.page_size
        shared = sequence.computed % size and self.blocks.is_shared(table[sequence.computed // size])
        missing = self._n_pages(sequence.computed + n) - len(table) + bool(shared)
        while self.blocks.n_free < missing:
            last = self._preempt_last(step)
            if last is sequence:
                return
        if shared:
            page = sequence.computed // size
            scheduled.copy = (table[page], self.blocks.allocate())
            self.blocks.release([table[page]])
            table[page] = scheduled.copy[1]
        while len(table) < self._n_pages(sequence.computed + n):
            table.append(self.blocks.allocate())
        step.add(scheduled, size)

    def _preempt_last(self, step: Step) -> Sequence:
        last = self.running[-1]
        step.drop(last)
        self.preempt(last)
        return last

    def commit(self, scheduled: Scheduled) -> None:
        """Records that the tokens of a step have been computed, or will be by a step in flight."""
        sequence = scheduled.sequence
        sequence.computed += scheduled.n_tokens
        self.register(sequence)
        touched = sequence.images_in(sequence.computed - scheduled.n_tokens, sequence.computed)
        if done := [feature_key(sequence, one) for one in touched if one.end <= sequence.computed]:
            self.features.release(done, sequence.id)

    def register(self, sequence: Sequence) -> None:
        """Offers the full pages of a sequence to the prefix cache, except those with a token in flight."""
        n_tokens = min(sequence.computed, sequence.n_known)
        if n_tokens // self.blocks.page_size > sequence.n_registered:
            keys = sequence.keys(self.blocks.page_size, n_tokens)
            for page in range(sequence.n_registered, len(keys)):
                self.blocks.register(sequence.block_table[page], keys[page])
            sequence.n_registered = len(keys)

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """Forgets all pages and features, and makes these sequences wait: the unfinished ones after an interrupt."""
        self.blocks.reset()
        self.features.reset()
        self.waiting, self.running = [], []
        self._pool_slots = list(range(self.max_batch))
        for sequence in sequences:
            sequence.block_table, sequence.pool_slot = [], -1
            sequence.forget_computed()
            self.add(sequence)

    def _n_pages(self, n_tokens: int) -> int:
        return -(-n_tokens // self.blocks.page_size)

    def tables(self) -> Iterator[list[int]]:
        """Yields the block tables of all sequences."""
        return (one.block_table for one in [*self.running, *self.waiting])


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order, sequence.id


def feature_key(sequence: Sequence, image: PlacedImage) -> FeatureKey:
    """Returns the key of a picture's features for the adapter of a sequence."""
    return FeatureKey(sequence.adapter, sequence.salt, image.digest)
