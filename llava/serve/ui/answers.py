"""An answer on the page: its words with their alternatives, and its figures. All text is escaped."""

import json
from html import escape

from llava.explain.maps import words_of
from llava.serve.ui.conversation import Answer, Token


def finished(answer: Answer, number: int) -> str:
    """Returns the HTML of an answer that no longer grows. number: of its turn, from 0."""
    name = f"{number}:{answer.options.seed}"  # no other answer on the page ever has it
    return words(answer, name) + figures(answer) + _buttons(name)


def words(answer: Answer, name: str) -> str:
    """A toolbar: Tab reaches its first word, and the arrow keys the others. name: by which page.js knows the answer."""
    tokens, shown = answer.tokens, []
    for i, (text, span) in enumerate(words_of([one.piece for one in tokens])):
        data = json.dumps([_alternatives(one) for one in tokens[span]])
        attributes = f'data-word="{i}" data-tokens="{escape(data)}" tabindex="{0 if i == 0 else -1}"'
        space = _space(tokens[span.start]) if i else ""
        shown.append(f'{space}<button type="button" class="word" {attributes}>{escape(text)}</button>')
    label = "Words of the answer, with their alternatives"
    return f'<div class="words" role="toolbar" aria-label="{label}" data-answer="{name}">{"".join(shown)}</div>'


def _space(first: Token) -> str:
    """The white space before a word, of which line breaks matter."""
    text = first.piece.decode(errors="replace")
    return text[: len(text) - len(text.lstrip())]


def _alternatives(token: Token) -> list[object]:
    text = token.piece.decode(errors="replace")
    return [text, round(token.probability, 4), [[one, round(p, 4)] for one, p in token.alternatives]]


def figures(answer: Answer) -> str:
    """A line that says what an answer cost."""
    found = answer.figures
    if found is None:
        return '<p class="figures">stopped</p>'
    speed = f"{found.tokens_per_s:.1f} tokens/s" if found.tokens_per_s else ""
    parts = [
        f"first token after {found.first_token_s:.2f} s",
        f"{found.tokens} tokens in {found.total_s:.2f} s",
        speed,
        f"{found.prompt_tokens} prompt tokens, {found.cached_tokens} of them cached",
    ]
    return f'<p class="figures">{" · ".join(filter(None, parts))}</p>'


def _buttons(name: str) -> str:
    look = f'<button type="button" class="look" data-answer="{name}">Show what it looked at, and the prompt</button>'
    return f'<p class="buttons">{look} <button type="button" class="copy">Copy</button></p>'
