"""`llava eval score llava-bench`: the figures of summarize_gpt_review.py, and those without unparsed verdicts."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from llava.eval.reviews import parse_scores, read_reviews, summarize, table
from tests.command import assert_one_line_error, run, run_well
from tests.eval.science import lines


def review(i: int, scores: Any, category: str | None = "conv", key: str = "tuple") -> dict[str, Any]:
    """A verdict as eval_gpt_review_bench.py writes it."""
    named = {} if category is None else {"category": category}
    return {
        "id": i + 1,
        "question_id": i,
        "answer1_id": i,
        "answer2_id": "x",
        **named,
        "content": "8 9\n…",
        key: scores,
    }


def random_reviews(n: int, seed: int, steps: int = 2) -> list[dict[str, Any]]:
    """Verdicts in three categories and in none, with scores in whole steps from 1 to 10, some unparsed."""
    rng = random.Random(seed)
    made = []
    for i in range(n):
        scores = [rng.randrange(steps, 10 * steps + 1) / steps for _ in range(2)]
        category = rng.choice(["llava_bench_conv", "llava_bench_detail", "llava_bench_complex", None])
        made.append(review(i, [-1, -1] if rng.random() < 0.1 else scores, category, rng.choice(["tuple", "score"])))
    return made


def figures(reviews: list[dict[str, Any]], *, as_published: bool) -> dict[str, list[Any]]:
    """The original's figures by category, with numpy as there."""
    groups: dict[str, list[Any]] = {"all": []}
    for one in reviews:
        scores = one["tuple"] if "tuple" in one else one["score"]
        for group in {"all", one.get("category", "all")}:
            groups.setdefault(group, []).append(scores)
    found = {}
    for group, pairs in groups.items():
        used = [pair for pair in pairs if as_published or pair != [-1, -1]]
        stats = [round(x, 3) for x in np.asarray(used).mean(0).tolist()]
        values = [round(stats[1] / stats[0] * 100, 1), round(stats[0] * 10, 1), round(stats[1] * 10, 1)]
        found[group] = [*values, len(used), sum(pair == [-1, -1] for pair in pairs)]
    return found


def scored(*args: Any) -> list[dict[str, Any]]:
    return list(json.loads(run_well("eval", "score", "llava-bench", "--json", *args).stdout))


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize(("seed", "steps"), [(0, 1), (1, 2), (2, 10), (3, 7)])
def test_figures_equal_those_of_the_original(as_published: bool, seed: int, steps: int, tmp_path: Path) -> None:
    for n in (60, 61, 90, 1000):
        reviews = random_reviews(n, seed, steps)
        (tmp_path / "reviews.jsonl").write_bytes(lines(*reviews))
        found = summarize("reviews", read_reviews(tmp_path / "reviews.jsonl"), as_published=as_published)
        assert found[0].category == "all"
        assert [one.category for one in found] == sorted(one.category for one in found)
        ours = {one.category: [one.relative, one.reference, one.candidate, one.n, one.unparsed] for one in found}
        assert ours == figures(reviews, as_published=as_published)


def test_the_questions_of_llava_bench_coco_are_scored_by_category(shared: Path, tmp_path: Path) -> None:
    questions = (shared / "data" / "llava_bench_coco" / "qa90_questions.jsonl").read_text(encoding="utf-8")
    rng = random.Random(0)
    reviews = [
        review(one["question_id"], [rng.randint(5, 10), rng.randint(1, 10)], one["category"])
        for one in map(json.loads, questions.splitlines())
    ]
    (tmp_path / "review.jsonl").write_bytes(lines(*reviews))
    found = scored("--reviews", tmp_path / "review.jsonl")
    assert [(one["category"], one["n"]) for one in found] == [
        ("all", 90),
        ("complex", 30),
        ("conv", 30),
        ("detail", 30),
    ]
    wanted = figures(reviews, as_published=True)
    assert {one["category"]: [one["relative"], one["reference"], one["candidate"]] for one in found} == {
        category: values[:3] for category, values in wanted.items()
    }


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 9\nThe second …", (8, 9)),
        ("8,9", (8, 9)),
        ("8.5 9", (8.5, 9)),
        ("8, 9", (-1, -1)),  # a comma and a space are two separators, in the original too
        ("8  9", (-1, -1)),
        ("8 9 ", (-1, -1)),
        ("\n8 9", (-1, -1)),
        ("8\n9", (-1, -1)),
        ("8 9 7", (-1, -1)),
        ("8/10 9/10", (-1, -1)),
        ("Assistant 1: 8", (-1, -1)),
        ("eight nine", (-1, -1)),
        ("nan 9", (-1, -1)),
        ("8 1e999", (-1, -1)),
        ("", (-1, -1)),
    ],
)
def test_a_verdict_is_parsed_by_the_rule_of_the_original(
    text: str, scores: tuple[float, float], tmp_path: Path
) -> None:
    assert parse_scores(text) == scores
    (tmp_path / "a.jsonl").write_bytes(lines({"question_id": 0, "content": text}))
    assert [one.scores for one in read_reviews(tmp_path / "a.jsonl")] == [scores]


def test_means_are_rounded_to_three_decimals_before_the_ratio(tmp_path: Path) -> None:
    pairs = [[1, 2], [1, 2], [2, 3], [1, 1], [2, 9], [1, 1], [9, 1]]
    (tmp_path / "a.jsonl").write_bytes(lines(*[review(i, pair) for i, pair in enumerate(pairs)]))
    (found, _) = summarize("a", read_reviews(tmp_path / "a.jsonl"))
    assert (found.relative, found.reference, found.candidate) == (round(2.714 / 2.429 * 100, 1), 24.3, 27.1)


def test_unparsed_verdicts_are_left_out_or_averaged_in(tmp_path: Path) -> None:
    file = tmp_path / "reviews_mine.jsonl"
    file.write_bytes(lines(review(0, [8, 6]), review(1, [-1, -1]), review(2, [-1, -1], "detail")))
    both = [scored("--reviews", file), scored("--reviews", file, "--as-published")]
    keys = ["name", "category", "relative", "reference", "candidate", "n", "unparsed"]
    assert both[0] == [
        dict(zip(keys, values, strict=True))
        for values in (
            ["reviews_mine", "all", 75.0, 80.0, 60.0, 1, 2],
            ["reviews_mine", "conv", 75.0, 80.0, 60.0, 1, 1],
            ["reviews_mine", "detail", None, None, None, 0, 1],
        )
    ]
    assert [list(one.values())[2:] for one in both[1]] == [
        [66.6, 20.0, 13.3, 3, 2],  # 1.333 / 2
        [71.4, 35.0, 25.0, 2, 1],
        [100.0, -10.0, -10.0, 1, 1],
    ]


def test_a_reference_score_of_zero_has_no_ratio(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(review(0, [0, 5])))
    assert scored("--reviews", tmp_path / "a.jsonl")[0]["relative"] is None
    assert "–" in run_well("eval", "score", "llava-bench", "--reviews", tmp_path / "a.jsonl").stdout


def test_several_files_follow_each_other_in_the_order_of_the_command(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(review(0, [8, 4])))
    files = [tmp_path / f"{name}.jsonl" for name in ("b", "a", "c")]
    wanted = [("b", "all"), ("b", "conv"), ("a", "all"), ("a", "conv"), ("c", "all"), ("c", "conv")]
    for args in (["--reviews", *files], ["--reviews", files[0], "--reviews", files[1], files[2]]):
        assert [(one["name"], one["category"]) for one in scored(*args)] == wanted


def test_both_rules_are_printed_for_people(tmp_path: Path) -> None:
    file = tmp_path / "review-llava-v1.5-13b-in-the-wild.jsonl"
    file.write_bytes(lines(review(0, [8, 6], "llava_bench_complex"), review(1, [-1, -1], "llava_bench_complex")))
    command = ("eval", "score", "llava-bench", "--reviews", file)
    sound, published = run_well(*command).stdout, run_well(*command, "--as-published").stdout
    for shown, first in ((sound, "75.0"), (published, "71.4")):
        one, other = (shown.index(text) for text in ("unparsed verdicts left out", "as published: unparsed verdicts"))
        assert (one < other) == (first == "75.0")
        assert shown.index(first) < max(one, other)
        assert {"75.0", "80.0", "60.0", "71.4", "35.0", "25.0"} <= set(shown.split())
    file.write_bytes(lines(review(0, [8, 6])))
    assert "both rules give these figures" in run_well(*command).stdout


def test_the_table_fits_80_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(review(0, [8, 6], "llava_bench_complex")))
    name = "review-llava-v1.5-13b-in-the-wild"
    console = Console(width=80, file=io.StringIO())
    console.print(table(summarize(name, read_reviews(tmp_path / "a.jsonl")), "a title"))
    shown = console.file.getvalue().splitlines()
    assert max(map(len, shown)) <= 80
    assert name in "".join(line.split("  ")[0] for line in shown)
    for word in ("100·cand/ref", "unparsed", "llava_bench_complex", "75.0", "80.0", "60.0", "1         0"):
        assert word in "".join(shown)


GOOD = lines(review(0, [8, 6]), review(1, [9, 7]))


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD,
        GOOD.replace(b"\n", b"\r\n\r\n"),
        b"\n \t\n" + GOOD.rstrip(b"\n"),
        json.dumps([json.loads(line) for line in GOOD.splitlines()], indent=1).encode(),
        lines(*[{"tuple": one} for one in ([8, 6], [9, 7])]),
        lines(*[review(i, one) | {"score": one} for i, one in enumerate([[8, 6], [9, 7.0]])]),
        lines(*[review(i, one) | {"category": None} for i, one in enumerate([[8, 6], [9, 7]])]),
    ],
    ids=["bom", "crlf and blank lines", "no last line end", "array", "scores only", "both keys", "no category"],
)
def test_harmless_differences_change_no_figure(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    found = scored("--reviews", tmp_path / "a.jsonl")[0]
    assert list(found.values()) == ["a", "all", 76.5, 85.0, 65.0, 2, 0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "contains no verdicts"),
        (b"\n\n", "contains no verdicts"),
        (GOOD + b'{"tuple": [8,', "line 3, where the file ends: not valid JSON"),
        (b"8 9\n" + GOOD, "line 1: not valid JSON"),
        (GOOD + b"[8, 9]\n", "line 3: found [8, 9]"),
        (GOOD + lines({"question_id": 1, "text": "8 9"}), "line 3: has neither tuple, score nor content"),
        (GOOD + lines({"question_id": 1, "content": 89}), "line 3: has neither tuple, score nor content"),
        (GOOD + lines(review(2, [8])), "line 3: tuple is [8]"),
        (GOOD + lines(review(2, [8, 9, 7])), "line 3: tuple is [8, 9, 7]"),
        (GOOD + lines(review(2, [8, 9, 7], key="score")), "line 3: score is [8, 9, 7]"),
        (GOOD + lines(review(2, "8 9")), "line 3: tuple is '8 9'"),
        (GOOD + lines(review(2, 8)), "line 3: tuple is 8"),
        (GOOD + lines(review(2, None)), "line 3: tuple is None"),
        (GOOD + lines(review(2, ["8", "9"])), "line 3: tuple is ['8', '9']"),
        (GOOD + lines(review(2, [True, False])), "line 3: tuple is [True, False]"),
        (GOOD + lines(review(2, [[8, 9], [8, 9]])), "line 3: tuple is [[8, 9]"),
        (GOOD + lines(review(2, [float("nan"), 9])), "line 3: tuple is [nan, 9]"),
        (GOOD + lines(review(2, [8, float("inf")])), "line 3: tuple is [8, inf]"),
        (GOOD + lines(review(2, [10**400, 9])), "line 3: tuple is [1000"),
        (GOOD + b'{"tuple": [' + b"9" * 5000 + b", 9]}\n", "line 3"),
        (GOOD + lines(review(2, [1e300, 9])), "line 3: tuple is [1e+300, 9]"),
        (GOOD + lines(review(2, [8, 9]) | {"score": [9, 8]}), "line 3: tuple and score differ"),
        (GOOD + lines(review(2, [8, 9], "all")), "line 3: category is 'all'"),
        (GOOD + lines(review(2, [8, 9], "")), "line 3: category is ''"),
        (GOOD + lines(review(2, [8, 9]) | {"category": 5}), "line 3: category is 5"),
        (GOOD + lines(review(2, [8, 9]) | {"question_id": [5]}), "line 3: question_id is [5]"),
        (GOOD + b'{"tuple": [8, 9], "category": "\xff"}\n', "line 3: not UTF-8 text"),
    ],
)
def test_a_malformed_line_is_refused_in_one_line_that_names_it(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert_one_line_error(run("eval", "score", "llava-bench", "--reviews", tmp_path / "a.jsonl"), "a.jsonl", said)


def test_what_counts_although_it_is_odd_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(review(0, [8, 11]), review(0, [8, 9]), review(1, [-1, 5]), review(2, [-1, -1])))
    found = summarize("a", read_reviews(file))[0]
    assert (found.n, found.unparsed, found.reference) == (3, 1, 50.0)
    assert "2 verdicts with a score that is not from 0 to 10, counted as it is" in caplog.text
    assert "1 verdict on a question that has one already; all count" in caplog.text


def test_names_that_cannot_be_printed_are_escaped_in_the_table(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(review(0, [8, 6], "\ud800\x1b[31m")))
    assert r"\ud800\x1b[31m" in run_well("eval", "score", "llava-bench", "--reviews", tmp_path / "a.jsonl").stdout
