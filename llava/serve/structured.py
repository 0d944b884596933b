"""Structured output: masks that make a reply match a JSON schema, by llguidance.

V vocabulary size
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llava.errors import LlavaError
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

    def mask(self, format: ResponseFormat | None, limits: Limits) -> Mask | None:
        """Returns the mask of a response format, or None for text. Raises ApiError if the schema cannot be used."""
        if format is None or format.type == "text":
            return None
        if format.type == "json_schema" and format.json_schema is None:
            raise ApiError(400, "response_format: json_schema is missing", param="response_format")
        schema = format.json_schema.json_schema if format.json_schema else ANY_OBJECT
        text = json.dumps(schema)
        if len(text) > limits.schema_bytes:
            message = f"response_format: the schema has more than {limits.schema_bytes} bytes; use a smaller one"
            raise ApiError(400, message, param="response_format")
        return _Grammar(self._tokenizer, _compile(text), self._vocab_size, self._eos)


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


def _compile(schema: str) -> str:
    from llguidance import LLMatcher

    grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides=_LAYOUT)
    if LLMatcher.validate_grammar(grammar):
        message = "response_format: the schema is invalid, or uses keywords that this server does not support"
        raise ApiError(400, message, param="response_format")
    return grammar


class _Grammar:
    """The tokens that a grammar allows after the ids of a reply."""

    def __init__(self, tokenizer: Any, grammar: str, vocab_size: int, eos: int):
        from llguidance import LLMatcher

        self._matcher = LLMatcher(tokenizer, grammar)
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
        if self._matcher.is_error():
            raise LlavaError("the grammar of the response format became too complex; use a simpler schema")
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten()[: self._vocab_size]
        allowed = allowed.bool()
        if not allowed.any():  # the grammar is complete, or gave up
            allowed[self._eos] = True
        return allowed
