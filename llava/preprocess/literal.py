"""Literal text: text of clients, in which added tokens such as `</s>` are ordinary text.

The tokenizer reads its added tokens by secret names, which only templates contain.
"""

import re
import secrets
from functools import cached_property

from llava.preprocess.tokenizer import Tokenizer

_EDGE = "\ufdd0"  # not a character, so no tokenizer joins it with the text beside it


class LiteralTokenizer:
    """Reads the added tokens of a tokenizer by secret names."""

    def __init__(self, tokenizer: Tokenizer):
        secret = secrets.token_hex(16)
        self._names = {text: f"{_EDGE}{secret}{i}{_EDGE}" for i, text in enumerate(tokenizer.added_texts)}
        self._texts = {name: text for text, name in self._names.items()}
        self._tokenizer = tokenizer

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer with the secret names. Raises CheckpointError if there cannot be one."""
        return self._tokenizer.with_renamed(self._names)

    def mark(self, text: str) -> str:
        """Replaces added tokens by their secret names."""
        return _replace(text, self._names)

    def unmark(self, text: str) -> str:
        """Replaces secret names by the added tokens."""
        return _replace(text, self._texts)


def _replace(text: str, names: dict[str, str]) -> str:
    if not names:
        return text
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(pattern, lambda found: names[found[0]], text)
