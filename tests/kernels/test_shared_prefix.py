"""Rows that begin alike: attention that reads their beginning once, against the one that reads it for every row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from llava.engine.rows import shared_tokens
from llava.kernels.attend import SHARED_ROWS, Positions, RowPages, Scratch
from llava.kernels.paged_attention import eager_paged_attention, paged_attention

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(
    ("lengths", "shared", "page_size", "head_dim", "splits", "parts"),
    [
        ([100 + 7 * i for i in range(18)], [96, 64], 16, 32, 1, 1),
        ([100 + 7 * i for i in range(18)], [96, 0], 16, 128, 3, 4),
        ([81, *range(100, 115), 0], [80, 8], 8, 24, 2, 3),  # a row that only fills the batch, and one new token
        ([65] * 16, [64], 1, 32, 2, 5),
        ([300] * 5, [288], 24, 80, 5, 7),
    ],
)
def test_rows_get_what_they_get_without_sharing(
    lengths: Sequence[int], shared: Sequence[int], page_size: int, head_dim: int, splits: int, parts: int,
    device: torch.device,
) -> None:  # fmt: skip
    n_rows, n_heads = len(lengths), 2
    n_pages = -(-max(lengths) // page_size) + 1
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tables = torch.randperm(n_rows * n_pages + 9, dtype=torch.int32)[: n_rows * n_pages].view(n_rows, n_pages)
    for group, n in enumerate(shared):
        rows = slice(group * SHARED_ROWS, (group + 1) * SHARED_ROWS)
        tables[rows, : n // page_size] = tables[rows][0, : n // page_size].clone()
    shape = (n_rows * n_pages + 9, page_size, n_heads, head_dim)
    keys, values = (torch.randn(shape).to(device, dtype) for _ in range(2))
    qkv = torch.randn(n_rows, 3 * n_heads * head_dim).to(device, dtype)
    angles = torch.rand(max(lengths), head_dim // 2) * 6
    how = Positions(cos=angles.cos().to(device), sin=angles.sin().to(device))
    positions = torch.tensor(lengths, dtype=torch.int32, device=device) - 1
    tables = tables.to(device)

    copies = [keys.clone(), values.clone()]
    plain = RowPages(*(x.float() for x in copies), tables, positions)
    expected = eager_paged_attention(qkv.float(), plain, how, n_heads=n_heads)
    scratch = Scratch(n_rows, n_heads, n_heads, head_dim, splits, device, shared_splits=parts)
    counts = torch.tensor(shared, dtype=torch.int32, device=device)
    for _ in range(2):
        scratch.partial.fill_(torch.nan)
        scratch.stats.fill_(torch.nan)
        pages = RowPages(keys, values, tables, positions)
        found = paged_attention(qkv, pages, how, scratch, n_heads=n_heads, max_tokens=max(lengths), shared=counts)
        live = positions >= 0
        torch.testing.assert_close(found[live].float(), expected[live], atol=2e-2 if dtype != torch.float32 else 1e-5,
                                   rtol=2e-2 if dtype != torch.float32 else 1e-5)  # fmt: skip
        assert not scratch.counters.any()


def test_common_beginnings_are_counted_in_whole_pages_of_all_rows_of_a_group() -> None:
    tables = np.arange(20 * 12, dtype=np.int32).reshape(20, 12)
    tables[:16, :9] = tables[0, :9]
    tables[16:, :4] = tables[16, :4]
    positions = np.full(20, 180, dtype=np.int32)
    assert shared_tokens(positions, tables, 3, 16).tolist() == [144, 64, 0]
    positions[3] = 100  # its seventh page is not full
    assert shared_tokens(positions, tables, 3, 16).tolist() == [96, 64, 0]
    assert shared_tokens(positions[:17], tables[:17], 2, 16).tolist() == [96, 0]  # one row shares with nobody
    assert shared_tokens(positions, tables, 2, 8).tolist() == [72, 0]  # 32 tokens are too few
