"""Attention of decoding rows over pages, by kernel and by twin, against float64.

Slots that no row attends to contain NaN, as do the partial results before a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.kernels.attend import Positions, RowPages, Scratch
from llava.kernels.paged_attention import eager_paged_attention, n_splits, paged_attention
from llava.kernels.support import is_interpreted

CPU = torch.device("cpu")
PAGE = 16
MAX_SEQ = 320
LENGTHS = (1, 2, 16, 17, 64, 65, 300)  # of the rows, the new token included

pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model's attention, and how positions enter it."""

    group: int = 1  # query heads for each key/value head
    n_kv_heads: int = 2
    head_dim: int = 32
    page_size: int = PAGE
    window: int | None = None
    kind: str = "rope"  # or alibi, or none

    @property
    def n_heads(self) -> int:
        return self.group * self.n_kv_heads

    def positions(self, device: torch.device) -> Positions:
        if self.kind == "alibi":
            return Positions(slopes=torch.rand(self.n_heads, device=device), window=self.window)
        if self.kind == "none":
            return Positions(window=self.window)
        angles = torch.arange(MAX_SEQ)[:, None] * 100 ** (-torch.arange(self.head_dim // 2) / (self.head_dim // 2))
        return Positions(cos=angles.cos().to(device), sin=angles.sin().to(device), window=self.window)


SHAPES = {
    "own keys": Shape(),
    "head_dim 80": Shape(head_dim=80),
    "head_dim 128": Shape(head_dim=128, n_kv_heads=1),
    "groups of 4": Shape(group=4),
    "groups of 7": Shape(group=7, n_kv_heads=1, head_dim=80, page_size=5),
    "window": Shape(window=24),
    "window of one token": Shape(window=1, group=4),
    "window, groups of 4": Shape(window=65, group=4, page_size=7),
    "ALiBi": Shape(kind="alibi"),
    "ALiBi, groups of 4": Shape(kind="alibi", group=4, page_size=1),
    "no positions": Shape(kind="none"),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """A decoding step: the rows' lengths, and the arguments of `paged_attention`."""

    shape: Shape
    lengths: tuple[int, ...]  # 0: the row only fills the batch
    qkv: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor
    how: Positions

    @classmethod
    def of(cls, shape: Shape, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Step:
        """Random rows, whose pages are scattered over the cache."""
        sizes = [-(-n // shape.page_size) for n in lengths]
        pages = torch.randperm(sum(sizes) + 3)[: sum(sizes)].split(sizes)
        cache = (sum(sizes) + 3, shape.page_size, shape.n_kv_heads, shape.head_dim)
        keys, values = (torch.full(cache, torch.nan, dtype=dtype) for _ in range(2))
        tables = torch.zeros(len(lengths), max(sizes) + 1, dtype=torch.int32)
        for row, (n, own) in enumerate(zip(lengths, pages, strict=True)):
            tables[row, : len(own)] = own
            for x in (keys, values):
                slots = (own[:, None] * shape.page_size + torch.arange(shape.page_size)).flatten()
                hidden = 0 if shape.window is None else max(0, n - shape.window)
                x.view(-1, *cache[2:])[slots[hidden : max(n - 1, 0)]] = torch.randn(
                    max(n - 1 - hidden, 0), *cache[2:]
                ).to(dtype)
        width = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
        return cls(
            shape=shape,
            lengths=lengths,
            qkv=torch.randn(len(lengths), width).to(dtype).to(device),
            keys=keys.to(device),
            values=values.to(device),
            tables=tables.to(device),
            how=shape.positions(device),
        )

    @property
    def arguments(self) -> tuple[Any, ...]:
        at = torch.tensor([n - 1 for n in self.lengths], dtype=torch.int32, device=self.qkv.device)
        return self.qkv, RowPages(self.keys, self.values, self.tables, at), self.how

    def scratch(self, splits: int) -> Scratch:
        shape = self.shape
        made = Scratch(len(self.qkv), shape.n_heads, shape.n_kv_heads, shape.head_dim, splits, self.qkv.device)
        made.partial.fill_(torch.nan)
        made.stats.fill_(torch.nan)
        return made

    def run(self, scratch: Scratch) -> Tensor:
        longest = max(self.lengths)
        return paged_attention(*self.arguments, scratch, n_heads=self.shape.n_heads, max_tokens=longest)

    def clone(self) -> Step:
        return replace(self, qkv=self.qkv.clone(), keys=self.keys.clone(), values=self.values.clone())

    def new(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rotated queries [H, E], the rotated keys and the values [K, E] of a row's new token, in float64."""
        shape, at = self.shape, self.lengths[row] - 1
        x = self.qkv[row].double().view(-1, shape.head_dim)
        q, k, v = x.split([shape.n_heads, shape.n_kv_heads, shape.n_kv_heads])
        if self.how.cos is not None and self.how.sin is not None:
            turn = torch.complex(self.how.cos[at].double(), self.how.sin[at].double())
            turned = [torch.complex(*one.chunk(2, -1)) * turn for one in (q, k)]
            q, k = (torch.cat([one.real, one.imag], -1) for one in turned)
        return q, k, v

    def slot(self, row: int) -> tuple[int, int]:
        """The page of a row's new token, and the index in the page."""
        page, index = divmod(self.lengths[row] - 1, self.shape.page_size)
        return int(self.tables[row, page]), index

    def expected(self, row: int) -> Tensor:
        """What a row attends to, in float64."""
        shape, n = self.shape, self.lengths[row]
        q, new_k, new_v = self.new(row)
        first = 0 if shape.window is None else max(0, n - shape.window)
        k, v = (
            torch.cat([x[self.tables[row].long()].flatten(0, 1)[first : n - 1].double(), new[None]])
            for x, new in ((self.keys, new_k), (self.values, new_v))
        )
        k, v = (x.repeat_interleave(shape.group, dim=1) for x in (k, v))
        s = torch.einsum("he,the->ht", q, k) * shape.head_dim**-0.5
        if self.how.slopes is not None:
            s += self.how.slopes.double()[:, None] * torch.arange(first - n + 1, 1, device=s.device)
        return torch.einsum("ht,the->he", s.softmax(-1), v).flatten()


def check(step: Step, before: Step, found: Tensor, tolerance: float) -> None:
    """Compares results and cache of a step with the inputs `before` it."""
    untouched = torch.ones(step.keys.shape[:2], dtype=torch.bool)
    for row, n in enumerate(step.lengths):
        if not n:
            continue
        wanted = before.expected(row)
        assert (found[row].double() - wanted).abs().amax() < tolerance * wanted.abs().amax(), (row, n)
        page, index = before.slot(row)
        untouched[page, index] = False
        _, new_k, new_v = before.new(row)
        torch.testing.assert_close(step.keys[page, index].double(), new_k, rtol=tolerance, atol=tolerance)
        assert torch.equal(step.values[page, index].double(), new_v)
    for after, old in ((step.keys, before.keys), (step.values, before.values)):
        assert torch.equal(after[untouched].nan_to_num(77), old[untouched].nan_to_num(77))


@EVERY_SHAPE
def test_results_and_stored_tokens_are_near_float64(shape: Shape, device: torch.device) -> None:
    step = Step.of(shape, (1, 0, 17, 65), device, torch.float32)
    before, scratch = step.clone(), step.scratch(3)
    check(step, before, step.run(scratch), 1e-5)
    assert not scratch.counters.any()
    again = before.clone()  # the scratch memory is used again by every layer
    check(again, before, again.run(scratch), 1e-5)


@pytest.mark.parametrize("name", ["own keys", "groups of 4"])
def test_rows_of_any_length_are_near_float64(name: str, device: torch.device) -> None:
    step = Step.of(replace(SHAPES[name], n_kv_heads=1), LENGTHS, device, torch.float32)
    before = step.clone()
    check(step, before, step.run(step.scratch(1)), 1e-5)


@pytest.mark.parametrize(("splits", "group"), [(2, 1), (4, 4), (5, 1)])
def test_any_number_of_programs_divides_the_tokens(splits: int, group: int, device: torch.device) -> None:
    step = Step.of(Shape(group=group, n_kv_heads=1), (2, 33, 160), device, torch.float32)
    before, scratch = step.clone(), step.scratch(splits)
    check(step, before, step.run(scratch), 1e-5)
    assert not scratch.counters.any()


@pytest.mark.parametrize("name", ["own keys", "groups of 4"])
def test_sixteen_bits_are_near_float64(name: str, device: torch.device) -> None:
    shape = SHAPES[name]
    dtype = torch.float16 if is_interpreted() else torch.bfloat16
    step = Step.of(shape, (1, 17, 0, 100), device, dtype)
    before = step.clone()
    check(step, before, step.run(step.scratch(2)), 4e-3 if dtype == torch.float16 else 0.02)


@EVERY_SHAPE
def test_the_twin_is_near_float64(shape: Shape) -> None:
    step = Step.of(shape, (0, *LENGTHS), CPU, torch.float32)
    before = step.clone()
    check(step, before, eager_paged_attention(*step.arguments, n_heads=shape.n_heads), 1e-5)


def test_a_step_of_filling_rows_writes_nothing(device: torch.device) -> None:
    step = Step.of(Shape(), (0, 0, 40), device, torch.float32)
    only_filling = replace(step, lengths=(0, 0, 0))
    before, scratch = step.clone(), step.scratch(3)
    paged_attention(*only_filling.arguments, scratch, n_heads=2, max_tokens=40)
    for after, old in ((step.keys, before.keys), (step.values, before.values)):
        assert torch.equal(after.nan_to_num(77), old.nan_to_num(77))
    assert not scratch.counters.any()


@pytest.mark.parametrize(
    ("n_rows", "n_kv_heads", "max_tokens"), [(1, 32, 4096), (1, 1, 9), (128, 32, 4096), (1, 1, 99999)]
)
def test_splits_are_as_many_as_there_are_tokens_for(n_rows: int, n_kv_heads: int, max_tokens: int) -> None:
    splits = n_splits(n_rows, n_kv_heads, max_tokens)
    assert 1 <= splits <= min(64, -(-max_tokens // 16))
    assert splits == 1 or (splits - 1) * n_rows * n_kv_heads < 132 * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu")
@pytest.mark.parametrize("n_rows", [1, 8, 64])
@pytest.mark.parametrize("group", [1, 4])
def test_at_the_sizes_of_a_7b_model(n_rows: int, group: int) -> None:
    shape = Shape(n_kv_heads=32 // group, group=group, head_dim=128)
    lengths = tuple(torch.randint(1, MAX_SEQ, (n_rows,)).tolist())
    step = Step.of(shape, lengths, torch.device("cuda"), torch.bfloat16)
    before = step.clone()
    scratch = step.scratch(n_splits(n_rows, shape.n_kv_heads, MAX_SEQ))
    check(step, before, step.run(scratch), 0.02)
    assert not scratch.counters.any()
