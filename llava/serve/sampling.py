"""Generation options of clients as those of the engine."""

import math
from collections.abc import Mapping
from dataclasses import replace

from llava.engine.sampling_params import SamplingParams
from llava.serve.errors import ApiError
from llava.serve.schema import Sampling

_SEEDS = 2**63
_BIAS = 100.0  # largest absolute value, as in OpenAI's API
_MIN_TOP_P = 1e-9  # 0 is valid in OpenAI's API; it selects the most likely token


def sampling_params(request: Sampling, *, vocab_size: int, max_new_tokens: int) -> SamplingParams:
    """Returns the engine's options. vocab_size: rows of the embedding table. Raises ApiError."""
    top_p = None if request.top_p is None or request.top_p >= 1 else max(request.top_p, _MIN_TOP_P)
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=top_p,
        top_k=request.top_k if request.top_k and request.top_k > 0 else None,
        min_p=request.min_p,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_logit_bias(request.logit_bias or {}, vocab_size),
        seed=None if request.seed is None else request.seed % _SEEDS,
        stop=tuple(request.stops),
    )


def with_own_seed(params: SamplingParams, index: int) -> SamplingParams:
    """Choices with a seed differ from each other, and are the same in the next request."""
    return params if params.seed is None or not index else replace(params, seed=(params.seed + index) % _SEEDS)


def _logit_bias(bias: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    found = {}
    for id, value in bias.items():
        if not (id.isdecimal() and id.isascii() and len(id) < 10 and int(id) < vocab_size):
            message = f"logit_bias: expected token ids from 0 to {vocab_size - 1} as keys"
            raise ApiError(400, message, param="logit_bias")
        if not (math.isfinite(value) and abs(value) <= _BIAS):
            raise ApiError(400, f"logit_bias: expected values from {-_BIAS:g} to {_BIAS:g}", param="logit_bias")
        found[int(id)] = value
    return found
