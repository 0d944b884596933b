"""Embeddings of ids that the host knows, and of ids that only the token pool knows."""

from __future__ import annotations

import pytest
import torch

from llava.kernels.embed_rows import eager_embed_rows, embed_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(device, dtype, dim):
    """The ids of three rows are given, those of three others are in the pool, and one row only fills the batch."""
    weight = torch.randn(50, dim, device=device).to(dtype)
    ids = torch.tensor([3, -1, 49, -1, 0, -1, -1], dtype=torch.int32, device=device)
    slots = torch.tensor([1, 0, -1, 5, 2, 2, -1], dtype=torch.int32, device=device)
    pool = torch.tensor([7, 8, 0, 9, -1, 49], device=device)
    return (ids, slots, pool, weight), weight[[3, 7, 49, 49, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 64, 172, 5120])
@pytest.mark.usefixtures("poisoned")
def test_an_id_that_is_not_given_comes_from_the_pool(dim, dtype, device):
    arguments, expected = inputs(device, dtype, dim)
    found = embed_rows(*arguments)
    assert torch.equal(found[:6], expected)
    assert found[6].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_gives_the_same_rows(dtype):
    arguments, expected = inputs("cpu", dtype, 172)
    found = eager_embed_rows(*arguments)
    assert torch.equal(found[:6], expected)
    assert found.shape == (7, 172)


def test_a_token_that_could_not_be_drawn_reads_no_memory_outside_the_table(device):
    (ids, slots, pool, weight), _ = inputs(device, torch.float32, 8)
    pool.fill_(-1)
    assert embed_rows(ids, slots, pool, weight).isfinite().all()
