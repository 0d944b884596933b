"""Draws the next tokens from the logits of a step. The host reads them later, when the device has computed them.

B sequences   V vocabulary size
"""

from collections.abc import Iterator
from collections.abc import Sequence as Rest
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from llava.engine.beam import BeamSearch
from llava.engine.sampling import GREEDY_BELOW, log_softmax, process, sample, top_logprobs
from llava.engine.sequence import Beams, Sequence
from llava.model.staging import to_device, to_host


class Logits(NamedTuple):
    """Logits of the token after each of some sequences."""

    sequences: Rest[Sequence]
    values: Tensor  # [B, V] float32
    highest: Tensor | None = None  # int64 [B], the ids of the highest logits, if they are known
    in_pool: bool = False  # whether these ids are in the token pool


@dataclass(frozen=True, eq=False, kw_only=True)
class Token:
    """A token drawn for a sequence."""

    sequence: Sequence
    id: int  # -1: no token can be drawn
    logprob: float = 0.0  # if the request asks for log-probabilities
    top: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Drawn:
    """The next tokens of some sequences, on their way to the host."""

    sequences: Rest[Sequence]
    epochs: Rest[int]  # of the sequences when their tokens were drawn
    ids: Tensor  # int64 [B] on the device
    on_host: Rest[Tensor]  # ids; with log-probabilities also those of the ids, and the highest [B, n] with their ids
    ready: torch.cuda.Event | None  # when `on_host` has its values; None: it has

    @classmethod
    def of(cls, sequences: Rest[Sequence], ids: Tensor, logits: Tensor | None = None) -> "Drawn":
        """Starts to copy ids [B] to the host, and their log-probabilities if a request asks for them.

        logits: [B, V], what the ids were drawn from; needed only for log-probabilities.
        """
        found = [ids]
        if n := max(sequence.params.logprobs for sequence in sequences):
            assert logits is not None
            found += top_logprobs(logits, ids, n)
        on_host = [to_host(x) for x in found]
        ready = None
        if ids.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(ids.device))
        return cls(sequences=sequences, epochs=[one.epoch for one in sequences], ids=ids, on_host=on_host, ready=ready)

    def read(self) -> Iterator["Token"]:
        """Waits for the device and yields the tokens, except those of sequences that have dropped them."""
        if self.ready:
            self.ready.synchronize()
        ids, *found = (x.tolist() for x in self.on_host)
        for i, sequence in enumerate(self.sequences):
            if sequence.epoch != self.epochs[i]:
                continue
            k = sequence.params.logprobs
            if not k:
                yield Token(sequence=sequence, id=ids[i])
                continue
            own, likely, likely_ids = (values[i] for values in found)
            top = dict(zip(likely_ids[:k], likely[:k], strict=True))
            yield Token(sequence=sequence, id=ids[i], logprob=own, top=top)


@torch.inference_mode()
def draw(logits: Logits) -> Drawn | None:
    """Draws the next token of each sequence. For beams, records the log-probabilities [V] instead."""
    kinds = [_kind(sequence) for sequence in logits.sequences]
    for i, sequence in enumerate(logits.sequences):
        if kinds[i] == "beam":
            logprobs = process(log_softmax(logits.values[i])[None], [sequence])[0]
            _beams(sequence).logprobs[sequence.id] = logprobs
    sampled = [i for i, kind in enumerate(kinds) if kind == "sample"]
    if not sampled:
        return None
    sequences, values = [logits.sequences[i] for i in sampled], logits.values
    if len(sampled) < len(kinds):
        values = values.index_select(0, to_device(sampled, torch.int64, values.device))
    if logits.highest is not None and all(map(is_greedy, logits.sequences)):
        return Drawn.of(sequences, logits.highest, values)
    return Drawn.of(sequences, sample(values, sequences), values)


def is_greedy(sequence: Sequence) -> bool:
    """Returns whether the next token of a sequence is that of the highest logit."""
    params = sequence.params
    return _kind(sequence) == "sample" and params.temperature < GREEDY_BELOW and not params.changes_logits


def _kind(sequence: Sequence) -> str:
    if sequence.max_new_tokens == 0:
        return "nothing"
    return "beam" if sequence.params.num_beams > 1 else "sample"


def _beams(sequence: Sequence) -> Beams:
    if sequence.beams is None:
        search = BeamSearch(sequence.params.num_beams, sequence.stop_ids, sequence.max_new_tokens)
        sequence.beams = Beams(search=search, leader=sequence, live=[sequence])
    return sequence.beams
