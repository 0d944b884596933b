"""One sample as JSON, in the layouts of LLaVA, ShareGPT and OpenAI.

LLaVA and ShareGPT name the turns `conversations` and their keys `from` and `value`. OpenAI names them `messages`,
`role` and `content`; a content is a text or a list of parts. Data sets mix these names, so all combinations are read.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

from llava.config import IMAGE_PLACEHOLDER
from llava.data.unread import unread_in_sample, unread_in_turn, unread_mark, unread_media
from llava.errors import DataError
from llava.preprocess import placeholders
from llava.preprocess.conversation import Turn

Layout = Literal["sharegpt", "openai"]
ROLES: Mapping[str, Literal["user", "assistant", "system"]] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
NAMES = {"user": "human", "assistant": "gpt"}  # role -> its name in LLaVA's JSON

_TURN_LISTS = ("conversations", "messages")
_KNOWN = frozenset(("id", "image", "images", "system", *_TURN_LISTS))
_KNOWN_IN_TURN = frozenset(("from", "value", "role", "content"))
_PLAIN_TURN = frozenset(("from", "value"))
_TEXT_PARTS, _PICTURE_PARTS = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
_PICTURE_KEYS = ("image_url", "image", "url", "path")  # keys of a part that name its picture
_KNOWN_IN_TEXT_PART = frozenset(("type", "text"))
_KNOWN_IN_PICTURE_PART = frozenset(("type", "index", *_PICTURE_KEYS))
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_MAX_NAME = 1024  # characters


class UnsupportedError(DataError):
    """A sample contains something that this package does not read, such as video, or does not understand."""


@dataclass(frozen=True)
class Sample:
    """One conversation, exactly as in the file."""

    id: str
    turns: tuple[Turn, ...]  # in file order, including <image> placeholders
    images: tuple[str, ...]  # picture names; () for a text-only sample
    system: str | None = None  # replaces the system message of the template


class _PictureRef(NamedTuple):
    """An image part: names its picture, or only marks the position of one of `images`."""

    name: str | None
    index: Any = None  # of the picture in `images`; None if the parts are in the order of `images`


class _Message(NamedTuple):
    role: Literal["user", "assistant", "system"]
    text: str
    pictures: list[_PictureRef]  # of its content


def parse(value: Any, where: str, fallback_id: str) -> Sample:
    """Creates a sample from parsed JSON. Does not check the role order or <image> placeholders.

    Raises UnsupportedError if the sample contains anything that is not read or understood, and DataError if there is
    nothing to read: no object, no turns, or a turn without valid text.
    """
    try:
        return _parse(value, where, fallback_id)
    except RecursionError:
        raise UnsupportedError(f"{where}: nested too deeply; expected an object with a conversations list") from None


def _parse(value: Any, where: str, fallback_id: str) -> Sample:
    if not isinstance(value, dict):
        raise DataError(f"{where}: found {value!r:.60}; expected an object with a conversations list")
    id = fallback_id if value.get("id") is None else value["id"]
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise UnsupportedError(f"{where}: the id is {id!r:.60}; expected a string or an integer")
    where += f" (id {id!s:.60})"
    messages = [_message(turn, where, i) for i, turn in enumerate(_turn_list(value, where))]
    system = _system(value.get("system"), messages, where)
    images = _images(value, messages, where)
    if not value.keys() <= _KNOWN and (unread := unread_in_sample(value, _KNOWN, images)):
        raise UnsupportedError(
            f"{where}: {unread}; expected pictures under image or images; "
            "if the key is not part of the sample, remove it"
        )
    turns = tuple(Turn(message.role, message.text) for message in messages if message.role != "system")
    if not turns:
        raise DataError(f"{where}: the only turn is a system message; expected turns from human and gpt")
    return Sample(str(id), turns, images, system)


def layout_of(value: Mapping[str, Any]) -> Layout:
    """Returns the layout of a sample that `parse` accepts, judged by the keys of its first turn."""
    turns = value.get("conversations") or value["messages"]
    return "sharegpt" if "from" in turns[0] else "openai"


def to_llava(value: Mapping[str, Any], sample: Sample) -> dict[str, Any] | None:
    """Returns `sample` in LLaVA's layout, with the other keys of `value`, from which it was parsed.

    Returns None if other keys of turns would be lost, because turns of `value` were joined or dropped.
    """
    given = value.get("conversations") or value["messages"]
    turns = [{"from": NAMES[turn.role], "value": turn.text or ""} for turn in sample.turns]
    if sample.system:
        turns.insert(0, {"from": "system", "value": sample.system})
        given = given if _role(given[0]) == "system" else [{"role": "system"}, *given]
    others = [{key: one for key, one in turn.items() if key not in _KNOWN_IN_TURN} for turn in given]
    if [_role(turn) for turn in given] == [_role(turn) for turn in turns]:
        turns = [turn | other for turn, other in zip(turns, others, strict=True)]
    elif any(others):
        return None
    new: dict[str, Any] = {"id": sample.id if value.get("id") is None else value["id"]}
    if sample.images:
        new["image"] = list(sample.images) if len(sample.images) > 1 else sample.images[0]
    new["conversations"] = turns
    return new | {key: one for key, one in value.items() if key not in _KNOWN}


def _turn_list(value: Mapping[str, Any], where: str) -> list[Any]:
    found = {key: value[key] for key in _TURN_LISTS if value.get(key)}
    if not found:
        if other := [key for key in value if key not in _KNOWN and value[key]]:
            names = ", ".join(f'"{key}"' for key in other[:8])
            raise UnsupportedError(
                f"{where}: found the keys {names}; expected the turns under conversations or messages"
            )
        key = next((key for key in _TURN_LISTS if key in value), _TURN_LISTS[0])
        raise DataError(f"{where}: {key} is {value.get(key)!r:.60}; expected a non-empty list of turns")
    key, turns = next(iter(found.items()))
    if not isinstance(turns, list):
        raise UnsupportedError(f"{where}: {key} is {turns!r:.60}; expected a non-empty list of turns")
    if len(found) == 2 and value["conversations"] != value["messages"]:
        raise UnsupportedError(
            f"{where}: conversations and messages differ; keep the list to train on, remove the other"
        )
    return turns


def _role(turn: Mapping[str, Any]) -> str:
    return ROLES[turn["from"] if "from" in turn else turn["role"]]


def _message(turn: Any, where: str, i: int) -> _Message:
    where = f"{where}: turn {i + 1}"
    from_key, text_key = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
    name = turn.get(from_key) if isinstance(turn, dict) else None
    is_answer = isinstance(name, str) and ROLES.get(name) == "assistant"
    if not isinstance(name, str) or not isinstance(turn.get(text_key), str | list):
        if isinstance(turn, dict) and (unread := unread_in_turn(turn, _KNOWN_IN_TURN, is_answer=is_answer)):
            raise UnsupportedError(f"{where}: {unread}")
        error = DataError if isinstance(name, str) and turn.get(text_key) is None else UnsupportedError
        expected = '{"from": "human" or "gpt", "value": text}'
        raise error(f"{where} is {turn!r:.80}; expected {expected}")
    if name not in ROLES:
        raise UnsupportedError(f"{where} is from {name!r:.40}; expected one of {', '.join(ROLES)}")
    if not turn.keys() <= _PLAIN_TURN and (unread := unread_in_turn(turn, _KNOWN_IN_TURN, is_answer=is_answer)):
        raise UnsupportedError(f"{where}: {unread}")
    content = turn[text_key]
    text, pictures = (content, []) if isinstance(content, str) else _parts(content, where)
    _check_text(text, ROLES[name], where)
    return _Message(ROLES[name], text, pictures)


def _check_text(text: str, role: str, where: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where} contains an unpaired surrogate; expected valid Unicode text") from None
    if role == "user" and (mark := unread_mark(text)):
        raise UnsupportedError(f"{where} contains the mark {mark}; only pictures are read, and their mark is <image>")


def _parts(content: Sequence[Any], where: str) -> tuple[str, list[_PictureRef]]:
    """Returns the text of a list of parts, with a placeholder for each picture, and its pictures.

    If all pictures come first, the text may place them itself, with one placeholder for each. Otherwise, placeholders
    in the text are literal, as in `read_messages`.
    """
    parts = [_part(part, where) for part in content]
    pictures_first = all(bool(part.picture) >= bool(other.picture) for part, other in pairwise(parts))
    texts = [text for text, picture in parts if not picture]
    pictures = [picture for _, picture in parts if picture]
    if pictures_first and sum(map(placeholders.count, texts)) == len(pictures):
        return "\n".join(texts), pictures
    return "\n".join(text if picture else placeholders.escape(text) for text, picture in parts), pictures


class _Part(NamedTuple):
    text: str  # the placeholder for a picture
    picture: _PictureRef | None = None  # None for text


def _part(part: Any, where: str) -> _Part:
    if isinstance(part, str):
        return _Part(part)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return _text_part(part, where)
    if kind not in _PICTURE_PARTS:
        known = ", ".join((*_TEXT_PARTS, *_PICTURE_PARTS))
        raise UnsupportedError(f"{where} contains the part {part!r:.80}; expected one of the types {known}")
    return _picture_part(part, where)


def _text_part(part: Mapping[str, Any], where: str) -> _Part:
    if unread := unread_media(part, _KNOWN_IN_TEXT_PART, ()):
        raise UnsupportedError(f"{where} contains a text part, of which {unread}; expected pictures in image parts")
    return _Part(part["text"])


def _picture_part(part: Mapping[str, Any], where: str) -> _Part:
    if part.get("text"):
        raise UnsupportedError(
            f'{where} contains an image part, of which the key "text" is {part["text"]!r:.40} and is not read; '
            "expected a part of its own for the text"
        )
    found = f"{where} contains the picture"
    names = {key: _name(_url_of(part[key]), found) for key in _PICTURE_KEYS if part.get(key)}
    if not names and part.keys() <= {"text", *_KNOWN_IN_PICTURE_PART}:
        return _Part(IMAGE_PLACEHOLDER, _PictureRef(None, part.get("index")))
    if not names:
        raise UnsupportedError(f"{found} {part!r:.60}; expected its path or data: URL under image_url or image")
    if len(set(names.values())) > 1:
        raise UnsupportedError(f"{where} contains an image part whose {' and '.join(names)} differ; keep one of them")
    name = next(iter(names.values()))
    if unread := unread_media(part, _KNOWN_IN_PICTURE_PART, (name,)):
        raise UnsupportedError(f"{where} contains an image part, of which {unread}; expected one picture in each part")
    return _Part(IMAGE_PLACEHOLDER, _PictureRef(name))


def _url_of(source: Any) -> Any:
    return source["url"] if isinstance(source, dict) and source.get("url") else source


def _system(own: Any, messages: Sequence[_Message], where: str) -> str | None:
    texts = [message.text for message in messages if message.role == "system"]
    if any(message.role == "system" and (i or message.pictures) for i, message in enumerate(messages)):
        raise UnsupportedError(
            f"{where}: expected at most one system message, before all other turns and without pictures"
        )
    if own is not None and not isinstance(own, str):
        raise UnsupportedError(f"{where}: system is {own!r:.60}; expected a text")
    if own and texts and own != texts[0]:
        raise UnsupportedError(
            f"{where}: the key system and the first turn are different system messages; keep one of them"
        )
    return own or next(iter(texts), None) or None


def _images(value: Mapping[str, Any], messages: Sequence[_Message], where: str) -> tuple[str, ...]:
    refs = [ref for message in messages for ref in message.pictures]
    found = {key: _names(value[key], key, where) for key in ("image", "images") if value.get(key) is not None}
    if named := tuple(ref.name for ref in refs if ref.name is not None):
        if len(named) < len(refs):
            raise UnsupportedError(
                f"{where}: some image parts name their picture and some do not; expected the same for all"
            )
        found["the content of its turns"] = named
    lists = {key: names for key, names in found.items() if names}
    if len(set(lists.values())) > 1:
        raise UnsupportedError(f"{where}: {' and '.join(lists)} name different pictures; keep one of them")
    return _in_order(next(iter(lists.values()), ()), [ref.index for ref in refs], where)


def _in_order(names: tuple[str, ...], indices: Sequence[Any], where: str) -> tuple[str, ...]:
    """Returns the names in the order of the image parts that refer to them by index."""
    if not names or all(index is None for index in indices):
        return names
    if len(indices) != len(names) or any(indices.count(i) != 1 for i in range(len(names))):
        raise UnsupportedError(
            f'{where}: the "index" of its image parts is {indices!r:.60}; expected each picture of images once, '
            f"from 0 to {len(names) - 1}"
        )
    return tuple(names[int(index)] for index in indices)


def _names(content: Any, key: str, where: str) -> tuple[str, ...]:
    names = content if isinstance(content, list) else [content]
    if all(name is None or name == "" or name != name for name in names):  # NaN is pandas' missing value
        return ()
    if not all(isinstance(name, str) and name for name in names):
        raise UnsupportedError(
            f"{where}: {key} is {content!r:.60}; expected a picture name, a list of picture names, or null"
        )
    return tuple(_name(name, f"{where}: {key} is") for name in names)


def _name(source: Any, where: str) -> str:
    """Returns a picture's name: a path, or a `data:` URL that contains the picture itself."""
    if not isinstance(source, str) or not source:
        raise UnsupportedError(f"{where} {source!r:.60}; expected a path or a data: URL")
    if source.startswith("data:"):
        return source
    if source.lower().startswith(("file:///", "file://localhost/")):
        return unquote(source[source.index("/", len("file://")) :])
    if _URL.match(source):
        raise UnsupportedError(f"{where} {source!r:.80}; nothing is downloaded: save the picture and write its path")
    if len(source) > _MAX_NAME:
        raise UnsupportedError(
            f"{where} {source!r:.40}…; expected a path, or a data: URL such as data:image/png;base64,…"
        )
    return source
