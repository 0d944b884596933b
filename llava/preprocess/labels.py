"""Converts training samples to spans with marked targets, as in LLaVA's training code (c121f04; MPT: v1.0.2)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from llava.config import IMAGE_PLACEHOLDER
from llava.errors import PromptError, counted
from llava.preprocess import placeholders
from llava.preprocess.conversation import Span, Style, Template, Turn, render

# Position of image placeholders in a turn: "front" in LLaVA 1.0 and later, "as_written" in earlier versions.
ImagePlace = Literal["front", "as_written"]
_BEGIN, _END = "###", "\n"  # before and after each v0 turn


def training_spans(template: Template, turns: Sequence[Turn], system: str | None = None) -> list[Span]:
    """Returns the text of a sample, with targets marked. Raises PromptError if the template does not support the turns.

    system: replaces the system message of the template. As in the original code, a leading assistant turn is dropped,
    except in v0. In v0, each ### is also a target, which teaches the model to end its reply.
    """
    if template.style is Style.SINGLE:
        return list(_v0(template, turns, template.system if system is None else system))
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    if template.style is Style.PLAIN:
        if len(turns) != 2:
            raise PromptError(
                f"this sample has {counted(len(turns), 'turn')}; the plain template requires two, "
                "one from the user and one from the assistant"
            )
        marks = turns[0]._replace(text=IMAGE_PLACEHOLDER * placeholders.count(turns[0].text or ""))
        return render(template, [marks, turns[1]], system)
    return render(replace(template, few_shot=()), turns, system)


def _v0(template: Template, turns: Sequence[Turn], system: str) -> Iterator[Span]:
    yield Span(f"{system}\n\n")
    for i, (role, text) in enumerate(turns):
        if i and role == turns[i - 1].role:
            raise PromptError(f"turns {i} and {i + 1} are both from the {role}; expected alternating roles")
        answer = role == "assistant"
        yield Span(_BEGIN, True)
        yield Span(f" {template.assistant if answer else template.user}: {text}{_END}", answer)
    yield Span(f"{_BEGIN} ", True)


def move_marks(turns: Sequence[Turn], place: ImagePlace, *, start_end: bool, tagged: bool) -> list[Turn]:
    """Returns the turns with their image placeholders moved and enclosed in tags, as in LLaVA's training code.

    place: "front" moves all placeholders in a turn to the start of the turn, each on its own line.
    start_end: enclose each placeholder in <im_start> and <im_end>. tagged: enclose the result in <Image> and </Image>.
    """
    around = ("<im_start>", "<im_end>") if start_end else ("", "")
    if tagged:
        around = ("<Image>" + around[0], around[1] + "</Image>")
    return [Turn(role, _marked(text or "", place, around)) for role, text in turns]


def _marked(text: str, place: ImagePlace, around: tuple[str, str]) -> str:
    n = placeholders.count(text)
    if n and place == "front":
        text = (f"{IMAGE_PLACEHOLDER}\n" * n + placeholders.remove(text).strip()).strip()
    return placeholders.replace(text, IMAGE_PLACEHOLDER.join(around))
