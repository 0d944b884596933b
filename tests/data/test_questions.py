"""When two questions are the same, and which fit any picture."""

import json
from pathlib import Path

import pytest

from llava.data.questions import is_generic, normalized

SAME = [
    "What is the colour of the bus?",
    "  what is\nthe COLOUR of the\tbus ?",
    "<image>\nWhat is the colour of the bus?",
    "What is the colour of the bus?\n<image>",
    "What is the colour of the bus",
    "What is the colour of the bus?\nAnswer the question using a single word or phrase.",
    "What is the colour of the bus?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",
    "What is the colour of the bus? Please answer yes or no.",
    "What is the colour of the bus?\nReference OCR token: LINE, 42, <b>\nAnswer the question using a single word or "
    "phrase.",
    "What is the colour of the bus?\uff1f",
    "What is the colour of the bus?\nAnswer with the option's letter from the given choices directly.",
    "What is the colour of the bus?\nAnswer with the option\u2019s letter from the given choices directly.",
]


def test_case_space_placeholders_and_instructions_do_not_matter() -> None:
    assert {normalized(text) for text in SAME} == {"what is the colour of the bus"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is it 3.5 m high?", "Is it 35 m high?"),
        ("Is 5 - 3 = 2?", "Is 5 + 3 = 2?"),
        ("What does the tag \\<image> do?", "What does the tag do?"),
        ("Which?\nA. left\nB. right", "Which?\nA. right\nB. left"),
    ],
)
def test_words_numbers_and_marks_matter(one: str, other: str) -> None:
    assert normalized(one) != normalized(other)


DESCRIPTIONS = """\
Describe the image concisely.
Provide a brief description of the given image.
Offer a succinct explanation of the picture presented.
Summarize the visual content of the image.
Give a short and clear explanation of the subsequent image.
Share a concise interpretation of the image provided.
Present a compact description of the photo's key features.
Relay a brief, clear account of the picture shown.
Render a clear and concise summary of the photo.
Write a terse but informative summary of the picture.
Create a compact narrative representing the image presented.
Describe the following image in detail
Share a comprehensive rundown of the presented image
Explain the various aspects of the image before you
Characterize the image using a well-detailed description
Walk through the important details of the image
Analyze the image in a comprehensive and detailed manner
What do you see happening in this image?
Provide a one-sentence caption for the provided image.
What is this?
Why?
<image>
"""


@pytest.mark.parametrize("text", DESCRIPTIONS.splitlines())
def test_requests_for_a_description_are_generic(text: str) -> None:
    assert is_generic(normalized(text))


@pytest.mark.parametrize(
    "text", ["What is the dog doing?", "How many people are there?", "Is there a bus?", "这张图片里有几辆公共汽车"]
)
def test_other_questions_are_not_generic(text: str) -> None:
    assert not is_generic(normalized(text))


def test_of_llava_bench_exactly_the_requests_for_a_description_are_generic(shared: Path) -> None:
    lines = (shared / "data" / "llava_bench_coco" / "qa90_questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["category"] for row in rows if is_generic(normalized(row["text"]))} == {"detail"}
    assert all(is_generic(normalized(row["text"])) for row in rows if row["category"] == "detail")
