"""Messages of clients in our own form."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llava.preprocess.image import Preprocessed
from llava.serve.schema import ImagePart, Message


def texts(messages: Sequence[Message]) -> Iterator[str]:
    """Yields all texts."""
    for message in messages:
        if isinstance(message.content, str):
            yield message.content
        yield from (part.text for part in _parts(message) if not isinstance(part, ImagePart))


def picture_urls(messages: Sequence[Message]) -> list[str]:
    """Returns the address of each picture, in order."""
    return [part.image_url.url for one in messages for part in _parts(one) if isinstance(part, ImagePart)]


def with_pictures(messages: Sequence[Message], pictures: Iterable[Preprocessed]) -> list[dict[str, Any]]:
    """Returns the messages in our own form. pictures: those of all messages, in order."""
    left = iter(pictures)
    return [_message(one, left) for one in messages]


def _message(message: Message, pictures: Iterator[Preprocessed]) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, ImagePart):
            parts.append({"type": "image", "image": next(pictures)})
        else:
            parts.append({"type": "text", "text": part.text})
    return {"role": role, "content": parts}


def _parts(message: Message) -> Sequence[Any]:
    return message.content if isinstance(message.content, list) else ()
