"""What two questions must have in common to be the same, and which questions fit any picture."""

import re
import unicodedata
from collections.abc import Iterator

from llava.data.layouts import Sample
from llava.preprocess import placeholders

# What LLaVA and its benchmarks add to questions. The tokens of OCR are read from the picture.
_ADDED = re.compile(
    r"answer the question using a single word or phrase\.?"
    r"|answer with the option's letter from the given choices directly\.?"
    r"|when the provided information is insufficient, respond with 'unanswerable'\.?"
    r"|please answer yes or no\.?"
    r"|请直接回答选项字母。?"
    r"|^reference ocr tokens?:.*$",
    re.MULTILINE,
)
_EDGES = " \t\n.,:;?!。"
_MIN_LETTERS = 8  # a shorter question, such as "Why?", fits any picture
_GENERIC = (
    "a about above add all an analyze and any are at be brief briefly can caption characteristics clear comprehensive "
    "concise concisely contents could depicted describe description detail detailed details display displayed do does "
    "elaborate elements examine explain extensive following for give given going happening here how illustrate image "
    "in informative is it its key main manner many me narrate narrative of on one open ended or out photo photograph "
    "picture please presented provide provided rundown scene see short shown snapshot succinct succinctly summarise "
    "summarize summary tell that the there these thing things this thorough to us visual walk what which who why with "
    "within write you your"
)
_GENERIC_WORDS = frozenset(_GENERIC.split())


def normalized(question: str) -> str:
    """Returns a question without what does not distinguish it: case, white space, placeholders, added instructions."""
    text = placeholders.remove(question).replace("’", "'")
    text = _ADDED.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.split()).strip(_EDGES)


def is_generic(question: str) -> bool:
    """Whether a normalized question fits any picture, such as "describe the image"."""
    words = re.findall(r"\w+", question)
    return sum(map(len, words)) < _MIN_LETTERS or _GENERIC_WORDS.issuperset(words)


def questions_of(sample: Sample) -> Iterator[str]:
    """Yields what the human says in a sample, as it is written."""
    return (turn.text for turn in sample.turns if turn.role == "user" and turn.text)
