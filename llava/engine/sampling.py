"""Selects the next token of each row of a batch, by the row's own options.

The order of operations is that of transformers: repetition penalty (prompt and reply), presence and frequency
penalties (reply) together with logit_bias, logits_mask, temperature, top-k, top-p, min-p, draw. The filters find the
lowest logit that a row keeps; tokens tied with it are kept as well.

A draw depends on the logits and options of its row, its seed and the index of the token, never on the rest of the
batch. On the CPU and on a GPU, a row gives bit-identical results alone and in company, given equal logits. Nothing
here waits for the device.

B rows of the batch   R rows that an operation applies to   V vocabulary size   K most likely tokens looked at
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava.engine.sampling_params import SamplingParams
from llava.errors import ConfigError
from llava.model.staging import to_device

NOT_FINITE = (
    "the logits contain NaN or infinity; load with dtype=float32 (--dtype float32) if the model overflows in 16 bits, "
    "or look for NaN in its weights with: llava inspect --scan"
)
NONE_ALLOWED = "no token is allowed: logits_mask and logit_bias exclude the whole vocabulary, or the logits are NaN"
_MAX = torch.finfo(torch.float32).max
GREEDY_BELOW = 1e-5  # below this temperature, sampling is effectively greedy, and dividing the logits could overflow


class SamplingRow(Protocol):
    """What `sample` reads of a request. Ids outside of the vocabulary, such as image placeholders, are ignored."""

    @property
    def params(self) -> SamplingParams: ...
    @property
    def seed(self) -> int: ...  # from 0 to 2**63 - 1
    @property
    def n_generated(self) -> int: ...  # index in the reply of the token to be selected
    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def reply_ids(self) -> Sequence[int]: ...  # generated so far


class RowError(ConfigError):
    """The option of one row fails. The other rows can be sampled without it. row: its index in the batch."""

    def __init__(self, row: int, message: str):
        super().__init__(message)
        self.row = row


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Selects one id per row: logits [B, V] float32 -> ids [B] int64, on the same device.

    A row's id is -1 if its largest logit is not finite: the logits contain NaN or +inf, or no token is allowed.
    Raises RowError if a row's `logits_mask` fails.
    """
    logits = process(logits.detach(), rows)
    top, ids = logits.max(-1)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature >= GREEDY_BELOW]
    if drawn:
        chosen = _draw(_select(logits, drawn), _select(top, drawn), [rows[i] for i in drawn])
        ids = ids.index_copy(0, to_device(drawn, torch.int64, logits.device), chosen)
    return ids.masked_fill_(~top.isfinite(), -1)


def process(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Returns logits [B, V] after penalties, logit_bias and logits_mask: a new tensor, or the same if no row has any.

    Beam search applies this to log-probabilities, with one row per beam. Raises RowError as `sample` does.
    """
    if not any(row.params.changes_logits for row in rows):
        return logits
    divisors, changes = [_divisors(row) for row in rows], [_changes(row) for row in rows]
    masks = {i: _mask(i, row, logits.shape[-1]) for i, row in enumerate(rows) if row.params.logits_mask}
    if any(divisors):
        at, divisor = _entries(divisors, logits)
        hit = logits.flatten()[at]
        logits = _put(logits, at, torch.where(hit > 0, hit / divisor, hit * divisor))
    if any(changes):
        at, change = _entries(changes, logits)
        logits = _put(logits, at, logits.flatten()[at] + change)
    if masks:
        logits = logits.clone()
        for i, mask in masks.items():
            logits[i].masked_fill_(~to_device(mask, torch.bool, logits.device), -torch.inf)
    return logits


def log_softmax(logits: Tensor) -> Tensor:
    """logits [..., V] -> log-probabilities [..., V], whose bits do not depend on a row's index in the batch.

    PyTorch's kernel for GPUs adds in another order in rows that do not start at a multiple of 16 bytes; hence the
    padding.
    """
    n_vocab = logits.shape[-1]
    if logits.device.type == "cpu" or n_vocab % 4 == 0:
        return logits.log_softmax(-1)
    return F.pad(logits, (0, -n_vocab % 4), value=-torch.inf).log_softmax(-1)[..., :n_vocab]


def top_logprobs(logits: Tensor, chosen: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities before any option is applied, of the chosen ids [B] and of the n most likely tokens.

    logits [B, V] -> (those of the chosen ids [B], the n highest [B, n], their ids [B, n]); n is at most V. The values
    for a chosen id of -1 mean nothing.
    """
    logprobs = log_softmax(logits)
    values, ids = logprobs.topk(min(n, logits.shape[-1]))
    return logprobs.gather(1, chosen.clamp(min=0)[:, None])[:, 0], values, ids


def warp(logits: Tensor, top: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Applies temperature, top-k, top-p and min-p: logits [R, V], the highest of each row [R] -> a new tensor [R, V].

    The softmax of the result has the probabilities of a draw. Its highest value is 0; excluded tokens have -inf.
    """
    temperature = to_device([p.temperature for p in params], torch.float32, logits.device)
    scaled = (logits - top[:, None]).div_(temperature[:, None])
    lowest = _lowest_kept(logits, top, temperature, params)
    return scaled if lowest is None else torch.where(logits < lowest[:, None], -torch.inf, scaled)


def gumbel_noise(seed: Tensor, index: Tensor, n_vocab: int) -> Tensor:
    """Standard Gumbel noise [R, V] float32 for seeds [R] and indices of tokens [R], both int64.

    Noise is a function of seed, index and vocabulary row alone: two rounds of SplitMix64. The noise is -ln(-ln(1 - w))
    for a uniform w in 63 bits, rounded to the 24 bits of a float32 and kept from 2**-63 to 1 - 2**-24. It lies
    between -2.8 and 43.7, is exact in the upper tail, which decides a draw, and takes the lower limit with probability
    1e-7. A token can win over another that is up to e**46 times as likely.
    """
    key = _split_mix(seed, index)
    bits = _split_mix(key[:, None], torch.arange(n_vocab, device=seed.device))
    w = bits.bitwise_and_(2**63 - 1).float().clamp_(1, 2.0**63 - 2.0**39)
    return w.mul_(-(2.0**-63)).log1p_().neg_().log_().neg_()


def _split_mix(state: Tensor, n: Tensor) -> Tensor:
    """Output n of the SplitMix64 generator that starts at `state`. Steele et al., doi:10.1145/2714064.2660195."""
    z = state + (n + 1) * (0x9E3779B97F4A7C15 - 2**64)  # int64 arithmetic wraps around, like the original's uint64
    z ^= _shifted(z, 30)
    z *= 0xBF58476D1CE4E5B9 - 2**64
    z ^= _shifted(z, 27)
    z *= 0x94D049BB133111EB - 2**64
    z ^= _shifted(z, 31)
    return z


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shifts to the right and fills with zeros, where >> repeats the sign."""
    return (z >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _draw(logits: Tensor, top: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Draws ids [R] from logits [R, V] with the highest values top [R]: the Gumbel-max trick."""
    seeds, indices = [row.seed for row in rows], [row.n_generated for row in rows]
    seed, index = to_device([seeds, indices], torch.int64, logits.device)
    weights = warp(logits, top, [row.params for row in rows])
    return weights.add_(gumbel_noise(seed, index, logits.shape[-1])).argmax(-1)


def _lowest_kept(logits: Tensor, top: Tensor, temperature: Tensor, params: Sequence[SamplingParams]) -> Tensor | None:
    """Returns the lowest logit [R] that top-k, top-p and min-p keep, or None if no row has any of them."""
    n_vocab, device, lowest = logits.shape[-1], logits.device, None
    if any(p.min_p for p in params):
        margins = [p.temperature * math.log(p.min_p) if p.min_p else -math.inf for p in params]
        lowest = top + to_device(margins, torch.float32, device)
    narrow = [i for i, p in enumerate(params) if (p.top_k or n_vocab) < n_vocab or (p.top_p or 1) < 1]
    if narrow:
        logits, scale = _select(logits, narrow), _select(temperature, narrow)
        found = _lowest_ranked(logits, _select(top, narrow), scale, [params[i] for i in narrow])
        at = to_device(narrow, torch.int64, device)
        ranked = torch.full_like(top, -torch.inf).index_copy_(0, at, found)
        lowest = ranked if lowest is None else torch.maximum(lowest, ranked)
    return lowest


def _lowest_ranked(logits: Tensor, top: Tensor, temperature: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Returns the lowest logit [R] that top-k and top-p keep.

    Probabilities are summed as integers: float sums depend on the order of summation, which on a GPU depends on the
    number of rows.
    """
    n_vocab, device = logits.shape[-1], logits.device
    counts = [min(p.top_k or n_vocab, n_vocab) for p in params]
    ordered = _highest(logits, max(counts))  # [R, K]
    n_kept = to_device(counts, torch.int64, device)[:, None]
    if any((p.top_p or 1) < 1 for p in params):
        kept = torch.arange(ordered.shape[-1], device=device) < n_kept
        mass = ((ordered - top[:, None]) / temperature[:, None]).exp_().mul_(2.0**40).mul_(kept.float()).long()
        before = mass.cumsum(-1) - mass
        limits = [p.top_p if (p.top_p or 1) < 1 else 2 for p in params]  # 2: keep all, even those without mass
        limit = to_device(limits, torch.float32, device)[:, None] * mass.sum(-1, keepdim=True)
        n_kept = kept.logical_and_(before < limit.ceil().long()).sum(-1, keepdim=True).clamp_(min=1)
    return ordered.gather(1, n_kept - 1)[:, 0]


def _highest(logits: Tensor, n: int) -> Tensor:
    """Returns the n highest logits [R, n] of each row in descending order."""
    cpu = logits.device.type == "cpu"
    if n * (64 if cpu else 4) <= logits.shape[-1]:
        return logits.topk(n).values
    if cpu:  # numpy sorts rows 3 to 8 times as fast as torch
        return torch.from_numpy(np.sort(-logits.numpy())[:, :n]).neg_()
    return logits.sort(descending=True).values[:, :n]


def _divisors(row: SamplingRow) -> dict[int, float]:
    """Returns {id: repetition penalty} for the ids in the prompt and the reply."""
    penalty = row.params.repetition_penalty
    return dict.fromkeys(chain(row.prompt_ids, row.reply_ids), penalty) if penalty != 1 else {}


def _changes(row: SamplingRow) -> dict[int, float]:
    """Returns {id: what is added to its logit} for the bias and the presence and frequency penalties."""
    params = row.params
    changes = dict(params.logit_bias)
    if params.presence_penalty or params.frequency_penalty:
        for id, count in Counter(row.reply_ids).items():
            penalty = params.presence_penalty + params.frequency_penalty * count
            changes[id] = min(changes.get(id, 0) - penalty, _MAX)
    return changes


def _mask(index: int, row: SamplingRow, n_vocab: int) -> Tensor:
    """Returns the tokens [V] that a row's `logits_mask` allows. Raises RowError if it fails."""
    assert row.params.logits_mask
    try:
        mask = row.params.logits_mask(row.reply_ids)
    except Exception as error:  # the caller's own code, which must not end the other requests
        raise RowError(index, f"logits_mask failed: {type(error).__name__}: {error}") from error
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (n_vocab,):
        found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise RowError(index, f"logits_mask returned {found}; expected a tensor torch.bool [{n_vocab}]")
    return mask


def _entries(values: Sequence[Mapping[int, float]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turns one {id: value} per row into positions in the flattened logits and the values there."""
    n_rows, n_vocab = logits.shape
    sizes = [len(row) for row in values]
    ids = np.fromiter(chain.from_iterable(values), np.int64, sum(sizes))
    flat = np.fromiter(chain.from_iterable(row.values() for row in values), np.float64, sum(sizes))
    at = ids + np.repeat(np.arange(n_rows) * n_vocab, sizes)
    valid = (ids >= 0) & (ids < n_vocab)
    return to_device(at[valid], torch.int64, logits.device), to_device(flat[valid], torch.float32, logits.device)


def _put(logits: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """Returns a copy of the logits with these values, kept finite except for -inf, at flat positions."""
    return logits.flatten().index_copy(0, at, values.clamp_(max=_MAX)).view_as(logits)


def _select(x: Tensor, rows: list[int]) -> Tensor:
    """Returns these rows of x, without a copy if they are all."""
    return x if len(rows) == len(x) else x.index_select(0, to_device(rows, torch.int64, x.device))
