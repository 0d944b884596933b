"""The inputs of decoding rows: what a step needs to know about each, in one small tensor.

B rows   P pages
"""

from collections.abc import Sequence as Rest
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llava.engine.scheduler import Scheduled
from llava.engine.sequence import PENDING
from llava.kernels.attend import SHARED_ROWS

_MIN_SHARED = 64  # tokens; with fewer, reading them once saves less than another kernel costs


class Rows(NamedTuple):
    """The inputs of decoding rows, int32 on the device: views of one tensor, which takes one copy to fill."""

    flat: Tensor
    positions: Tensor  # [B], of the newest token; -1: the row only fills the batch
    ids: Tensor  # [B]; PENDING: the id is in the token pool
    slots: Tensor  # [B], in the token pool; -1: none
    shared: Tensor  # one for each group of rows: with how many tokens they begin alike; see `shared_prefix`
    tables: Tensor  # [B, P]

    @classmethod
    def of(cls, flat: Tensor, n_rows: int) -> "Rows":
        sizes = [n_rows, n_rows, n_rows, n_groups(n_rows)]
        positions, ids, slots, shared, tables = flat.split([*sizes, len(flat) - sum(sizes)])
        return cls(flat, positions, ids, slots, shared, tables.view(n_rows, -1))


def n_groups(n_rows: int) -> int:
    """Returns into how many groups rows are divided."""
    return -(-n_rows // SHARED_ROWS)


def row_values(
    scheduled: Rest[Scheduled], n_rows: int, n_pages: int, page_size: int | None
) -> tuple[NDArray[np.int32], bool]:
    """Returns the values of `Rows.flat` for n_rows rows of n_pages pages, and whether any rows begin alike.

    page_size: None: it does not matter whether they do.
    """
    start = 3 * n_rows + n_groups(n_rows)  # of the block tables
    values = np.zeros(start + n_rows * n_pages, dtype=np.int32)
    values[: 3 * n_rows] = -1
    tables = values[start:].reshape(n_rows, n_pages)
    for i, one in enumerate(scheduled):
        sequence = one.sequence
        values[i] = sequence.computed
        values[n_rows + i] = PENDING if sequence.n_in_flight else sequence.tokens[sequence.computed]
        values[2 * n_rows + i] = sequence.pool_slot
        tables[i, : len(sequence.block_table)] = sequence.block_table
    n = len(scheduled)
    if page_size is None or n < SHARED_ROWS:
        return values, False
    shared = shared_tokens(values[:n], tables[:n], n_groups(n_rows), page_size)
    values[3 * n_rows : start] = shared
    return values, bool(shared.any())


def shared_tokens(
    positions: NDArray[np.int32], tables: NDArray[np.int32], n_groups: int, page_size: int
) -> NDArray[np.int32]:
    """Returns with how many tokens the rows of each group begin alike, in whole pages; 0 if it is not worth a kernel.

    positions: [rows], tables: [rows, pages].
    """
    counts = np.zeros(n_groups, dtype=np.int32)
    for group in range(-(-len(positions) // SHARED_ROWS)):
        members = slice(group * SHARED_ROWS, (group + 1) * SHARED_ROWS)
        same = (tables[members] == tables[members][0]).all(0)
        n_pages = len(same) if same.all() else int(same.argmin())
        n = min(n_pages, int(positions[members].min()) // page_size) * page_size
        counts[group] = n if n >= _MIN_SHARED and len(positions[members]) > 1 else 0
    return counts
