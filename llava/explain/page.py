"""An explanation as one HTML file, which needs nothing from outside: the words of a reply, and what each looks at."""

import base64
import io
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from PIL import Image

from llava.explain.maps import AttentionMap

_DIGITS = 6
_LONGEST_SIDE = 1600  # pixels of a picture on the page


def page(found: AttentionMap, pictures: Sequence[Image.Image], question: str, prompt: str) -> str:
    """Returns the page. prompt: as the model saw it."""
    words = [
        {
            "text": text,
            "shares": [
                [round(x, _DIGITS) for x in picture.shares[tokens].mean(0).tolist()] for picture in found.pictures
            ],
        }
        for text, tokens in found.words
    ]
    shown = [
        {"source": _source(image), "width": own.size[0], "height": own.size[1], "boxes": own.boxes}
        for image, own in zip(pictures, found.pictures, strict=True)
    ]
    data = {"question": question, "prompt": prompt, "words": words, "pictures": shown}
    parts = {"VIEWER_CSS": _file("viewer.css"), "VIEWER_JS": _file("viewer.js"), "DATA": _embedded(data)}
    text = _file("page.html")
    for mark, part in parts.items():  # the data come last, as they may contain a mark
        text = text.replace(mark, part, 1)
    return text


def _file(name: str) -> str:
    return (resources.files("llava.explain") / name).read_text(encoding="utf-8")


def _source(image: Image.Image) -> str:
    """The picture as a data URL; large ones are shrunk, as boxes are in pixels of the original."""
    small = image.convert("RGB")
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    file = io.BytesIO()
    small.save(file, "PNG" if small.size == image.size else "JPEG", quality=90)
    kind = "png" if small.size == image.size else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def _embedded(data: Any) -> str:
    """JSON that cannot end the script element which it is in."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
