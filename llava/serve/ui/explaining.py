"""What the words of an answer look at, for the viewer in the browser (`llava/explain/viewer.js`)."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llava.explain.maps import words_of
from llava.serve.ui.client import ApiFailure
from llava.serve.ui.conversation import Conversation, Turn
from llava.serve.ui.paths import FILE_OF_VISITOR

_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a visitor wants to see: which answer, and which of its words."""

    number: int  # of the turn, from 0
    seed: int  # of the answer, which may have been replaced
    word: int

    @classmethod
    def read(cls, text: str) -> "Wanted":
        """Reads what page.js has written. Raises ApiFailure."""
        match = re.fullmatch(r"(\d{1,9}):(\d{1,10}):(\d{1,9})", text, re.ASCII)
        if match is None:
            raise ApiFailure("this answer is no longer there")
        return cls(number=int(match[1]), seed=int(match[2]), word=int(match[3]))

    def turn(self, conversation: Conversation) -> Turn:
        """Returns the turn. Raises ApiFailure if it is no longer there."""
        for turn in conversation.turns[self.number : self.number + 1]:
            if turn.answer and turn.answer.options.seed == self.seed:
                return turn
        raise ApiFailure("this answer is no longer there")


def explanation(found: dict[str, Any], turn: Turn, pictures: Sequence[Path], wanted: Wanted) -> str:
    """Returns HTML with the data of the viewer. found: the answer of /v1/explain. pictures: of all turns up to it."""
    assert turn.answer
    words = [
        {
            "text": text,
            "shares": [_mean([one[i] for one in found["maps"][span]]) for i in range(len(found["pictures"]))],
        }
        for text, span in words_of(bytes(token["bytes"]) for token in found["tokens"])
    ]
    shown = [
        {**picture, "source": FILE_OF_VISITOR + quote(str(path))}
        for picture, path in zip(found["pictures"], pictures, strict=True)
    ]
    data = {"question": turn.text, "prompt": found["prompt"], "words": words, "pictures": shown}
    data |= {"answer": f"{wanted.number}:{wanted.seed}", "word": wanted.word}
    return (
        _note(found["answer"] == turn.answer.text) + f'<div class="look-data" hidden>{escape(json.dumps(data))}</div>'
    )


def _mean(maps: list[list[float]]) -> list[float]:
    return [round(sum(shares) / len(maps), _DIGITS) for shares in zip(*maps, strict=True)]


def _note(is_same: bool) -> str:
    """Rounding in another batch can change what is sampled; the maps are then those of the other answer."""
    return "" if is_same else '<p class="note">This time, the answer was another one; the maps belong to it.</p>'
