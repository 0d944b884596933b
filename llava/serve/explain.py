"""Explanations of a reply: for each of its tokens, how much it looks at each part of each picture.

S tokens of prompt and reply   N tokens of the reply   T image tokens
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava.engine.adapters import Variant
from llava.engine.capture import Capture, Captured
from llava.engine.reply import Output
from llava.preprocess.boxes import token_boxes
from llava.preprocess.inputs import ModelInput
from llava.serve.errors import ApiError
from llava.serve.limits import Limits
from llava.serve.schema import ExplainRequest

_DIGITS = 6


def capture(request: ExplainRequest, input: ModelInput, variant: Variant, limits: Limits) -> Capture:
    """Returns what to capture. Raises ApiError if layers or heads do not exist, or the maps become too large."""
    config = variant.model.config.decoder
    layers = _checked("layers", request.layers, config.n_layers)
    heads = None if request.heads is None else _checked("heads", request.heads, config.n_heads)
    n_image_tokens = variant.preprocessor.n_image_tokens(input)
    n_new = min(request.max_new_tokens, config.max_seq - len(input.ids))
    if n_new * n_image_tokens > limits.map_values:
        at_most = max(1, limits.map_values // n_image_tokens)
        raise ApiError(400, f"the maps become too large; set max_tokens to at most {at_most}", param="max_tokens")
    if _captured_bytes(request, len(layers), len(input.ids), n_new, n_image_tokens) > limits.map_bytes:
        raise ApiError(400, "the attention takes too much memory; ask for fewer layers", param="layers")
    return Capture(
        attention=layers,
        heads=heads,
        mean_heads=True,
        first_query=0 if request.rollout else -1,
        images_only=not request.rollout,
    )


def explanation(request: ExplainRequest, input: ModelInput, variant: Variant, last: Output) -> dict[str, Any]:
    """Returns the answer's tokens, the pictures with the boxes of their tokens, and the maps: token x picture x box.

    A map has a share of the attention for each box. The rest goes to text and to the padding around a picture.
    """
    assert last.reply
    assert last.captured
    reply, tokenizer = last.reply, variant.preprocessor.tokenizer
    pieces = [tokenizer.piece(id) for id in reply.token_ids]
    layers = _checked("layers", request.layers, variant.model.config.decoder.n_layers)
    n_prompt = len(input.ids)
    shares = _rollout(last.captured, layers, n_prompt) if request.rollout else _mean(last.captured, layers)
    boxes = _boxes(input, variant)
    per_picture = shares[: len(pieces)].split([len(image) for image in last.captured.images], dim=1)
    kept = [[i for i, box in enumerate(one) if box] for one in boxes]
    maps = [part[:, index].tolist() for part, index in zip(per_picture, kept, strict=True)]
    return {
        "prompt": input.prompt,
        "answer": reply.text,
        "finish_reason": reply.finish_reason,
        "tokens": [
            {"id": id, "text": piece.decode(errors="replace"), "bytes": list(piece)}
            for id, piece in zip(reply.token_ids, pieces, strict=True)
        ],
        "pictures": [
            {"width": w, "height": h, "boxes": [[round(x, 2) for x in box] for box in own if box]}
            for (w, h), own in zip(input.image_sizes, boxes, strict=True)
        ],
        "maps": [[[round(x, _DIGITS) for x in part[i]] for part in maps] for i in range(len(pieces))],
        "timings": {
            "prepare_s": reply.timings.prepare_s,
            "queue_s": reply.timings.queue_s,
            "first_token_s": reply.timings.first_token_s,
            "decode_s": reply.timings.decode_s,
        },
    }


def _checked(name: str, numbers: Sequence[int] | None, n: int) -> tuple[int, ...]:
    if numbers is None:
        return tuple(range(n))
    if not numbers or len(set(numbers)) < len(numbers) or not all(0 <= number < n for number in numbers):
        raise ApiError(400, f"{name}: expected different numbers from 0 to {n - 1}", param=name)
    return tuple(sorted(numbers))


def _captured_bytes(request: ExplainRequest, n_layers: int, n_prompt: int, n_new: int, n_image_tokens: int) -> int:
    total = n_prompt + n_new
    return 4 * n_layers * (total * total if request.rollout else n_new * n_image_tokens)


def _boxes(input: ModelInput, variant: Variant) -> list[Any]:
    """Returns the boxes of the tokens of each picture."""
    vision, image = variant.model.config.vision, variant.model.config.image
    pairs = zip(input.image_sizes, input.grids, strict=True)
    return [token_boxes(size, image, vision.grid, grid, vision.n_features) for size, grid in pairs if vision and image]


def _mean(captured: Captured, layers: Sequence[int]) -> Tensor:
    """Returns the mean attention to image tokens [N, T] of the tokens from which those of the reply are predicted."""
    return torch.stack([captured.probabilities(layer)[0] for layer in layers]).mean(0)


def _rollout(captured: Captured, layers: Sequence[int], n_prompt: int) -> Tensor:
    """Returns the attention [N, T] followed through the layers, half of which passes each by (arXiv:2005.00928)."""
    n = captured.probabilities(layers[0]).shape[-1]
    followed = torch.eye(n)
    for layer in layers:
        followed = (captured.probabilities(layer)[0] @ followed + followed) / 2
    tokens = [i for image in captured.images for i in image]
    return followed[n_prompt - 1 :, tokens]
