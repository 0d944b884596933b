"""The most likely token of each row, in one kernel.

B rows   V vocabulary size
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.kernels.support import can_run, gdc_launch_dependents, gdc_wait, jit, launch_options, tl

_BLOCK = 4096


@jit
def greedy_kernel(
    logits_ptr, out_ptr, slot_ptr, pool_ptr, V: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """One row per program."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32)
    is_nan = tl.zeros([BLOCK], tl.int32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for start in range(0, V, BLOCK):
        id = start + at
        x = tl.load(logits_ptr + row * V + id, mask=id < V, other=float("-inf"))
        is_nan = tl.where(x != x, 1, is_nan)
        better = x > best  # the first of equal logits wins
        best = tl.where(better, x, best)
        best_id = tl.where(better, id, best_id)
    highest = tl.max(best, 0)
    id = tl.min(tl.where(best == highest, best_id, V), 0)
    finite = (tl.max(is_nan, 0) == 0) & (tl.abs(highest) < float("inf"))
    id = tl.where(finite, id, -1).to(tl.int64)
    tl.store(out_ptr + row, id)
    if KEEP:
        slot = tl.load(slot_ptr + row)
        tl.store(pool_ptr + slot, id, mask=slot >= 0)


def greedy(logits: Tensor, out: Tensor | None = None, keep: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """logits [B, V] float32 -> ids [B] int64 of the highest logits; -1 if that is not finite or any logit is NaN.

    keep: slots [B] int32 and a token pool int64 [n], into whose slots the ids are written as well; slot -1: nowhere.
    """
    n_rows, vocab_size = logits.shape
    out = torch.empty(n_rows, dtype=torch.int64, device=logits.device) if out is None else out
    if not can_run(logits.device):
        return eager_greedy(logits, out, keep)
    slots, pool = keep or (out, out)
    options = launch_options(logits.device, num_warps=16)
    greedy_kernel[(n_rows,)](logits, out, slots, pool, vocab_size, _BLOCK, keep is not None, **options)
    return out


def eager_greedy(logits: Tensor, out: Tensor, keep: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The twin of `greedy`."""
    highest, ids = logits.max(-1)
    out.copy_(ids.masked_fill(~highest.isfinite(), -1))
    if keep:
        slots, pool = keep
        live = slots >= 0
        pool[slots[live].long()] = out[live]
    return out
