"""Structured output: masks that make a reply match a JSON schema, by llguidance.

V vocabulary size
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llava.preprocess.tokenizer import Tokenizer
from llava.serve.errors import ApiError
from llava.serve.limits import Limits
from llava.serve.schema import ResponseFormat

_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as in most texts
ANY_OBJECT: dict[str, Any] = {"type": "object"}
Mask = Callable[[Sequence[int]], Tensor]  # ids of the reply so far -> allowed [V], bool


class Grammars:
    """Makes masks for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """vocab_size: rows of the embedding table, which may be more than the tokenizer has ids.

        Raises ApiError if llguidance is not installed, or the tokenizer has no token that ends a reply.
        """
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            message = "this server cannot produce structured output: llguidance is not installed"
            raise ApiError(400, message, param="response_format") from None
        if tokenizer.eos_id is None:
            message = "this model has no token that ends a reply, so it cannot produce structured output"
            raise ApiError(400, message, param="response_format")
        self._vocab_size, self._eos = vocab_size, tokenizer.eos_id
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Pieces(tokenizer, vocab_size)))

    def masks(self, format: ResponseFormat, limits: Limits, n: int) -> Sequence[Mask]:
        """Returns the masks of `n` choices, whose replies are JSON. Raises ApiError if the schema cannot be used.

        format: one that its own `check` has passed.
        """
        schema = format.json_schema.json_schema if format.json_schema else ANY_OBJECT
        try:
            text = json.dumps(schema, allow_nan=False)
        except (ValueError, RecursionError):
            raise _invalid() from None
        if len(text) > limits.schema_bytes:
            message = f"response_format: the schema has more than {limits.schema_bytes} bytes; use a smaller one"
            raise ApiError(400, message, param="response_format")
        matcher = _compile(self._tokenizer, text)
        return [_Grammar(matcher.deep_copy(), self._vocab_size, self._eos) for _ in range(n)]


class _Pieces:
    """The tokenizer in the form that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        ids = (tokenizer.id_of(text) for text in tokenizer.added_texts)
        self.special_token_ids = sorted({*tokenizer.special, *(id for id in ids if id is not None)})
        self.tokens = [tokenizer.piece(id) for id in range(vocab_size)]

    def __call__(self, text: bytes) -> list[int]:
        """Returns the ids of a text within a reply: without the space that Llama's tokenizers put before a text."""
        tokens = self._tokenizer.encode_tokens("\n" + text.decode())
        if any(token.start == 1 for token in tokens) or not text:
            return [token.id for token in tokens if token.start >= 1]
        return [token.id for token in self._tokenizer.encode_tokens(text.decode())]  # the line break was joined to it


def _compile(tokenizer: Any, schema: str) -> Any:
    """Returns a matcher at the start of a reply. Raises ApiError for a schema with which no reply can start."""
    from llguidance import LLMatcher

    try:
        grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides=_LAYOUT)
    except ValueError:  # lone surrogates, or nested too deeply
        raise _invalid() from None
    if LLMatcher.validate_grammar(grammar):
        raise _invalid()
    matcher = LLMatcher(tokenizer, grammar, log_level=0)  # its warnings would be lines on stderr
    if not any(matcher.compute_bitmask()):
        raise _too_complex()
    return matcher


def _invalid() -> ApiError:
    message = "response_format: the schema is invalid, or uses keywords that this server does not support"
    return ApiError(400, message, param="response_format")


def _too_complex() -> ApiError:
    return ApiError(400, "response_format: the schema is too complex; use a simpler one", param="response_format")


class _Grammar:
    """The tokens that a grammar allows after the ids of a reply."""

    def __init__(self, matcher: Any, vocab_size: int, eos: int):
        """matcher: at the start of a reply."""
        self._matcher = matcher
        self._ids: list[int] = []  # consumed by the matcher
        self._vocab_size, self._eos = vocab_size, eos

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """ids of the reply so far, which may be fewer than in the last call -> allowed [V], bool"""
        known = len(self._ids)
        if list(ids[:known]) != self._ids:  # the reply was computed again
            self._matcher.reset()
            self._ids, known = [], 0
        new = list(ids[known:])
        if new:
            self._matcher.consume_tokens(new)
            self._ids += new
        bitmask = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            raise _too_complex()
        bits = torch.frombuffer(bitmask, dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten()[: self._vocab_size]
        allowed = allowed.bool()
        if not allowed.any():  # the grammar is complete
            allowed[self._eos] = True
        return allowed
