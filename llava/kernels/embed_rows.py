"""Looks up the embeddings of the newest tokens of decoding rows, of which only the device may know the ids."""

from __future__ import annotations

from torch import Tensor

from llava.kernels.support import can_run, jit, next_power_of_2, tl


@jit
def embed_rows_kernel(id_ptr, slot_ptr, pool_ptr, weight_ptr, out_ptr, D: tl.constexpr, DP: tl.constexpr):
    """Looks up one row per program."""
    row = tl.program_id(0)
    id = tl.load(id_ptr + row).to(tl.int64)
    slot = tl.load(slot_ptr + row)
    drawn = tl.load(pool_ptr + slot, mask=slot >= 0, other=0)
    id = tl.maximum(tl.where(id < 0, drawn, id), 0)
    d = tl.arange(0, DP)
    x = tl.load(weight_ptr + id * D + d, mask=d < D, other=0.0)
    tl.store(out_ptr + row * D + d, x, mask=d < D)


def embed_rows(ids: Tensor, slots: Tensor, pool: Tensor, weight: Tensor) -> Tensor:
    """ids, slots [R] int32, pool int64 [n], weight [V, D] -> [R, D].

    A negative id stands for the id in the row's slot of the pool; if that is negative, too, the result means nothing.
    """
    if not can_run(weight.device):
        return eager_embed_rows(ids, slots, pool, weight)
    dim = weight.shape[1]
    out = weight.new_empty(len(ids), dim)
    embed_rows_kernel[(len(ids),)](ids, slots, pool, weight, out, dim, next_power_of_2(dim))
    return out


def eager_embed_rows(ids: Tensor, slots: Tensor, pool: Tensor, weight: Tensor) -> Tensor:
    """The twin of `embed_rows`."""
    drawn = pool[slots.long().clamp(min=0)]
    return weight[ids.where(ids >= 0, drawn).clamp(min=0)]
