"""Lazy tensors that combine others."""

import pytest
import torch

from llava.errors import CheckpointError
from llava.tensors.lazy import InMemory, WithRows


def table(n_rows: int, value: float) -> InMemory:
    return InMemory(tensor=torch.full((n_rows, 3), value), origin=f"{n_rows} rows")


@pytest.mark.parametrize("first", [0, 2, 3, 4])
def test_rows_overwrite_or_extend_a_table(first: int) -> None:
    found = WithRows(table(4, 1.0), table(2, 2.0), first)
    expected = torch.ones(max(4, first + 2), 3)
    expected[first : first + 2] = 2
    assert found.shape == tuple(expected.shape)
    assert torch.equal(found.read(), expected)
    assert torch.equal(torch.cat([*found.chunks()]), expected)


def test_rows_that_would_leave_a_gap_are_refused() -> None:
    """The rows in the gap would have no values."""
    with pytest.raises(CheckpointError, match="has 4 rows, so none can be written at row 5"):
        WithRows(table(4, 1.0), table(2, 2.0), 5)
