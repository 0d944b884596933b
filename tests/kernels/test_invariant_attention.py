"""Attention in which no token depends on the rest of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from llava.kernels.invariant_attention import Queries, eager_invariant_attention, invariant_attention
from llava.kernels.support import is_interpreted

CPU = torch.device("cpu")
# of results, relative to the largest one; 16-bit ones are rounded once, where Triton's interpreter truncates bfloat16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.0079 if is_interpreted() else 0.0040, torch.float16: 0.0005}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# (new tokens, position of the first) of each sequence: decoding rows, a prompt, a chunk in the middle of a prompt
BATCH = ((1, 0), (1, 63), (1, 64), (1, 150), (5, 0), (3, 126))
Attention = Callable[[Tensor, Tensor, Tensor, Queries], Tensor]

pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model's attention."""

    n_heads: int = 4
    n_kv_heads: int = 4
    head_dim: int = 16
    page_size: int = 16
    sliding_window: int | None = None
    alibi: bool = False


SHAPES = {
    "plain": Shape(),
    "grouped": Shape(n_kv_heads=2),
    "one head for keys": Shape(n_kv_heads=1, page_size=1),
    "head_dim 24": Shape(head_dim=24, page_size=7),
    "window": Shape(sliding_window=24),
    "window of a block": Shape(sliding_window=64, page_size=64),
    "ALiBi": Shape(alibi=True),
    "ALiBi, grouped, window": Shape(alibi=True, n_kv_heads=2, sliding_window=70, page_size=5),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """New tokens of sequences whose pages are scattered over the cache; slots without tokens contain NaN."""

    q: Tensor  # [S, H, E]
    k: Tensor  # [n_pages, page_size, K, E]
    v: Tensor
    queries: Queries

    def select(self, tokens: list[int]) -> Batch:
        """Returns the batch with only some of its tokens, in this order."""
        kept = torch.tensor(tokens, device=self.q.device)
        positions, rows = self.queries.positions[kept], self.queries.rows[kept]
        needed, rows = rows.unique(return_inverse=True)
        queries = replace(self.queries, positions=positions, rows=rows.int(), pages=self.queries.pages[needed])
        return replace(self, q=self.q[kept], queries=queries)

    def run(self, attention: Attention) -> Tensor:
        return attention(self.q, self.k, self.v, self.queries)


def batch(shape: Shape, device: torch.device, dtype: torch.dtype) -> Batch:
    sizes = [-(-(start + n) // shape.page_size) for n, start in BATCH]
    order = torch.randperm(sum(sizes) + 2)[: sum(sizes)]
    cache = (sum(sizes) + 2, shape.page_size, shape.n_kv_heads, shape.head_dim)
    k, v = (torch.full(cache, torch.nan, device=device, dtype=dtype) for _ in range(2))
    pages = torch.zeros(len(BATCH), max(sizes), dtype=torch.int32)
    for row, (table, (n, start)) in enumerate(zip(order.split(sizes), BATCH, strict=True)):
        pages[row, : len(table)] = table
        for x in (k, v):
            tokens = torch.randn(start + n, *cache[2:], device=device, dtype=dtype)
            slots = (table[:, None] * shape.page_size + torch.arange(shape.page_size)).flatten()[: start + n]
            x.view(-1, *cache[2:])[slots.to(device)] = tokens
    positions = [position for n, start in BATCH for position in range(start, start + n)]
    rows = [row for row, (n, _) in enumerate(BATCH) for _ in range(n)]
    return Batch(
        q=torch.randn(len(rows), shape.n_heads, shape.head_dim, device=device, dtype=dtype),
        k=k,
        v=v,
        queries=Queries(
            positions=torch.tensor(positions, dtype=torch.int32, device=device),
            rows=torch.tensor(rows, dtype=torch.int32, device=device),
            pages=pages.to(device),
            page_size=shape.page_size,
            sliding_window=shape.sliding_window,
            alibi_slopes=torch.rand(shape.n_heads, device=device) if shape.alibi else None,
        ),
    )


def expected(one: Batch) -> Tensor:
    """Attention of each token over the keys of its sequence, in float64."""
    queries, found = one.queries, []
    for q, position, row in zip(one.q.double(), queries.positions.tolist(), queries.rows.tolist(), strict=True):
        first = max(0, position + 1 - (queries.sliding_window or position + 1))
        k, v = (x[queries.pages[row].long()].flatten(0, 1)[first : position + 1].double() for x in (one.k, one.v))
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[1], dim=1) for x in (k, v))  # [T, H, E]
        scores = torch.einsum("he,the->ht", q, k) * q.shape[-1] ** -0.5
        if queries.alibi_slopes is not None:
            distance = torch.arange(first, position + 1, device=q.device) - position
            scores += queries.alibi_slopes.double()[:, None] * distance
        found.append(torch.einsum("ht,the->he", scores.softmax(-1), v))
    return torch.stack(found)


def check_near_float64(attention: Attention, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    one = batch(shape, device, dtype)
    found, wanted = one.run(attention), expected(one)
    assert (found.dtype, found.shape) == (dtype, one.q.shape)
    assert (found.double() - wanted).abs().amax() / wanted.abs().amax() < TOLERANCE[dtype]


def check_tokens_by_themselves(attention: Attention, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    one = batch(shape, device, dtype)
    together = one.run(attention)
    n = len(together)
    for i in range(n):
        assert torch.equal(one.select([i]).run(attention)[0], together[i]), i
    for tokens in ([*range(n)][::-1], [0, *range(3, 9)], [*range(4, n)]):
        assert torch.equal(one.select(tokens).run(attention), together[torch.tensor(tokens, device=device)])


@EVERY_SHAPE
def test_attention_is_near_that_in_float64(device: torch.device, shape: Shape) -> None:
    check_near_float64(invariant_attention, shape, device, torch.float32)


@EVERY_SHAPE
def test_the_twins_attention_is_near_that_in_float64(shape: Shape) -> None:
    check_near_float64(eager_invariant_attention, shape, CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_attention_is_rounded_once(device: torch.device, dtype: torch.dtype) -> None:
    for attention in (invariant_attention, eager_invariant_attention):
        check_near_float64(attention, Shape(n_kv_heads=2), device, dtype)


@DTYPES
@pytest.mark.parametrize("name", ["plain", "ALiBi, grouped, window"])
def test_a_token_does_not_depend_on_other_tokens(device: torch.device, name: str, dtype: torch.dtype) -> None:
    check_tokens_by_themselves(invariant_attention, SHAPES[name], device, dtype)


@DTYPES
@EVERY_SHAPE
def test_a_token_of_the_twin_does_not_depend_on_other_tokens(shape: Shape, dtype: torch.dtype) -> None:
    check_tokens_by_themselves(eager_invariant_attention, shape, CPU, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu")
@DTYPES
def test_at_the_sizes_of_a_7b_model(dtype: torch.dtype) -> None:
    shape = Shape(n_heads=32, n_kv_heads=32, head_dim=128)
    check_near_float64(invariant_attention, shape, torch.device("cuda"), dtype)
    check_tokens_by_themselves(invariant_attention, shape, torch.device("cuda"), dtype)
