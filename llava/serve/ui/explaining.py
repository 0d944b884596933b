"""What the words of an answer look at, for the viewer in the browser (`llava/explain/viewer.js`)."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llava.explain.maps import words_of
from llava.serve.ui.conversation import Turn
from llava.serve.ui.paths import FILE_OF_VISITOR

_DIGITS = 6


def explanation(found: dict[str, Any], turn: Turn, pictures: Sequence[Path], number: int, word: int) -> str:
    """Returns HTML with the data of the viewer. found: the answer of /v1/explain. number: of the turn. word: to show."""
    assert turn.answer
    words = [
        {"text": text, "shares": [_mean([one[i] for one in found["maps"][span]]) for i in range(len(found["pictures"]))]}
        for text, span in words_of(bytes(token["bytes"]) for token in found["tokens"])
    ]
    shown = [
        {**picture, "source": FILE_OF_VISITOR + quote(str(path))}
        for picture, path in zip(found["pictures"], pictures, strict=True)
    ]
    question = f"{number + 1}. {turn.text}"
    data = {"question": question, "prompt": found["prompt"], "words": words, "pictures": shown, "word": word}
    return _note(found["answer"] == turn.answer.text) + f'<div class="look-data" hidden>{escape(json.dumps(data))}</div>'


def _mean(maps: list[list[float]]) -> list[float]:
    return [round(sum(shares) / len(maps), _DIGITS) for shares in zip(*maps, strict=True)]


def _note(is_same: bool) -> str:
    """Rounding in another batch can change what is sampled; the maps are then those of the other answer."""
    return "" if is_same else '<p class="note">This time, the answer was another one; the maps belong to it.</p>'
