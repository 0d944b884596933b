"""Image placeholders in text: `<image>` marks the position of an image, and `\\<image>` is the literal text `<image>`.

All text from message to prompt is in this notation. Only when a prompt is encoded are the backslashes removed.
"""

import re
from typing import NamedTuple

from llava.config import IMAGE_PLACEHOLDER

_LITERAL = "\\" + IMAGE_PLACEHOLDER
_PLACEHOLDER = re.compile(rf"(?<!\\){IMAGE_PLACEHOLDER}")
_PLACEHOLDER_BYTES = re.compile(_PLACEHOLDER.pattern.encode())
_ESCAPE = re.compile(rf"\\(?={IMAGE_PLACEHOLDER})".encode())  # the backslash of a literal placeholder


class Stretch(NamedTuple):
    """The literal text between two placeholders."""

    text: str
    flags: bytes  # one byte for each UTF-8 byte of the text


def count(text: str) -> int:
    """Returns the number of placeholders in a text."""
    return len(_PLACEHOLDER.findall(text))


def has_literal(text: str) -> bool:
    """Whether a text contains the escaped form of a placeholder."""
    return _LITERAL in text


def escape(text: str) -> str:
    """Returns the text with every placeholder made literal."""
    return _PLACEHOLDER.sub(lambda _: _LITERAL, text)


def literal(text: str) -> str:
    """Returns the notation of a text in which everything is literal, backslashes before `<image>` included."""
    return text.replace(IMAGE_PLACEHOLDER, _LITERAL)


def replace(text: str, new: str) -> str:
    """Returns the text with `new` in place of every placeholder."""
    return _PLACEHOLDER.sub(lambda _: new, text)


def remove(text: str) -> str:
    """Returns the text without placeholders. One that arises only from joining the rest is made literal."""
    return escape(replace(text, ""))


def split(text: str, flags: bytes) -> list[Stretch]:
    """Splits a text at its placeholders, and removes the backslashes of literal ones.

    flags: one byte for each UTF-8 byte of the text. Raises UnicodeEncodeError if the text contains a surrogate.
    """
    data, stretches, start = text.encode(), list[Stretch](), 0
    for end, next_start in [*(match.span() for match in _PLACEHOLDER_BYTES.finditer(data)), (len(data), len(data))]:
        stretches.append(_unescape(data[start:end], flags[start:end]))
        start = next_start
    return stretches


def _unescape(data: bytes, flags: bytes) -> Stretch:
    kept = bytearray(flags)
    for backslash in reversed([*_ESCAPE.finditer(data)]):
        del kept[backslash.start()]
    return Stretch(_ESCAPE.sub(b"", data).decode(), bytes(kept))
