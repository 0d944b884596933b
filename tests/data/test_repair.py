"""Every kind of fault is found and repaired."""

import random

import pytest

from llava.data.layouts import Sample
from llava.data.repair import find_faults, repair
from llava.preprocess import placeholders
from llava.preprocess.conversation import Turn


def sample(*turns: tuple[str, str], images: tuple[str, ...] = ()) -> Sample:
    roles = {"h": "user", "g": "assistant"}
    return Sample("x", tuple(Turn(roles[role], text) for role, text in turns), images)  # type: ignore[arg-type]


ONE, TWO = ("a.jpg",), ("a.jpg", "b.jpg")


Q, A = ("h", "<image>\nq"), ("g", "a")


REPAIRED: list[tuple[Sample, set[str], Sample | None]] = [
    (sample(Q, A, images=ONE), set(), sample(Q, A, images=ONE)),
    (sample(("h", "q"), A), set(), sample(("h", "q"), A)),
    (sample(("h", "<image>"), A, images=ONE), set(), sample(("h", "<image>"), A, images=ONE)),
    (sample(Q, A, ("h", "<image> too"), A, images=TWO), set(), sample(Q, A, ("h", "<image> too"), A, images=TWO)),
    (sample(("g", "hi"), Q, A, images=ONE), {"leading_answer"}, sample(Q, A, images=ONE)),
    (sample(Q, A, ("h", "r"), images=ONE), {"trailing_question"}, sample(Q, A, images=ONE)),
    (sample(Q, ("h", "r"), A, images=ONE), {"same_side_twice"}, sample(("h", "<image>\nq\nr"), A, images=ONE)),
    (sample(("h", "q"), A, ("g", "b")), {"same_side_twice"}, sample(("h", "q"), ("g", "a\nb"))),
    (sample(Q, ("g", " \n"), ("h", "r"), A, images=ONE), {"empty_turn"}, sample(("h", "<image>\nr"), A, images=ONE)),
    (sample(("h", ""), A, ("h", "r"), A), {"empty_turn"}, sample(("h", "r"), A)),
    (sample(("h", "q"), A, images=ONE), {"missing_placeholder"}, sample(Q, A, images=ONE)),
    (sample(Q, A, images=TWO), {"missing_placeholder"}, sample(("h", "<image>\n<image>\nq"), A, images=TWO)),
    (sample(("h", "<image>\n<image> q\n<image>"), A, images=ONE), {"surplus_placeholder"}, sample(Q, A, images=ONE)),
    (
        sample(("h", "<image>\nWhat is an <image> tag?"), A, images=ONE),
        {"surplus_placeholder"},
        sample(("h", "<image>\nWhat is an \\<image> tag?"), A, images=ONE),
    ),
    (
        sample(Q, ("g", "<image> and\n<image>\n"), images=ONE),
        {"surplus_placeholder", "late_placeholder"},
        sample(Q, ("g", "\\<image> and\n\\<image>"), images=ONE),
    ),
    (
        sample(("h", "Compare <image> and b"), A, images=TWO),
        {"missing_placeholder"},
        sample(("h", "<image>\n<image>\nCompare \\<image> and b"), A, images=TWO),
    ),
    (sample(Q, A), {"no_picture"}, None),
    (sample(("h", "q"), A, Q, ("g", "<image>")), {"no_picture"}, None),
    (
        sample(("h", "q"), A, ("h", "r\n<image>"), A, images=ONE),
        {"late_placeholder"},
        sample(Q, A, ("h", "r"), A, images=ONE),
    ),
    (
        sample(("h", "q"), ("g", "a <image>"), images=ONE),
        {"late_placeholder"},
        sample(Q, ("g", r"a \<image>"), images=ONE),
    ),
    (
        sample(Q, A, ("h", "r"), ("g", "<image>"), images=ONE),
        {"surplus_placeholder", "late_placeholder"},
        sample(Q, A, images=ONE),
    ),
    (
        sample(Q, A, ("h", "<image>"), A, images=ONE),
        {"surplus_placeholder", "late_placeholder"},
        sample(Q, A, images=ONE),
    ),
    (sample(("h", r"<image>\<image>"), A, images=ONE), set(), sample(("h", r"<image>\<image>"), A, images=ONE)),
    (
        sample(("h", r"\<image>?"), A, images=ONE),
        {"missing_placeholder"},
        sample(("h", "<image>\n\\<image>?"), A, images=ONE),
    ),
    (sample(("h", r"\<image>?"), ("g", r"\<image>")), set(), sample(("h", r"\<image>?"), ("g", r"\<image>"))),
    (sample(Q, images=ONE), {"trailing_question", "nothing_to_learn"}, None),
    (sample(A), {"leading_answer"}, None),
    (sample(("h", "q"), ("g", "")), {"empty_turn", "nothing_to_learn"}, None),
]


@pytest.mark.parametrize(("broken", "kinds", "repaired"), REPAIRED)
def test_each_fault_is_found_and_repaired_by_its_rule(broken: Sample, kinds: set[str], repaired: Sample | None) -> None:
    assert {fault.kind for fault in find_faults(broken)} == kinds
    assert repair(broken) == repaired
    assert repaired is None or not find_faults(repaired)


def test_a_repaired_sample_never_has_a_fault() -> None:
    rng = random.Random(0)
    texts = ["", " ", "q", "<image>", "<image>\nq", "a <image> b <image>", r"\<image>", "<ima<image>ge>"]
    for _ in range(3000):
        turns = [(rng.choice("hg"), rng.choice(texts)) for _ in range(rng.randint(1, 7))]
        given = sample(*turns, images=("a.jpg",) * rng.randint(0, 3))
        repaired = repair(given)
        assert repaired is None or (repaired.turns and not find_faults(repaired) and len(repaired.turns) % 2 == 0)
        assert repaired is None or repaired.images == given.images
        asked = any(placeholders.count(turn.text or "") for turn in given.turns)
        assert repaired is None or not asked or "<image>" in (repaired.turns[0].text or "")


@pytest.mark.parametrize("n", [1, 30_000])
def test_a_long_row_of_placeholders_is_repaired_quickly(n: int) -> None:
    given = sample(("h", "q" + "\n<image> <image>" * n + "."), A, images=ONE)
    assert repair(given) == sample(("h", "<image>\nq" + "\n\\<image> \\<image>" * n + "."), A, images=ONE)
