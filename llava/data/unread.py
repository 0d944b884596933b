"""Finds parts of a sample that this package does not read but that change what the sample means.

Data sets use many names for media (`video`, `audios`, `img_path`) and many marks (`<video>`, `<|image_1|>`). A sample
with media that are not read must not pass as text alone, so keys and marks are recognised by general rules.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MEDIA = re.compile(
    "image|img|picture|pic|photo|photograph|jpg|jpeg|png|webp|gif|pixel|visual|media|multimodal|"
    "video|vid|movie|frame|audio|speech|sound|wav|voice|music|pointcloud|cloud|lidar"
)
# Words of keys that describe media instead of containing them, such as image_id, image_size and num_images.
_DESCRIBING_LAST = re.compile(
    "id|idx|index|size|width|height|wh|hw|shape|resolution|count|num|number|name|source|type|token|caption|"
    "description|license|hash|md|sha|category|label|score|similarity|url|aspect|ratio|quality|format|domain|dataset|"
    "fps|duration|length|tag|date|title"
)
# The same, unless the content names files: image_info may be a size or a path.
_DESCRIBING_UNLESS_FILE = re.compile(
    "info|information|meta|metadata|split|set|subset|clas|classe|text|author|credit|attribution|dim|dimension|attribute|"
    "annotation|object|region|mode|channel|color|colour|style|scene|topic|genre|kind|view|position|order|origin|"
    "orientation|rotation|language|lang|ocr|prompt|key|status|valid|time|year"
)
_DESCRIBING_FIRST = re.compile("num|n|nb|number|total|has|is|with|min|max")
_TOPIC = re.compile("voice|music|movie|sound|cloud|speech")  # media, or the topic of a text
_WORDS = re.compile(r"[^\d_./\\:=]{1,80}")  # no path, id or base64
_TYPE = re.compile("type|kind|modality|modalitie|format|mode")  # keys whose content may be the name of a medium
_ORIGIN = re.compile("source|origin|reference|citation|license|credit|attribution")  # its URL is where a text is from
_NO_MEDIA = ("text", "text_only", "text-only", "none", "language")  # contents of keys such as media_type
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_AFTER_SUFFIX = r"([?#][^\n]*)?"  # the query of a URL
_PICTURE_FILE = re.compile(
    rf"data:image/.*|[^\n]{{1,400}}\.(jpe?g|jpe|jfif|jp2|png|webp|bmp|gif|tiff?|hei[cf]|avif){_AFTER_SUFFIX}",
    re.IGNORECASE,
)
_OTHER_FILE = re.compile(
    r"data:(audio|video)/.*|"
    r"[^\n]{1,400}\.(mp4|mkv|avi|mov|webm|m4v|mpe?g|flv|wav|mp3|flac|ogg|opus|m4a|aac|pcd|ply|dcm)" + _AFTER_SUFFIX,
    re.IGNORECASE,
)
_WEB = re.compile(r"https?://\S+", re.IGNORECASE)
# Keys that change the prompt or the targets of a sample.
_SAMPLE_SETTINGS = ("tools", "functions", "chosen", "rejected", "history", "system_prompt", "system_message")
_TURN_SETTINGS = ("tool_calls", "function_call", "reasoning_content", "refusal")
_TURN_WEIGHTS = ("weight", "loss", "train")  # neutral only if 1 or true
_MARK = re.compile(
    r"<\|?(?!(?-i:image>))(image|img|video|audio|speech|sound|vision|media)s?"
    r"[ _-]?(pad|start|end|token|placeholder|here|bos|eos)?[ _-]?\d*\|?>",
    re.IGNORECASE,
)
_LINE_END = re.compile(r"[^\S\n]*(?:\n|\Z)")


def unread_in_sample(value: Mapping[str, Any], known: frozenset[str], pictures: Sequence[str]) -> str | None:
    """Returns a description of the first key outside `known` that may be media or a setting, or None.

    pictures: the names of the pictures that are read.
    """
    for key, content in value.items():
        if key in _SAMPLE_SETTINGS and key not in known and not _is_empty(content):
            return f'the key "{key}" is not read, but changes the conversation'
    return unread_media(value, known, pictures)


def unread_in_turn(turn: Mapping[str, Any], known: frozenset[str], *, is_answer: bool) -> str | None:
    """Returns a description of the first key outside `known` that may be media or a setting, or None.

    Weights are neutral in other turns than answers, because only answers are trained on.
    """
    for key, content in turn.items():
        if is_answer and key in _TURN_WEIGHTS and key not in known and content is not None and content != 1:
            return f'the key "{key}" is {content!r:.20}, but weights of turns are not read'
        if key in _TURN_SETTINGS and key not in known and not _is_empty(content):
            return f'the key "{key}" is not read, but changes the conversation'
    return unread_media(turn, known, ())


def unread_media(value: Mapping[str, Any], known: frozenset[str], pictures: Sequence[str]) -> str | None:
    """Returns a description of the first key outside `known` that may be media, or None.

    pictures: the names of the pictures that are read.
    """
    for key, content in value.items():
        if key not in known and not _is_empty(content) and (found := _media_key(key, content, pictures)):
            return f'the key "{found}" is {content!r:.40} and may be media, which is not read from it'
    return None


def unread_mark(text: str) -> str | None:
    """Returns the first mark that stands for media other than <image>, or None.

    Text about HTML also contains <video>. A mark is therefore recognised only at the start or end of a line, and only
    if the text does not contain its closing tag, or wherever its closing tag follows the path or URL of a file, as in
    Qwen-VL's `<img>a.png</img>`.
    """
    if "<" not in text:
        return None
    lowered = text.lower()
    for match in _MARK.finditer(text):
        if _encloses_file(match, text):
            return match[0]
        at_start = match.start() == 0 or text[match.start() - 1] == "\n"
        at_end = _LINE_END.match(text, match.end())
        if (at_start or at_end) and f"</{match[1]}".lower() not in lowered:
            return match[0]
    return None


def _encloses_file(tag: re.Match[str], text: str) -> bool:
    """Whether an opening tag is followed by a media file or URL and its closing tag."""
    end = text.find("<", tag.end())
    closing = f"</{tag[1]}".lower()
    if end < 0 or text[end : end + len(closing)].lower() != closing:
        return False
    enclosed = text[tag.end() : end].strip()
    return any(file.fullmatch(enclosed) for file in (_PICTURE_FILE, _OTHER_FILE, _WEB))


def _is_empty(content: Any) -> bool:
    """Whether a content stands for a missing value: null, "", "[]", a negative number, or containers of these."""
    if isinstance(content, dict | list):
        return all(map(_is_empty, content.values() if isinstance(content, dict) else content))
    if isinstance(content, str):
        return content.strip() in ("", "[]", "{}", "null")
    return not content or not content >= 0  # NaN, which pandas writes for missing values, is not >= 0


def _media_key(key: str, content: Any, pictures: Sequence[str]) -> str | None:
    """Returns the key, or the path of a nested key such as `meta.video`, if its name or content suggests media."""
    if content in pictures or (isinstance(content, list) and content and all(one in pictures for one in content)):
        return None
    words = [word.lower() if len(word) < 4 else word.lower().removesuffix("s") for word in _WORD.findall(key)]
    leaves = [*_leaves(content)]
    texts = [leaf for leaf in leaves if isinstance(leaf, str)]
    if not _describes(words, texts, pictures) and (
        _is_named_media(words, texts)
        or (not pictures and _is_type_of_media(words, texts))
        or _are_files(texts, pictures)
    ):
        return key
    inner = (item for leaf in leaves if isinstance(leaf, dict) for item in leaf.items() if not _is_empty(item[1]))
    nested = (_media_key(str(name), one, pictures) for name, one in inner)
    return next((f"{key}.{found}" for found in nested if found), None)


def _describes(words: Sequence[str], texts: Sequence[str], pictures: Sequence[str]) -> bool:
    """Whether a key describes media or a text, judged by the words of its name and the texts of its content."""
    if not words:
        return False
    is_topic = all(_TOPIC.fullmatch(word) for word in words if _MEDIA.fullmatch(word))
    if is_topic and texts and _ORIGIN.fullmatch(words[-1]) and all(map(_WEB.fullmatch, texts)):
        return True
    if _DESCRIBING_LAST.fullmatch(words[-1]) or _DESCRIBING_FIRST.fullmatch(words[0]):
        return bool(pictures) or (bool(texts) and all(text.lower() in _NO_MEDIA for text in texts))
    return bool(pictures and _DESCRIBING_UNLESS_FILE.fullmatch(words[-1])) and not _are_files(texts, ())


def _is_named_media(words: Sequence[str], texts: Sequence[str]) -> bool:
    media = [word for word in words if _MEDIA.fullmatch(word)]
    about = len(words) == 1 or _DESCRIBING_LAST.fullmatch(words[-1]) or _DESCRIBING_UNLESS_FILE.fullmatch(words[-1])
    is_topic = about and all(map(_TOPIC.fullmatch, media)) and texts and all(map(_WORDS.fullmatch, texts))
    return bool(media) and not is_topic


def _is_type_of_media(words: Sequence[str], texts: Sequence[str]) -> bool:
    """Whether this is a key such as type whose content is a medium, such as video."""
    is_type = bool(words and _TYPE.fullmatch(words[-1]))
    return is_type and any(_MEDIA.fullmatch(text.lower().removesuffix("s")) for text in texts)


def _are_files(texts: Sequence[str], pictures: Sequence[str]) -> bool:
    """Whether a text names a media file; with `pictures`, a media file other than a picture."""
    files = (_OTHER_FILE,) if pictures else (_OTHER_FILE, _PICTURE_FILE)
    return any(file.fullmatch(text) for text in texts for file in files)


def _leaves(content: Any) -> Iterator[str | dict[str, Any]]:
    """Yields the texts and objects in a content and its nested lists."""
    for one in content if isinstance(content, list) else (content,):
        if isinstance(one, list):
            yield from _leaves(one)
        elif isinstance(one, str | dict):
            yield one
