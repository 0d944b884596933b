"""A conversation on the page: its turns, as messages of the API and as JSON to keep."""

import asyncio
import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.serve.ui.client import ApiFailure


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a question is answered."""

    model: str  # or an adapter
    temperature: float
    top_p: float
    max_tokens: int
    seed: int  # with which an explanation samples the same answer again

    def body(self) -> dict[str, Any]:
        """Returns the parameters of a request."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token of an answer."""

    piece: bytes
    probability: float
    alternatives: tuple[tuple[str, float], ...]  # the likeliest tokens with their probabilities


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What an answer cost."""

    first_token_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    tokens: int

    @property
    def tokens_per_s(self) -> float | None:
        """The speed after the first token, or None if there was only one."""
        after_first = self.total_s - self.first_token_s
        return (self.tokens - 1) / after_first if self.tokens > 1 and after_first > 0 else None


@dataclass(kw_only=True, eq=False)
class Answer:
    """An answer, which grows while it is generated."""

    options: Options
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    figures: Figures | None = None  # None: it was stopped, or is not finished
    is_finished: bool = False
    stop: asyncio.Event = field(default_factory=asyncio.Event)  # set: its visitor wants no more of it


@dataclass(kw_only=True, eq=False)
class Turn:
    """A question and its answer."""

    text: str
    pictures: tuple[Path, ...]
    answer: Answer | None = None


@dataclass(kw_only=True)
class Conversation:
    """What one visitor has asked so far."""

    turns: list[Turn] = field(default_factory=list)

    def messages(self, last: int) -> list[dict[str, Any]]:
        """Returns the turns up to the question of turn `last`, as the API takes them. Raises ApiFailure."""
        found: list[dict[str, Any]] = []
        for turn in self.turns[: last + 1]:
            found.append({"role": "user", "content": _content(turn)})
            if turn.answer and turn is not self.turns[last]:
                found.append({"role": "assistant", "content": turn.answer.text})
        return found

    def stop(self) -> None:
        """Ends the answer that grows, if there is one."""
        for turn in self.turns:
            if turn.answer:
                turn.answer.stop.set()

    def forget(self, turn: Turn) -> None:
        """Removes a turn, unless that has happened meanwhile."""
        self.turns = [one for one in self.turns if one is not turn]

    def record(self) -> list[dict[str, Any]]:
        """Returns the conversation as messages for a file, with pictures inside. Raises ApiFailure."""
        found: list[dict[str, Any]] = []
        for turn in self.turns:
            found.append({"role": "user", "content": _content(turn)})
            if turn.answer:
                found.append({"role": "assistant", "content": turn.answer.text, **turn.answer.options.body()})
        return found


def _content(turn: Turn) -> list[dict[str, Any]]:
    pictures = [{"type": "image_url", "image_url": {"url": _data_url(path)}} for path in turn.pictures]
    return [*pictures, {"type": "text", "text": turn.text}]


def _data_url(path: Path) -> str:
    try:
        return "data:application/octet-stream;base64," + base64.b64encode(path.read_bytes()).decode()
    except OSError:
        raise ApiFailure(f"the picture {path.name} is no longer there; add it again") from None
