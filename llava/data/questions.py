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
_GENERIC = (  # words about pictures and about asking, with which LLaVA's data asks for descriptions
    "a about above account all an analysis analyze and any are aspects at be before break brief briefly but can "
    "caption characteristics characterize clarify clear closely compact comprehensive concise concisely content "
    "contents could create depicted depiction describe describing description descriptive detail detailed details "
    "display displayed do does down elaborate elements ended examine exhaustive explain explanation extensive "
    "features following for give given going great happening here how illustrate image important in informative "
    "interpretation is it its key main manner many me narrate narrative of offer on one open or out photo "
    "photograph picture please portray precision present presented provide provided relay render representing rich "
    "rundown s scene see sentence share short shown snapshot subsequent succinct succinctly summarise summarize "
    "summary tell terse that the there these thing things think this thorough through to us using various visual "
    "walk well what which who why with within write you your"
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
