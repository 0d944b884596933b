"""How long a text can be and still fit the model's context: longer ones are refused before they are tokenised."""

from collections.abc import Iterable

from llava.errors import ContextError
from llava.preprocess.tokenizer import Tokenizer

_SHORTENED = 4  # a tokenizer may first join characters, such as a letter and its accents


class TextLimit:
    """Tokenising takes seconds and gigabytes for millions of characters. A length in characters takes nothing."""

    def __init__(self, tokenizer: Tokenizer, context: int):
        """context: in tokens."""
        longest = max(len(tokenizer.piece(id)) for id in range(tokenizer.size))  # bytes
        self._context, self.max_chars = context, _SHORTENED * context * longest

    def check(self, texts: Iterable[str]) -> None:
        """Raises ContextError if the texts, which are in one prompt, cannot fit."""
        n_chars = sum(map(len, texts))
        if n_chars > self.max_chars:
            raise ContextError(
                f"the prompt has {n_chars} characters, more than fit the model's context of {self._context} tokens: "
                "shorten the prompt"
            )
