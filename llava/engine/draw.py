"""Draws the next tokens from the logits of a step.

V vocabulary size
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from llava.engine.beam import BeamSearch
from llava.engine.runner import Logits
from llava.engine.sampling import log_softmax, process, sample, top_logprobs
from llava.engine.sequence import Beams, Sequence


@dataclass(frozen=True, eq=False, kw_only=True)
class Token:
    """A token drawn for a sequence."""

    sequence: Sequence
    id: int  # -1: no token can be drawn
    logprob: float = 0.0  # if the request asks for log-probabilities
    top: dict[int, float] = field(default_factory=dict)


@torch.inference_mode()
def draw(logits: Logits) -> list[Token]:
    """Draws the next token of each sequence. For beams, records the log-probabilities [V] instead."""
    kinds = [_kind(sequence) for sequence in logits.sequences]
    for sequence, kind, values in zip(logits.sequences, kinds, logits.values, strict=True):
        if kind == "beam":
            logprobs = process(log_softmax(values)[None], [sequence])[0]
            _beams(sequence).logprobs[sequence.id] = logprobs
    sampled = [i for i, kind in enumerate(kinds) if kind == "sample"]
    if not sampled:
        return []
    values = logits.values if len(sampled) == len(kinds) else logits.values[sampled]
    return list(_sampled([logits.sequences[i] for i in sampled], values))


def _kind(sequence: Sequence) -> str:
    if sequence.max_new_tokens == 0:
        return "nothing"
    return "beam" if sequence.params.num_beams > 1 else "sample"


def _beams(sequence: Sequence) -> Beams:
    if sequence.beams is None:
        search = BeamSearch(sequence.params.num_beams, sequence.stop_ids, sequence.max_new_tokens)
        sequence.beams = Beams(search=search, leader=sequence, live=[sequence])
    return sequence.beams


def _sampled(sequences: list[Sequence], values: torch.Tensor) -> Iterator[Token]:
    chosen = sample(values, sequences)
    ids: list[int] = chosen.tolist()
    n = max(sequence.params.logprobs for sequence in sequences)
    if not n:
        yield from (Token(sequence=one, id=id) for one, id in zip(sequences, ids, strict=True))
        return
    own, likely, likely_ids = (x.tolist() for x in top_logprobs(values, chosen.clamp(min=0), n))
    for i, (sequence, id) in enumerate(zip(sequences, ids, strict=True)):
        k = sequence.params.logprobs
        top = dict(zip(likely_ids[i][:k], likely[i][:k], strict=True))
        yield Token(sequence=sequence, id=id, logprob=own[i], top=top)
