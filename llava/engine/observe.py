"""Records what a request asks for besides its reply: hidden states, attention, log-probabilities of its prompt.

S new tokens   D dim   V vocabulary size   H heads   T tokens attended to
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.engine.sampling import log_softmax
from llava.engine.scheduler import Scheduled
from llava.model.decoder import Decoder

_ROWS = 256  # tokens whose logits are computed at a time


def record_states(one: Scheduled, layer: int, states: Tensor) -> None:
    """Records the states [S, D] of a sequence's new tokens, if it asks for those of this layer."""
    capture = one.sequence.capture
    if capture and layer in capture.hidden_states:
        pieces = one.sequence.captured.states.setdefault(layer, {})
        pieces[one.sequence.computed] = states.to("cpu", copy=True)  # a view would keep the whole batch in memory


def record_attention(one: Scheduled, block: int, probabilities: Callable[[], Tensor]) -> None:
    """Records the attention probabilities [H, S, T] of a sequence's watched tokens, if it asks for this block."""
    capture, captured = one.sequence.capture, one.sequence.captured
    if capture is None or block not in capture.attention:
        return
    p = probabilities()
    if capture.heads is not None:
        p = p[list(capture.heads)]
    if capture.mean_heads:
        p = p.mean(0, keepdim=True)
    if capture.images_only:
        tokens = [i for image in captured.images for i in image]
        missing = max(tokens, default=-1) + 1 - p.shape[-1]  # tokens of pictures that come later
        p = F.pad(p, (0, max(0, missing)))[..., tokens]
    captured.attention.setdefault(block, {})[one.sequence.computed] = p.to("cpu", copy=True)


def record_prompt_logprobs(one: Scheduled, states: Tensor, decoder: Decoder) -> None:
    """Records the log-probabilities of the prompt's tokens, from the states [S, D] of the tokens before them."""
    sequence, n = one.sequence, one.sequence.params.prompt_logprobs
    following = sequence.tokens[sequence.computed + 1 : min(sequence.computed + 1 + one.n_tokens, sequence.n_prompt)]
    index = sequence.computed  # the list starts with the second token
    for i in range(0, len(following), _ROWS):
        ids = torch.tensor(following[i : i + _ROWS], device=states.device)
        logprobs = log_softmax(decoder.logits(states[i : i + len(ids)]))
        own = logprobs.gather(1, ids.clamp(min=0)[:, None])[:, 0].tolist()
        values, top = logprobs.topk(min(n, logprobs.shape[-1]))
        for id, value, likely in zip(ids.tolist(), own, zip(top.tolist(), values.tolist(), strict=True), strict=True):
            if id >= 0:
                sequence.prompt_logprobs[index] = value
                sequence.prompt_top_logprobs[index] = dict(zip(*likely, strict=True))
            index += 1
