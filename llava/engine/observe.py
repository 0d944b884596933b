"""Records what a request asks for besides its reply: hidden states, attention, log-probabilities of its prompt.

S new tokens   D dim   V vocabulary size   H heads   T tokens attended to
"""

import torch
from torch import Tensor

from llava.engine.scheduler import Scheduled
from llava.model.decoder import Decoder

_ROWS = 256  # tokens whose logits are computed at a time


def record_states(one: Scheduled, layer: int, states: Tensor) -> None:
    """Records the states [S, D] of a sequence's new tokens, if it asks for those of this layer."""
    capture = one.sequence.capture
    if capture and layer in capture.hidden_states:
        one.sequence.captured.states.setdefault(layer, []).append(states.cpu())


def record_attention(one: Scheduled, block: int, probabilities: Tensor) -> None:
    """Records the attention probabilities [H, S, T] of a sequence's new tokens, if it asks for those of this block."""
    capture = one.sequence.capture
    if capture and block in capture.attention:
        skipped = max(0, capture.first_query - one.sequence.computed)
        if skipped < one.n_tokens:
            one.sequence.captured.attention.setdefault(block, []).append(probabilities[:, skipped:].cpu())


def record_prompt_logprobs(one: Scheduled, states: Tensor, decoder: Decoder) -> None:
    """Records the log-probabilities of the prompt's tokens, from the states [S, D] of the tokens before them."""
    sequence, n = one.sequence, one.sequence.params.prompt_logprobs
    following = sequence.tokens[sequence.computed + 1 : min(sequence.computed + 1 + one.n_tokens, sequence.n_prompt)]
    for i in range(0, len(following), _ROWS):
        ids = torch.tensor(following[i : i + _ROWS], device=states.device)
        logprobs = decoder.logits(states[i : i + len(ids)]).log_softmax(-1)
        own = logprobs.gather(1, ids.clamp(min=0)[:, None])[:, 0].tolist()
        values, top = logprobs.topk(min(n, logprobs.shape[-1]))
        for id, value, likely in zip(ids.tolist(), own, zip(top.tolist(), values.tolist(), strict=True), strict=True):
            is_text = id >= 0
            sequence.prompt_logprobs.append(value if is_text else None)
            sequence.prompt_top_logprobs.append(dict(zip(*likely, strict=True)) if is_text else None)
