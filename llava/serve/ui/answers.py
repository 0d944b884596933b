"""An answer on the page: its words with their alternatives, and its figures. All text is escaped."""

import json
from html import escape

from llava.explain.maps import words_of
from llava.serve.ui.conversation import Answer, Figures, Token


def details(answer: Answer, number: int) -> str:
    """Returns the HTML below an answer. number: of its turn, from 0."""
    return _words(answer.tokens, number) + _line(answer.figures) + _button(number)


def _words(tokens: list[Token], number: int) -> str:
    """A toolbar: Tab reaches its first word, and the arrow keys the others."""
    words = []
    for i, (text, span) in enumerate(words_of([one.piece for one in tokens])):
        data = json.dumps([_alternatives(one) for one in tokens[span]])
        attributes = f'data-word="{i}" data-tokens="{escape(data)}" tabindex="{0 if i == 0 else -1}"'
        words.append(f'<button type="button" class="word" {attributes}>{escape(text)}</button>')
    label = "Words of the answer, with their alternatives"
    return f'<div class="words" role="toolbar" aria-label="{label}" data-answer="{number}">{" ".join(words)}</div>'


def _alternatives(token: Token) -> list[object]:
    text = token.piece.decode(errors="replace")
    return [text, round(token.probability, 4), [[one, round(p, 4)] for one, p in token.alternatives]]


def _line(figures: Figures | None) -> str:
    if figures is None:
        return '<p class="figures">stopped</p>'
    speed = f"{figures.tokens_per_s:.1f} tokens/s" if figures.tokens_per_s else ""
    parts = [
        f"first token after {figures.first_token_s:.2f} s",
        f"{figures.tokens} tokens in {figures.total_s:.2f} s",
        speed,
        f"{figures.prompt_tokens} prompt tokens, {figures.cached_tokens} of them cached",
    ]
    return f'<p class="figures">{" · ".join(filter(None, parts))}</p>'


def _button(number: int) -> str:
    return f'<button type="button" class="look" data-answer="{number}">Show what it looked at, and the prompt</button>'
