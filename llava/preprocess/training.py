"""From a training sample to spans with their label mask, as the LLaVA code trains (c121f04; MPT: v1.0.2)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from llava.config import IMAGE_MARK
from llava.errors import PromptError
from llava.preprocess.conversation import Span, Style, Template, Turn, render

ImagePlace = Literal["front", "as_written"]  # of the mark in its turn: LLaVA 1.0 and later, or before
_BEGIN, _END = "###", "\n"  # of a v0 turn


def training_spans(template: Template, turns: Sequence[Turn]) -> list[Span]:
    """The text of a sample and what of it is learnt. Raises PromptError where turns do not alternate.

    A leading assistant turn is left out, as in the original; v0 keeps it. In v0 the ### in front of a user's turn is
    learnt too: that is how the model comes to end its answer.
    """
    if template.style is Style.SINGLE:
        return list(_v0(template, turns))
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    if template.style is Style.PLAIN:
        if len(turns) != 2:
            raise PromptError(f"the plain template trains on one exchange; this sample has {len(turns)} turns")
        mark = Turn("user", IMAGE_MARK * (turns[0].text or "").count(IMAGE_MARK))
        return render(template, [mark, turns[1]])
    return render(replace(template, few_shot=()), turns)


def _v0(template: Template, turns: Sequence[Turn]) -> Iterator[Span]:
    yield Span(f"{template.system}\n\n")
    for role, text in turns:
        answer = role == "assistant"
        yield Span(_BEGIN, True)
        yield Span(f" {template.assistant if answer else template.user}: {text}{_END}", answer)
    yield Span(f"{_BEGIN} ", True)


def placed(turns: Sequence[Turn], place: ImagePlace, *, start_end: bool, tagged: bool) -> list[Turn]:
    """The turns with their marks where training has them.

    front: in front of the turn's text, on a line of its own. `tagged`: between <Image> and </Image>.
    """
    around = ("<im_start>", "<im_end>") if start_end else ("", "")
    if tagged:
        around = ("<Image>" + around[0], around[1] + "</Image>")
    return [Turn(role, _marked(text or "", place, around)) for role, text in turns]


def _marked(text: str, place: ImagePlace, around: tuple[str, str]) -> str:
    n = text.count(IMAGE_MARK)
    if n and place == "front":
        text = (f"{IMAGE_MARK}\n" * n + text.replace(IMAGE_MARK, "").strip()).strip()
    return text.replace(IMAGE_MARK, IMAGE_MARK.join(around)) if n else text
