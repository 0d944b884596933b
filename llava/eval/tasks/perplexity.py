"""Perplexity of the language model on texts, without pictures and template: what visual tuning did to the language.

`llava eval perplexity` measures one text, with windows of any length; this task makes it a part of a run, so that
`llava eval compare` puts checkpoints and their bases side by side.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llava.errors import DataError
from llava.eval.entries import read_text
from llava.eval.task import Answered, Data, Item, Measured, Question

if TYPE_CHECKING:
    from llava.assistant import Assistant

_LARGEST = 709.0  # nats per token, above which the perplexity is no float64


class PerplexityOfTexts(Measured):
    """Sums: nats, bytes and tokens that are scored."""

    name = "perplexity"
    title = "Perplexity"
    metric = "perplexity, by sliding windows of the model's context, half of it apart"
    folder = "perplexity"
    files: Mapping[str, str] = {"*.txt": "texts in UTF-8; one or more"}
    lower_is_better = True

    def questions(self, data: Data) -> list[Question]:
        """Returns the texts, by name. Raises DataError."""
        files = sorted(file for file in data.folder.glob("*.txt") if file.is_file())
        texts = [(file, read_text(file, "a text")) for file in files]
        for file, text in texts:
            if not text:
                raise DataError(f"{file}: is empty; expected a text")
        return [Question(id=file.name, text=text, groups=(file.name,)) for file, text in texts]

    def measure(self, assistant: "Assistant", question: Question) -> str:
        """Returns the sums as JSON. Raises LlavaError."""
        from llava.eval.perplexity import perplexity

        found = perplexity(assistant, question.text)
        return json.dumps({name: getattr(found, name) for name in ("nll", "bytes", "tokens", "context")})

    def score(self, answered: Sequence[Answered]) -> list[Item]:
        """Returns one item per text."""
        return [_item(one) for one in answered]

    def figure(self, sums: Sequence[float]) -> float | None:
        """Returns the perplexity; None if no token is scored or it is no number."""
        nll, _, tokens = sums
        return math.exp(nll / tokens) if tokens and nll / tokens <= _LARGEST else None

    def details(self, sums: Sequence[float]) -> Mapping[str, float | None]:
        """Returns what can be compared between models with different tokenizers."""
        nll, n_bytes, _ = sums
        return {"bits per byte": nll / math.log(2) / n_bytes if n_bytes else None}

    def note(self, answered: Sequence[Answered]) -> str:
        """Returns the length of the windows: perplexities with others cannot be compared."""
        lengths = {json.loads(one.text).get("context") for one in answered}
        return ", ".join(f"windows of up to {n:,} tokens" for n in sorted(lengths, key=str) if isinstance(n, int))


def _item(one: Answered) -> Item:
    try:
        found = json.loads(one.text)
        sums = (float(found["nll"]), float(found["bytes"]), float(found["tokens"]))
    except (ValueError, TypeError, KeyError):
        raise DataError(
            f"{one.question.id}: its measurement is {one.text!r:.60}; expected nll, bytes, tokens"
        ) from None
    return Item(id=one.question.id, sums=sums, groups=one.question.groups)
