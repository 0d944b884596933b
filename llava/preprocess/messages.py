"""Reads messages: dictionaries with a role and text or parts, in the style of chat APIs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llava.config import IMAGE_PLACEHOLDER
from llava.errors import PromptError
from llava.preprocess import placeholders
from llava.preprocess.conversation import Turn
from llava.preprocess.image import Picture

Message = Mapping[str, Any]  # {"role": …, "content": text or a list of {"type": "text" | "image", …}}


class Conversation(NamedTuple):
    """The messages of a conversation as turns, with one placeholder for each image."""

    turns: list[Turn]
    pictures: list[Picture]
    system: str | None  # None: the template's own system message


def read_messages(
    messages: Sequence[Message], *, enclosing: tuple[str, str] | None = None, literal: bool = False
) -> Conversation:
    """Converts messages to turns with image placeholders. Adds an empty assistant turn after a final user turn.

    enclosing: texts before and after each placeholder. literal: placeholders in the messages are ordinary text.

    Raises PromptError if the messages are malformed.
    """
    turns: list[Turn] = []
    pictures: list[Picture] = []
    system = None
    for i, message in enumerate(messages):
        where = f"message {i + 1}"
        parsed = _parse(message, where)
        if literal:
            parsed = parsed._replace(text=placeholders.literal(parsed.text))
        if parsed.pictures and parsed.role != "user":
            raise PromptError(
                f"{where} is from the {parsed.role} and contains an image; only user messages can contain images"
            )
        text = _place(parsed)
        if parsed.role == "system":
            if i:
                raise PromptError(f"{where} is a system message; only the first message can be a system message")
            system = text
            continue
        if enclosing:
            text = placeholders.replace(text, IMAGE_PLACEHOLDER.join(enclosing))
        turns.append(Turn("user" if parsed.role == "user" else "assistant", text))
        pictures += parsed.pictures
    if not turns:
        raise PromptError("the conversation has no user message: add at least one")
    if turns[-1].role == "user":
        turns.append(Turn("assistant", None))
    return Conversation(turns, pictures, system)


class _Parsed(NamedTuple):
    role: str
    text: str
    pictures: list[Picture]
    pictures_first: bool  # whether all images stand before the text


def _parse(message: Message, where: str) -> _Parsed:
    """Returns the parts of one message. Raises PromptError if the message is malformed."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise PromptError(f"{where}: found {message!r:.60}; expected a dictionary with role and content")
    _refuse_unread(message, ("role", "content"), where)
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise PromptError(f"{where}: role is {role!r}; expected system, user or assistant")
    if isinstance(content, str):
        return _Parsed(role, content, [], True)
    texts: list[str] = []
    pictures: list[Picture] = []
    pictures_first = True
    for part in content if isinstance(content, Sequence) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image") or kind not in part:
            raise PromptError(f'{where}: content contains {part!r:.60}; expected {{"type": "text" | "image", …}}')
        _refuse_unread(part, ("type", kind), where)
        if kind == "text":
            if not isinstance(part["text"], str):
                raise PromptError(f"{where}: text is {part['text']!r:.60}; expected a string")
            texts.append(part["text"])
        else:
            pictures_first = pictures_first and not texts
            pictures.append(part["image"])
    return _Parsed(role, "\n".join(texts), pictures, pictures_first)


def _refuse_unread(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raises PromptError if a dictionary has keys that are not read. Empty ones, as in OpenAI's replies, may stay."""
    for key, value in values.items():
        if key not in known and value not in (None, False) and not _is_empty(value):
            raise PromptError(
                f"{where}: the key {key!r:.60} is not read; expected {' and '.join(known)}. An image is a part of "
                'content: {"type": "image", "image": path}'
            )


def _is_empty(value: Any) -> bool:
    return isinstance(value, str | Sequence | Mapping) and not value


def _place(message: _Parsed) -> str:
    """Returns the text of a message with one placeholder for each image.

    Placeholders in the text are used only if all images stand before the text and there is one for each of them.
    Otherwise, they are literal text and the images come first.
    """
    n = len(message.pictures)
    if n and message.pictures_first and placeholders.count(message.text) == n:
        return message.text
    return f"{IMAGE_PLACEHOLDER}\n" * n + placeholders.escape(message.text)
