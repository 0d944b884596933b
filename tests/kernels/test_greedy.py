"""The most likely tokens, by kernel and by twin."""

from __future__ import annotations

import pytest
import torch

from llava.kernels.greedy import eager_greedy, greedy

SIZES = [1, 30, 4096, 4097, 10_003]  # of the vocabulary; a block has 4096


BOTH = pytest.mark.parametrize("function", [greedy, eager_greedy])


def compute(function, logits, keep=None):
    """Returns the ids. They are written to memory that the caller provides."""
    out = torch.full((len(logits),), -7, device=logits.device)
    found = function(logits, out, keep)
    assert found is out
    return found.tolist()


@BOTH
@pytest.mark.parametrize("n_vocab", SIZES)
@pytest.mark.parametrize("n_rows", [1, 3, 17])
def test_the_highest_logit_wins(n_rows, n_vocab, function, device):
    logits = torch.randn(n_rows, n_vocab, device=device)
    assert compute(function, logits) == [max(range(n_vocab), key=row.__getitem__) for row in logits.tolist()]


@BOTH
@pytest.mark.parametrize("ids", [(0, 9_999), (4095, 4096), (5, 4101), (7, 8, 9)], ids=str)
def test_the_first_of_equal_logits_wins(ids, function, device):
    logits = torch.full((1, 10_003), -2.0, device=device)
    logits[0, list(ids)] = -1
    assert compute(function, logits) == [ids[0]]


@BOTH
def test_rows_without_a_finite_highest_logit_or_with_nan_give_no_token(function, device):
    logits = torch.randn(7, 5000, device=device)
    logits[0, 4999] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    logits[3] = torch.nan
    logits[4, :4990] = -torch.inf  # masked
    logits[5, 0], logits[5, 77] = torch.nan, torch.inf
    found = compute(function, logits)
    assert found[:4] == [-1] * 4
    assert found[4] == logits[4].argmax()
    assert found[5:] == [-1, logits[6].argmax()]


@BOTH
def test_ids_are_kept_in_the_slots_of_their_rows_and_nowhere_else(function, device):
    logits = torch.randn(4, 30, device=device)
    logits[3, 2] = torch.nan
    pool = torch.arange(100, 106, device=device)
    slots = torch.tensor([4, -1, 0, 2], dtype=torch.int32, device=device)
    ids = compute(function, logits, (slots, pool))
    assert pool.tolist() == [ids[2], 101, -1, 103, ids[0], 105]
