"""Beam search for one request, as in `generate(num_beams=k, do_sample=False)` of transformers 5.

A step extends each live beam by every token and ranks all of these candidates by their total log-probability. The best
`n_beams` that do not end stay live. Those that end become finished hypotheses if they are among the `n_beams` best
candidates of the step. Hypotheses are ranked by log-probability per token (`length_penalty=1`). The search stops when
`n_beams` are finished and the best live beam, at its present length, is no better than the worst of them
(`early_stopping=False`), or at `max_new_tokens`, where all candidates end.

V vocabulary size
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.engine.sampling import NONE_ALLOWED, NOT_FINITE
from llava.errors import LlavaError


@dataclass(frozen=True)
class _Beam:
    ids: list[int]
    score: float  # live: total log-probability; finished: log-probability per token, end token included


class BeamSearch:
    """The live beams and finished hypotheses of one request. The caller runs the model and reorders its cache."""

    def __init__(self, n_beams: int, stop_ids: Collection[int], max_new_tokens: int):
        self.n_beams, self.stop_ids, self.max_new_tokens = n_beams, frozenset(stop_ids), max_new_tokens
        self.finished = max_new_tokens == 0
        self._live = [_Beam([], 0.0)]  # at first, all beams are the same one
        self._ended: list[_Beam] = []  # best first

    @property
    def live(self) -> list[list[int]]:
        """The ids of each live beam, best first: as many as `advance` expects rows."""
        return [beam.ids for beam in self._live]

    def advance(self, logprobs: Tensor) -> list[tuple[int, int]]:
        """Extends the live beams by a token each: logprobs [n_live, V] float32, in their order -> the new live beams.

        logprobs: log_softmax of the logits, after `sampling.process`. Each new beam, best first, is (the index of the
        live beam that it continues, its new id). There are none after the last step. Raises LlavaError if
        log-probabilities are NaN, or if they allow no token before any hypothesis is finished.
        """
        assert not self.finished
        assert len(logprobs) == len(self._live)
        length = len(self._live[0].ids) + 1
        ended, live = list(self._ended), list[_Beam]()
        new: list[tuple[int, int]] = []
        for rank, (parent, id, score, per_token) in enumerate(self._candidates(logprobs, length)):
            ids = [*self._live[parent].ids, id]
            if id in self.stop_ids or length == self.max_new_tokens:
                if rank < self.n_beams:
                    ended.append(_Beam(ids, per_token))
            elif len(live) < self.n_beams:
                live.append(_Beam(ids, score))
                new.append((parent, id))
        self._ended = sorted(ended, key=lambda beam: -beam.score)[: self.n_beams]
        self.finished = not live or self._is_settled(live[0].score / length)
        if self.finished:
            return []
        self._live = live
        return new

    def best(self) -> list[int]:
        """The ids of the best hypothesis, with its end token if it has one; before any is finished, the best beam's."""
        return (self._ended or self._live)[0].ids

    def _candidates(self, logprobs: Tensor, length: int) -> list[tuple[int, int, float, float]]:
        """The best continuations, best first: (beam, id, log-probability, the same per token).

        There are enough that n_beams of them do not end, as each beam ends with at most every stop id.
        """
        scores = torch.tensor([beam.score for beam in self._live], dtype=torch.float32, device=logprobs.device)
        totals = (logprobs + scores[:, None]).flatten()
        n = self.n_beams * max(2, 1 + len(self.stop_ids))
        values, places = totals.topk(min(n, len(totals)))
        per_token = (values / length).tolist()
        found = zip(places.tolist(), values.tolist(), per_token, strict=True)
        candidates = [(*divmod(place, logprobs.shape[-1]), *both) for place, *both in found]
        if math.isnan(candidates[0][2]):
            raise LlavaError(NOT_FINITE)
        candidates = [c for c in candidates if c[2] > -math.inf]
        if not candidates and not self._ended:
            raise LlavaError(NONE_ALLOWED)
        return candidates

    def _is_settled(self, best_live: float) -> bool:
        """Whether no live beam, the best of which has this log-probability per token, can replace a hypothesis."""
        return len(self._ended) == self.n_beams and best_live <= self._ended[-1].score
