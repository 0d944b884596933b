"""The proof that attention maps mean something: its parts, and the whole on a few scenes."""

import random
from pathlib import Path

import pytest
from PIL import Image

import llava
from examples.tiny import attend
from examples.tiny.glyphs import Glyphs

GLYPHS = Glyphs.load(Path(__file__).parent / "glyphs")
TOKENS = [" There", " is", " a", " hot", " d", "og", ",", " a", " dog", "."]


@pytest.mark.parametrize(("name", "expected"), [("hot dog", [3, 4, 5]), ("there", [0]), ("lion", [])])
def test_the_tokens_of_a_name_are_found(name: str, expected: list[int]) -> None:
    assert attend.tokens_of(name, TOKENS) == expected


def test_a_piece_is_connected_and_follows_the_most_attention() -> None:
    shares = {(r, c): 0.0 for r in range(4) for c in range(4)}
    shares |= {(0, 0): 1.0, (0, 1): 0.5, (1, 1): 0.4, (3, 3): 0.9}
    assert attend.piece(shares, 3) == {(0, 0), (0, 1), (1, 1)}


def test_a_piece_elsewhere_has_the_same_shape_and_no_common_patch() -> None:
    patches, chosen = {(r, c) for r in range(4) for c in range(5)}, {(0, 0), (0, 1), (1, 1)}
    for seed in range(20):
        other = attend.elsewhere(patches, chosen, random.Random(seed))
        assert other
        assert other <= patches - chosen
        top, left = min(r for r, _ in other), min(c for _, c in other)
        assert {(r - top, c - left) for r, c in other} == chosen
    assert attend.elsewhere(chosen, chosen, random.Random(0)) is None


def test_covering_changes_only_what_is_in_the_boxes() -> None:
    image = Image.new("RGB", (6, 4), "red")
    image.paste("blue", (3, 0, 6, 4))
    after = attend.covered(image, [(0.0, 0.0, 2.0, 1.0), (4.0, 3.0, 6.0, 4.0)])
    changed = {(x, y) for y in range(4) for x in range(6) if after.getpixel((x, y)) != image.getpixel((x, y))}
    assert changed == {(0, 0), (1, 0), (4, 3), (5, 3)}
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_intervals_contain_the_rates() -> None:
    rate = attend._rate(30, 100)
    assert rate["rate"] == 0.3
    assert rate["95 %"] == pytest.approx([0.2189, 0.3958], abs=1e-4)  # R: prop.test(30, 100, correct=FALSE)
    ratio = attend._ratio(60, 6, 100)
    assert ratio["ratio"] == 10
    assert ratio["95 %"] == pytest.approx([4.53, 22.07], rel=0.01)  # exp(log(10) +- 1.96 * sqrt(1/60 + 1/6 - 2/100))


def test_covering_what_a_name_looks_at_hides_the_thing_and_covering_another_place_does_not() -> None:
    found = attend.measure(llava.load(device="cpu"), GLYPHS, 40, seed=1)
    on, off = (found[key] for key in ("what its name looks at is covered", "the same shape elsewhere"))
    assert on["of"] == off["of"] > 30
    assert on["rate"] > 0.85
    assert off["rate"] < 0.17
    assert found["times as often"]["ratio"] >= 5
