"""Explanations of a reply: for each of its tokens, how much it looks at each part of each picture."""

from typing import Any

from llava.engine.adapters import Variant
from llava.engine.capture import Capture
from llava.engine.reply import Output
from llava.errors import ConfigError
from llava.explain.attention import Focus
from llava.explain.maps import attention_map
from llava.preprocess.inputs import ModelInput
from llava.serve.errors import ApiError
from llava.serve.limits import Limits
from llava.serve.schema import ExplainRequest

_DIGITS = 6


def capture(request: ExplainRequest, input: ModelInput, variant: Variant, limits: Limits) -> Capture:
    """Returns what to capture. Raises ApiError if layers or heads do not exist, or the maps become too large."""
    config = variant.model.config.decoder
    focus = _focus(request, variant)
    n_image_tokens = variant.preprocessor.n_image_tokens(input)
    n_new = min(request.max_new_tokens, config.max_seq - len(input.ids))
    if n_new * n_image_tokens > limits.map_values:
        at_most = max(1, limits.map_values // n_image_tokens)
        raise ApiError(400, f"the maps become too large; set max_tokens to at most {at_most}", param="max_tokens")
    if _captured_bytes(focus, len(input.ids), n_new, n_image_tokens) > limits.map_bytes:
        raise ApiError(400, "the attention takes too much memory; ask for fewer layers", param="layers")
    return focus.capture()


def explanation(request: ExplainRequest, input: ModelInput, variant: Variant, last: Output) -> dict[str, Any]:
    """Returns the answer's tokens, the pictures with the boxes of their tokens, and the maps: token x picture x box.

    A map has a share of the attention for each box. The rest goes to text and to the padding around a picture.
    """
    assert last.reply
    assert last.captured
    reply, tokenizer = last.reply, variant.preprocessor.tokenizer
    found = attention_map(reply, last.captured, input, variant.model.config, tokenizer, _focus(request, variant))
    shares = [picture.shares.tolist() for picture in found.pictures]
    pieces = [tokenizer.piece(id) for id in reply.token_ids]
    return {
        "prompt": input.prompt,
        "answer": reply.text,
        "finish_reason": reply.finish_reason,
        "tokens": [
            {"id": id, "text": piece.decode(errors="replace"), "bytes": list(piece)}
            for id, piece in zip(reply.token_ids, pieces, strict=True)
        ],
        "pictures": [
            {"width": w, "height": h, "boxes": [[round(x, 2) for x in box] for box in picture.boxes]}
            for picture in found.pictures
            for w, h in [picture.size]
        ],
        "maps": [[[round(x, _DIGITS) for x in own[i]] for own in shares] for i in range(len(pieces))],
        "timings": {
            "prepare_s": reply.timings.prepare_s,
            "queue_s": reply.timings.queue_s,
            "first_token_s": reply.timings.first_token_s,
            "decode_s": reply.timings.decode_s,
        },
    }


def _focus(request: ExplainRequest, variant: Variant) -> Focus:
    layers, heads = (None if one is None else tuple(one) for one in (request.layers, request.heads))
    try:
        return Focus(layers=layers, heads=heads, rollout=bool(request.rollout)).resolved(variant.model.config.decoder)
    except ConfigError as error:
        raise ApiError(400, str(error), param=str(error).split(":")[0]) from None


def _captured_bytes(focus: Focus, n_prompt: int, n_new: int, n_image_tokens: int) -> int:
    assert focus.layers is not None
    total = n_prompt + n_new
    return 4 * len(focus.layers) * (total * total if focus.rollout else n_new * n_image_tokens)
