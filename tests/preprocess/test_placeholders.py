"""`<image>` is a placeholder, and `\\<image>` the literal text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.preprocess import placeholders

TEXTS = st.lists(st.sampled_from(["<image>", "\\", "<ima", "ge>", "é", " ", "\n", "a"]), max_size=12).map("".join)
derandomized = settings(max_examples=400, derandomize=True, deadline=None, database=None)


@pytest.mark.parametrize(
    ("text", "n", "escaped"),
    [
        ("no placeholder", 0, "no placeholder"),
        ("<image>", 1, r"\<image>"),
        (r"\<image>", 0, r"\<image>"),
        (r"<image>\<image><image>", 2, r"\<image>\<image>\<image>"),
        (r"\\<image>", 0, r"\\<image>"),
        ("<Image><image ></image>", 0, "<Image><image ></image>"),
    ],
)
def test_only_a_placeholder_without_a_backslash_counts(text: str, n: int, escaped: str) -> None:
    assert placeholders.count(text) == n
    assert placeholders.escape(text) == escaped
    assert placeholders.has_literal(text) == ("\\<image>" in text)


def test_splitting_drops_one_backslash_of_each_literal_and_its_flag() -> None:
    text = r"é\<image>b<image>\\<image>"
    flags = bytes(range(len(text.encode())))
    first, second = placeholders.split(text, flags)
    assert first == ("é<image>b", bytes([0, 1, *range(3, 11)]))
    assert second == (r"\<image>", bytes([18, *range(20, 27)]))


@derandomized
@given(text=TEXTS)
def test_an_escaped_text_is_one_stretch_and_loses_only_backslashes_of_literals(text: str) -> None:
    escaped = placeholders.escape(text)
    (stretch,) = placeholders.split(escaped, bytes(len(escaped.encode())))
    assert placeholders.count(escaped) == 0
    assert placeholders.escape(escaped) == escaped
    assert stretch.text == text.replace("\\<image>", "<image>")


@derandomized
@given(text=TEXTS)
def test_each_stretch_has_one_flag_a_byte_and_removing_leaves_no_placeholder(text: str) -> None:
    stretches = placeholders.split(text, bytes(len(text.encode())))
    assert len(stretches) == placeholders.count(text) + 1
    assert all(len(flags) == len(stretch.encode()) for stretch, flags in stretches)
    assert placeholders.count(placeholders.remove(text)) == 0
