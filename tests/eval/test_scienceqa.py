"""`llava eval score scienceqa`: the rules of LLaVA's eval_science_qa.py, on hand-made files."""

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from llava.data.scienceqa import Problems
from llava.eval.scienceqa import Prediction, Run, letter, open_run, read_predictions, score
from tests.command import assert_one_line_error, run, run_well
from tests.eval.science import answer, lines, problem, write_problems

TEXTS = ("A", "B. two", "The answer is C.", "The answer is A. The answer is B.", "E", "no idea", "The answer is E.")


@pytest.mark.parametrize(
    ("text", "current", "before"),
    [
        ("B", "B", None),
        ("E", "E", None),
        ("F", None, None),
        ("b", None, None),
        ("", None, None),
        ("B.", None, None),
        ("B. ", "B", None),
        ("B. the second", "B", None),
        ("B.\nthe second", None, None),
        ("F. the sixth", None, None),
        (" B", None, None),
        ("Because. The answer is B.", "B", "B"),
        ("The answer is B", None, None),  # the pattern wants one more character
        ("The answer is B, I think", "B", "B"),
        ("The answer is B\n", None, None),
        ("The answer is Z.", "Z", "Z"),
        ("The answer is A. Or: The answer is A.", None, None),
        ("C. The answer is B.", "C", "B"),  # the first rule that applies
        ("the answer is B.", None, None),
    ],
)
def test_a_letter_is_found_in_the_order_of_the_rules(text: str, current: str | None, before: str | None) -> None:
    assert letter(text, "current") == current
    assert letter(text, "before-2023-10") == before


def world(folder: Path, n: int = 40) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
    """Problems, a split, and predictions in another order, some missing, some outside the split."""
    rng = random.Random(5)
    problems = {str(i): problem(i, n_choices=2 + i % 4, answer=rng.randrange(2 + i % 4)) for i in range(n)}
    ids = [str(i) for i in range(0, n, 2)] + ["1", "3"]
    predictions = [answer(str(i), TEXTS[i % len(TEXTS)], image=i % 3 == 0) for i in range(n) if i % 10 != 4]
    rng.shuffle(predictions)
    write_problems(folder, problems, {"test": ids, "minitest": ids[:4]})
    (folder / "answers.jsonl").write_bytes(lines(*predictions))
    return problems, ids, predictions


def options(folder: Path, *more: Any) -> list[Any]:
    names = ("predictions", "answers.jsonl"), ("problems", "problems.json"), ("splits", "pid_splits.json")
    return ["eval", "score", "scienceqa", *[one for name, file in names for one in (f"--{name}", folder / file)], *more]


def scored(folder: Path, *more: Any) -> dict[str, Any]:
    return dict(json.loads(run_well(*options(folder, "--json", *more)).stdout))


def accuracy(rights: list[bool]) -> float | None:
    return sum(rights) / len(rights) * 100 if rights else None


def test_the_current_rule_counts_missing_answers_as_wrong(tmp_path: Path) -> None:
    problems, ids, predictions = world(tmp_path)
    by_id = {one["question_id"]: one for one in predictions}
    chosen = {"A": "A", "B. two": "B", "The answer is C.": "C", "E": "E", "The answer is E.": "E"}
    right, unparsed = {}, 0
    for id in ids:
        text = by_id[id]["text"] if id in by_id else None
        unparsed += text is not None and text not in chosen
        choices = "ABCDE"[: len(problems[id]["choices"])]
        right[id] = text in chosen and chosen[text] in choices and choices.index(chosen[text]) == problems[id]["answer"]
    with_image = [right[id] for id in ids if id in by_id and "<image>" in by_id[id]["prompt"]]
    found = scored(tmp_path, "--split", "test", "--rule", "current")
    assert found.pop("by") == groups(problems, right)
    assert found == {
        "count": len(ids),
        "correct": sum(right.values()),
        "accuracy": accuracy(list(right.values())),
        "image_count": len(with_image),
        "image_accuracy": accuracy(with_image),
        "unparsed": unparsed,
        "missing": sum(id not in by_id for id in ids),
    }
    assert 0 < found["correct"] < found["count"]
    assert min(found["unparsed"], found["missing"], found["image_count"]) > 0


def groups(problems: dict[str, Any], right: dict[str, bool]) -> dict[str, dict[str, float | None]]:
    """Accuracies by group, from a plain reading of the problems."""
    given = {id: problems[id] for id in right}
    subjects = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
    members = {
        "subject": {name: [id for id in given if given[id]["subject"] == subjects[name]] for name in subjects},
        "context": {
            "TXT": [id for id in given if given[id]["hint"]],
            "IMG": [id for id in given if given[id]["image"]],
            "NO": [id for id in given if not given[id]["hint"] and not given[id]["image"]],
        },
        "grade": {
            "G1-6": [id for id in given if int(given[id]["grade"][5:]) <= 6],
            "G7-12": [id for id in given if int(given[id]["grade"][5:]) > 6],
        },
    }
    return {
        group: {name: accuracy([right[id] for id in ids]) for name, ids in names.items()}
        for group, names in members.items()
    }


@pytest.mark.parametrize("seed", [0, 7])
def test_the_rule_before_october_2023_draws_in_the_order_of_the_file(seed: int, tmp_path: Path) -> None:
    problems, ids, predictions = world(tmp_path)
    rng, right, expected, unparsed = random.Random(seed), {}, 0.0, 0
    for one in predictions:
        if (id := one["question_id"]) not in ids:
            continue
        n, letters = len(problems[id]["choices"]), re.findall("The answer is ([A-Z]).", one["text"])
        unparsed += len(letters) != 1
        if len(letters) == 1 and letters[0] in "ABCDE"[:n]:
            right[id] = "ABCDE".index(letters[0]) == problems[id]["answer"]
            expected += right[id]
        else:  # also a letter that is none of the choices
            right[id] = rng.choice(range(n)) == problems[id]["answer"]
            expected += 1 / n
    found = scored(tmp_path, "--rule", "before-2023-10", *(["--seed", seed] if seed else []))
    assert (found["count"], found["correct"], found["unparsed"]) == (len(right), sum(right.values()), unparsed)
    assert found["missing"] == len(ids) - len(right)
    assert found["accuracy"] == accuracy(list(right.values()))
    assert found["by"] == groups(problems, right)
    shown = run_well(*options(tmp_path, "--rule", "before-2023-10", "--seed", seed)).stdout
    assert f"expected accuracy: {expected / len(right) * 100:.2f} %" in shown


def test_the_keys_of_the_json_are_exactly_those_that_are_documented(tmp_path: Path) -> None:
    world(tmp_path)
    found = scored(tmp_path)
    assert list(found) == [
        "count", "correct", "accuracy", "image_count", "image_accuracy", "unparsed", "missing", "by"
    ]  # fmt: skip
    assert {group: list(names) for group, names in found["by"].items()} == {
        "subject": ["NAT", "SOC", "LAN"],
        "context": ["TXT", "IMG", "NO"],
        "grade": ["G1-6", "G7-12"],
    }


def test_without_pictures_in_the_prompts_their_accuracy_is_null(tmp_path: Path) -> None:
    write_problems(tmp_path, {"2": problem(2)}, {"test": ["2"]})
    (tmp_path / "answers.jsonl").write_bytes(lines({"question_id": "2", "text": "A"}))
    found = scored(tmp_path)
    assert (found["image_count"], found["image_accuracy"]) == (0, None)
    assert found["by"]["context"] == {"TXT": None, "IMG": 100.0, "NO": None}  # the problem has a picture


def outputs(predictions: list[dict[str, Any]]) -> bytes:
    """The file that the original calls --output-result."""
    texts = {one["question_id"]: one["text"] for one in predictions} | {"4": "FAILED"}  # which has no answer
    return json.dumps({"acc": 1.0, "correct": 1, "count": 2, "results": {}, "outputs": texts}, indent=2).encode()


def analyses(predictions: list[dict[str, Any]]) -> bytes:
    """The file that the original calls --output-file."""
    values = [
        {"question_id": one["question_id"], "pred": one["text"], "question": one["prompt"]} for one in predictions
    ]
    values.append({"question_id": "4", "pred": "FAILED", "question": "Unknown"})  # which has no answer
    return json.dumps({"correct": values[:5], "incorrect": values[5:]}, indent=2).encode()


@pytest.mark.parametrize("rule", ["current", "before-2023-10"])
@pytest.mark.parametrize(
    "write",
    [
        outputs,
        analyses,
        lambda predictions: json.dumps(predictions, indent=1).encode(),
        lambda predictions: b"\xef\xbb\xbf" + lines(*predictions),
        lambda predictions: lines(*predictions).replace(b"\n", b"\r\n\r\n"),
        lambda predictions: b"\n \n" + lines(*predictions).rstrip(b"\n"),
        lambda predictions: lines(*[one | {"question_id": int(one["question_id"])} for one in predictions]),
        lambda predictions: lines(*[one | {"text": "A"} for one in predictions], *predictions),
    ],
    ids=["outputs", "analyses", "array", "bom", "crlf and blank lines", "no last line end", "integers", "repeated"],
)
def test_every_layout_of_the_original_gives_the_same_score(write: Any, rule: str, tmp_path: Path) -> None:
    *_, predictions = world(tmp_path)
    wanted = scored(tmp_path, "--rule", rule)
    (tmp_path / "answers.jsonl").write_bytes(write(predictions))
    found = scored(tmp_path, "--rule", rule)
    if write is outputs:  # has no prompts
        wanted |= {"image_count": 0, "image_accuracy": None}
    assert found == wanted


def test_repeated_answers_are_counted_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_bytes(lines(answer("1", "A"), answer("2", "B"), answer("1", "C")))
    assert [(id, one.text) for id, one in read_predictions(file).items()] == [("1", "C"), ("2", "B")]
    assert "1 repeated answer; the last answer to each question counts" in caplog.text


GOOD = lines(answer("1", "A"), answer("2", "B"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GOOD + b"{", "line 3, where the file ends: not valid JSON"),
        (GOOD + b'{"question_id": "3", "te', "line 3, where the file ends: not valid JSON"),
        (b"hello\n" + GOOD, "line 1: not valid JSON"),
        (GOOD + b"[1]\n", "line 3: found [1]"),
        (GOOD + b"null\n", "line 3: found None"),
        (GOOD + lines({"text": "A"}), "line 3: question_id is None"),
        (GOOD + lines(answer("3", "A") | {"question_id": True}), "line 3: question_id is True"),
        (GOOD + lines(answer("3", "A") | {"question_id": 1.5}), "line 3: question_id is 1.5"),
        (GOOD + lines(answer("3", "A") | {"question_id": ["3"]}), "line 3: question_id is ['3']"),
        (GOOD + lines({"question_id": "3"}), "line 3: text is None"),
        (GOOD + lines(answer("3", "A") | {"text": 1}), "line 3: text is 1"),
        (GOOD + lines(answer("3", "A") | {"prompt": None}), "line 3: prompt is None"),
        (GOOD + b'{"question_id": "\xff"}\n', "line 3: not UTF-8 text"),
        (GOOD + b'{"question_id": ' + b"9" * 5000 + b"}\n", "line 3"),
        (GOOD + b"[" * 100_000 + b"\n", "line 3: nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"outputs": [1]}', "expected a list of answers, or outputs for each id"),
        (b'{"outputs": {"7": null}}', "outputs, question '7': text is None"),
        (b'{"correct": []}', "incorrect is None"),
        (b'{"correct": [], "incorrect": [3]}', "incorrect, entry 1: found 3"),
        (b'[{"question_id": "1", "text": "A"}, 5]', "entry 2: found 5"),
    ],
)
def test_a_malformed_line_is_refused_in_one_line_that_names_it(content: bytes, said: str, tmp_path: Path) -> None:
    world(tmp_path)
    (tmp_path / "answers.jsonl").write_bytes(content)
    assert_one_line_error(run(*options(tmp_path, "--json")), "answers.jsonl", said)


def test_without_any_answer_every_question_is_missing(tmp_path: Path) -> None:
    world(tmp_path)
    (tmp_path / "answers.jsonl").write_bytes(b"")
    found = scored(tmp_path)
    assert (found["count"], found["correct"], found["accuracy"], found["missing"]) == (22, 0, 0.0, 22)
    done = run(*options(tmp_path, "--rule", "before-2023-10"))
    assert_one_line_error(done, "none of the 0 answers is about a question of the split test")


def test_ids_of_the_split_that_have_no_problem_are_counted_or_left_out(tmp_path: Path) -> None:
    problems, ids, _ = world(tmp_path)
    for id in ids[:5]:
        del problems[id]
    write_problems(tmp_path, problems, {"test": ids})
    assert_one_line_error(run(*options(tmp_path)), "problems.json", "lacks 5 of the 22 problems", "(0, 2, 4, …)")
    done = run_well(*options(tmp_path, "--skip-missing-problems", "--json"))
    assert json.loads(done.stdout)["count"] == 17
    assert "lacks 5 problems of the split test, left out" in done.stderr
    write_problems(tmp_path, {"x": problem(1)}, {"test": ids})
    done = run(*options(tmp_path, "--skip-missing-problems"))
    assert_one_line_error(done, "has none of the 22 problems of the split")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("problems.json", "[]", "found []; expected an object"),
        ("problems.json", "{", "not valid JSON"),
        ("problems.json", '{"1": 5}', "problem '1': choices is None"),
        ("problems.json", '{"1": {"choices": "AB", "answer": 0}}', "problem '1': choices is 'AB'"),
        ("problems.json", '{"1": {"choices": [], "answer": 0}}', "problem '1': choices is []"),
        ("problems.json", '{"1": {"choices": ["a", "b"], "answer": 2}}', "answer is 2; expected the index of a choice"),
        ("problems.json", '{"1": {"choices": ["a", "b"], "answer": true}}', "answer is True"),
        ("problems.json", '{"1": {"choices": ["a", "b"], "answer": NaN}}', "answer is nan"),
        ("pid_splits.json", '{"train": []}', "has no split 'test'; choose one of train with --split"),
        ("pid_splits.json", '{"test": []}', "the split 'test' is []"),
        ("pid_splits.json", '{"test": [1]}', "the split 'test' is [1]"),
        ("pid_splits.json", '{"test": "1"}', "the split 'test' is '1'"),
        ("pid_splits.json", "", "not valid JSON"),
    ],
)
def test_malformed_problems_and_splits_are_refused_in_one_line(
    file: str, content: str, said: str, tmp_path: Path
) -> None:
    write_problems(tmp_path, {"1": problem(1)}, {"test": ["1"]})
    (tmp_path / "answers.jsonl").write_bytes(GOOD)
    (tmp_path / file).write_text(content)
    assert_one_line_error(run(*options(tmp_path)), file, said)


@pytest.mark.parametrize("missing", ["answers.jsonl", "problems.json", "pid_splits.json"])
def test_a_file_that_does_not_exist_is_named(missing: str, tmp_path: Path) -> None:
    world(tmp_path)
    (tmp_path / missing).unlink()
    assert_one_line_error(run(*options(tmp_path)), missing, "cannot be read (No such file or directory)")


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = problem(1) | {"subject": "alchemy", "grade": None}
    write_problems(tmp_path, {"1": odd, "2": problem(2)}, {"test": ["1", "2", "1"]})
    opened = open_run(tmp_path / "problems.json", tmp_path / "pid_splits.json", "test", rule="current")
    assert list(opened.problems) == ["1", "2"]
    found = score({"1": Prediction("A"), "2": Prediction("A"), "99": Prediction("A")}, opened)
    assert found.all.count == 2
    assert found.by["grade"]["G1-6"].count == 1
    for said in ("1 answer is not about questions of the split test", "1 problem is without a known subject"):
        assert said in caplog.text


def test_problems_with_more_choices_than_letters_still_draw_among_all_of_them(tmp_path: Path) -> None:
    write_problems(tmp_path, {"1": problem(1, n_choices=8)}, {"test": ["1"]})
    problems = {"1": Problems(tmp_path / "problems.json")["1"]}
    assert score({"1": Prediction("no")}, Run(problems, "test", "before-2023-10")).drawn == [1 / 8]


def test_the_table_fits_80_columns_and_scoring_imports_no_torch(tmp_path: Path) -> None:
    world(tmp_path)
    shown = run_well(*options(tmp_path, "--rule", "before-2023-10")).stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"subject NAT +\d+ +\d+ +\d+\.\d\d %", shown)
    code = "import sys; from llava.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    run_well(*options(tmp_path), command=[sys.executable, "-c", code])
