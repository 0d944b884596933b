"""Advice about scores of answers, verdicts and texts."""

from tests.advice.table import Run, Steps, World, advice
from tests.eval.science import answer, lines, problem, write_problems


def score(w: World, *more: object) -> Run:
    (w / "answers.jsonl").write_bytes(lines(answer("1", "A"), answer("2", "B")))
    files = write_problems(w.tmp, {"1": problem(1)}, {"test": ["1", "2"], "minitest": ["1"]})
    return ("eval", "score", "scienceqa", "--predictions", w / "answers.jsonl", *files, *more)


@advice("{}: has no split {}; choose one of {} with --split")
def a_split_that_does_not_exist(w: World) -> Steps:
    said = yield score(w, "--split", "val")
    assert "test, minitest" in said.text
    yield score(w, "--split", "minitest")


@advice("{}: lacks {} of the {} of the split ({}); add --skip-missing-problems to leave them out")
def a_split_with_more_ids_than_problems(w: World) -> Steps:
    yield score(w)
    yield score(w, "--skip-missing-problems")


@advice("{}: tuple and score differ; keep the one that counts")
def two_pairs_of_scores(w: World) -> Steps:
    file = w / "reviews.jsonl"
    file.write_bytes(lines({"tuple": [8, 9], "score": [9, 8]}))
    yield ("eval", "score", "llava-bench", "--reviews", file)
    file.write_bytes(lines({"tuple": [8, 9]}))


def perplexity(w: World, *more: object) -> Run:
    (w / "text.txt").write_text("A plain text.")
    return ("eval", "perplexity", w / "text.txt", "-m", w.llama, *more)


@advice("windows have {} tokens, but the cache holds {}; reduce context= (--context) or raise")
def windows_longer_than_the_cache(w: World) -> Steps:
    said = yield perplexity(w, "--cache-memory", "1MB")
    n = said.text.split("the cache holds ")[-1].split(";")[0]
    yield perplexity(w, "--cache-memory", "1MB", "--context", n)
