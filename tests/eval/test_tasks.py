"""The tasks of `llava eval run`, on small benchmarks in the original's layouts."""

import io
import itertools
import json
import logging
import random
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from llava.errors import ConfigError, DataError
from llava.eval.metrics import PERCEPTION, MmeAnswer, mme, pope
from llava.eval.tables import read_table, workbook
from llava.eval.task import (
    Answered,
    Data,
    Item,
    Measured,
    Question,
    Scores,
    Task,
    check_images,
    figures_of,
    read_questions,
    scores,
)
from llava.eval.task_run import TaskRun
from llava.eval.tasks import TASKS, task_named
from tests.command import run
from tests.eval.benchmarks import (
    BENCHMARKS,
    GQA,
    MM_VET,
    MMBENCH_DEV,
    MMBENCH_TEST,
    MME,
    POPE,
    SCIENCEQA,
    SEED,
    VQAV2_TEST,
    VQAV2_VAL,
    Benchmark,
    mmbench_rows,
)

every_benchmark = pytest.mark.parametrize("benchmark_files", BENCHMARKS.values(), ids=list(BENCHMARKS))


def read(benchmark: Benchmark, root: Path) -> list[Question]:
    return read_questions(task_named(benchmark.task), benchmark.write(root))


def replied(benchmark: Benchmark, questions: list[Question]) -> list[Answered]:
    return [Answered(one, benchmark.replies[one.id]) for one in questions if one.id in benchmark.replies]


def scored(benchmark: Benchmark, root: Path) -> Scores:
    questions = read(benchmark, root)
    return scores(task_named(benchmark.task), replied(benchmark, questions), n_questions=len(questions))


def test_every_task_has_a_benchmark_here() -> None:
    of_their_own = {name for name, task in TASKS.items() if task.judged or task.included or isinstance(task, Measured)}
    assert {one.task for one in BENCHMARKS.values()} == set(TASKS) - of_their_own


# ------------------------------------------------------------------------------------------------------------ contract


@every_benchmark
def test_prompts_and_pictures_are_those_of_the_original_scripts(benchmark_files: Benchmark, tmp_path: Path) -> None:
    task, data = task_named(benchmark_files.task), benchmark_files.write(tmp_path)
    questions = read_questions(task, data)
    assert {one.id: task.prompt(one) for one in questions} == benchmark_files.prompts
    assert len({one.id for one in questions}) == len(questions)
    found = {
        one.id: str(image.relative_to(data.folder))
        for one in questions
        for image in one.images
        if isinstance(image, Path)
    }
    assert found == benchmark_files.pictures
    check_images(questions)


@every_benchmark
def test_figures_are_those_computed_by_hand(benchmark_files: Benchmark, tmp_path: Path) -> None:
    found = scored(benchmark_files, tmp_path)
    assert found.figures == pytest.approx(benchmark_files.figures)
    assert found.value == pytest.approx(benchmark_files.value)
    assert found.details == pytest.approx(dict(benchmark_files.details))
    assert (found.n, found.unanswered) == (len(benchmark_files.replies), 0)
    assert bool(found.note) == (found.value is None)


@every_benchmark
def test_figures_follow_from_the_items_in_scores_json(benchmark_files: Benchmark, tmp_path: Path) -> None:
    found = scored(benchmark_files, tmp_path)
    kept = json.loads(found.json())
    items = [Item(id=id, sums=tuple(one["sums"]), groups=tuple(one["groups"])) for id, one in kept["items"].items()]
    again = figures_of(task_named(benchmark_files.task), items)
    assert again == pytest.approx(kept["figures"])
    assert task_named(benchmark_files.task).headline(again) == pytest.approx(kept["value"])


@every_benchmark
def test_any_part_of_the_replies_can_be_scored(benchmark_files: Benchmark, tmp_path: Path) -> None:
    task, questions = task_named(benchmark_files.task), read(benchmark_files, tmp_path)
    for n in range(len(questions)):
        found = scores(task, replied(benchmark_files, questions)[:n], n_questions=len(questions))
        assert (found.n, found.unanswered) == (n, len(questions) - n)
        json.loads(found.json())
    assert scores(task, [], n_questions=len(questions)).value is None


@every_benchmark
def test_the_submission_is_in_the_official_layout(benchmark_files: Benchmark, tmp_path: Path) -> None:
    task, data = task_named(benchmark_files.task), benchmark_files.write(tmp_path)
    found = task.submission(replied(benchmark_files, read_questions(task, data)), data)
    texts = {name: content.decode() for name, content in found.items() if not name.endswith(".xlsx")}
    assert texts == benchmark_files.submission


@every_benchmark
def test_the_run_has_the_submission_beside_the_answers(benchmark_files: Benchmark, tmp_path: Path) -> None:
    task, data = task_named(benchmark_files.task), benchmark_files.write(tmp_path / "data")
    made = TaskRun(task=task, questions=read_questions(task, data), folder=tmp_path / "run", data=data)
    made.open({})
    for question in made.questions:
        made.add(question, benchmark_files.replies[question.id], {})
    found = made.finish({})
    assert found is not None
    assert found.value == pytest.approx(benchmark_files.value)
    wanted = task.submission(replied(benchmark_files, list(made.questions)), data)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in wanted} == wanted


@every_benchmark
def test_each_file_is_listed(benchmark_files: Benchmark) -> None:
    task = task_named(benchmark_files.task)
    split = benchmark_files.split or next(iter(task.splits), "")
    listed = [name.replace("{split}", split) for name in task.files]
    listed += [
        name.replace("{random,popular,adversarial}", part)
        for name in listed
        for part in ("random", "popular", "adversarial")
    ]
    for name in benchmark_files.files:
        assert any(name == one or (one.endswith("/") and name.startswith(one)) for one in listed), name


def test_eval_tasks_lists_names_and_files() -> None:
    listed = json.loads(run("eval", "tasks", "--json").stdout)
    assert {one["name"]: one["files"] for one in listed} == {name: dict(task.files) for name, task in TASKS.items()}
    text = run("eval", "tasks").stdout
    for name, task in TASKS.items():
        assert f"{name}: {task.title}" in text
        assert all(file.rstrip("/") in text for file in task.files)


# ------------------------------------------------------------------------------------------------------------ mistakes


def error(task: Task, data: Data) -> str | None:
    """The error that reading the questions raises. Any other exception is a failure."""
    try:
        read_questions(task, data)
    except (DataError, ConfigError) as found:
        text = str(found)
        assert "\n" not in text, text
        assert str(data.folder) in text, text
        return text
    return None


def changed(benchmark: Benchmark, name: str, text: str) -> Benchmark:
    return replace(benchmark, files={**benchmark.files, name: text})


FILES = [pytest.param(one, name, id=f"{id} {name}") for id, one in BENCHMARKS.items() for name in one.files]


@pytest.mark.parametrize(("benchmark_files", "name"), FILES)
def test_a_file_that_is_missing_empty_torn_or_something_else_is_named(
    benchmark_files: Benchmark, name: str, tmp_path: Path
) -> None:
    task, data = task_named(benchmark_files.task), benchmark_files.write(tmp_path)
    file, text = data.folder / name, benchmark_files.files[name].rstrip()
    torn = text[: -len(text.rpartition("\n")[2]) // 2]
    spare = benchmark_files is SCIENCEQA and name == "pid_splits.json"  # its file of questions is enough
    for broken in ["", "\n", torn, "[1]", "null", "3", '"x"', "[]", "{}", "[" * 10_000, 'a\tb\n"c', None]:
        file.unlink()
        if broken is not None:
            file.write_text(broken)
        said = error(task, data)
        if spare or (broken is None and name == "llava_test_CQM-A.json"):
            assert said is None
        else:
            assert said is not None
            assert file.name in said, (broken, said)
        file.write_text(text)


def damaged(value: Any) -> Iterator[Any]:
    """Yields copies of a JSON value in which one part is missing or something else."""
    yield from (None, 3.5, True, [], {}, "x")
    if isinstance(value, dict):
        for key, one in value.items():
            yield {other: value[other] for other in value if other != key}
            yield from ({**value, key: worse} for worse in damaged(one))
    if isinstance(value, list):
        for i, one in enumerate(value[:2]):
            yield [*value[:i], *value[i + 1 :]]
            yield from ([*value[:i], worse, *value[i + 1 :]] for worse in damaged(one))


def variants(name: str, text: str) -> Iterator[str]:
    """Yields versions of a JSON file, each with one part damaged."""
    if name.endswith(".jsonl") or name.startswith("coco/"):
        first, *rest = map(json.loads, text.splitlines())
        yield from ("\n".join(map(json.dumps, [worse, *rest])) for worse in damaged(first))
        yield "\n".join(map(json.dumps, [first, first, *rest]))
    elif name.endswith(".json"):
        yield from map(json.dumps, damaged(json.loads(text)))
    elif name.endswith(".tsv"):
        cells = [line.split("\t") for line in text.splitlines()]
        for i, j in itertools.product(range(len(cells)), range(len(cells[0]))):
            for worse in ("", "x", '"', "9" * 30):
                yield "\n".join(
                    "\t".join([*row[:j], worse, *row[j + 1 :]] if k == i else row) for k, row in enumerate(cells)
                )


@pytest.mark.parametrize(("benchmark_files", "name"), FILES)
def test_a_damaged_part_is_harmless_or_an_error_in_one_line(
    benchmark_files: Benchmark, name: str, tmp_path: Path
) -> None:
    task, data = task_named(benchmark_files.task), benchmark_files.write(tmp_path)
    for text in variants(name, benchmark_files.files[name]):
        (data.folder / name).write_text(text)
        error(task, data)  # fails for any other exception


def row(benchmark: Benchmark, name: str, number: int, **values: Any) -> Benchmark:
    """Changes keys of a line of a file; None removes one."""
    lines = [json.loads(line) for line in benchmark.files[name].splitlines()]
    lines[number] = {key: value for key, value in (lines[number] | values).items() if value is not None}
    return changed(benchmark, name, "".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("benchmark_files", "wanted"),
    [
        (
            row(GQA, "llava_gqa_testdev_balanced.jsonl", 1, question_id=None),
            "testdev_balanced.jsonl, line 2: question_id is None; expected the id of a question",
        ),
        (
            row(GQA, "llava_gqa_testdev_balanced.jsonl", 1, image=7),
            "testdev_balanced.jsonl, line 2: image is 7; expected a text",
        ),
        (
            row(GQA, "llava_gqa_testdev_balanced.jsonl", 2, question_id="201"),
            "testdev_balanced.jsonl, line 3: has the id '201' of .*, line 1; expected different ids",
        ),
        (
            row(GQA, "llava_gqa_testdev_balanced.jsonl", 2, question_id="9"),
            "line 3: question_id is '9', which .*testdev_balanced_questions.json lacks",
        ),
        (
            changed(GQA, "llava_gqa_testdev_balanced.jsonl", ""),
            "llava_gqa_testdev_balanced.jsonl: is empty; expected questions",
        ),
        (
            changed(GQA, "llava_gqa_testdev_balanced.jsonl", "[]"),
            "no question of gqa found; expected some in llava_gqa",
        ),
        (
            changed(MM_VET, "llava-mm-vet.jsonl", MM_VET.files["llava-mm-vet.jsonl"] + '{"question_id": 2, "ima'),
            "llava-mm-vet.jsonl, line 3, where the file ends: not valid JSON",
        ),
        (
            row(POPE, "llava_pope_test.jsonl", 1, question_id=0),
            "llava_pope_test.jsonl, line 2: has the id '0' of .*, line 1",
        ),
        (
            row(POPE, "coco/coco_pope_random.json", 1, label="maybe"),
            "llava_pope_test.jsonl, line 2: coco/coco_pope_random.json has no label for it",
        ),
        (
            changed(POPE, "coco/coco_pope_random.json", POPE.files["coco/coco_pope_random.json"] * 2),
            "has fewer questions of the category random than there are labels",
        ),
        (
            row(VQAV2_TEST, "llava_vqav2_mscoco_test-dev2015.jsonl", 0, question_id=8),
            "test-dev2015.jsonl, line 1: its question_id is not in llava_vqav2_mscoco_test2015.jsonl",
        ),
        (
            row(MME, "llava_mme.jsonl", 0, question_id="existence"),
            "llava_mme.jsonl, line 1: question_id is 'existence'; expected CATEGORY/PICTURE",
        ),
        (
            row(MME, "llava_mme.jsonl", 0, question_id="OCR/1.png"),
            "llava_mme.jsonl, line 1: 1.txt has no question 'Is there a cat",
        ),
        (
            changed(MME, "llava_mme.jsonl", MME.files["llava_mme.jsonl"].rpartition('{"question_id"')[0]),
            "llava_mme.jsonl: has 1 questions about code_reasoning/3; expected 2",
        ),
        (
            changed(MME, "MME_Benchmark_release_version/existence/1.txt", "Is it?\tPerhaps\n"),
            r"existence/1.txt, line 1: found 'Is it\?\\tPerhaps'; expected a question, a tab, and Yes or No",
        ),
        (
            row(SEED, "llava-seed-bench.jsonl", 0, question_id=9),
            "llava-seed-bench.jsonl, line 1: question_id is '9', which SEED-Bench.json lacks",
        ),
        (
            changed(MMBENCH_DEV, "mmbench_dev_20230712.tsv", "index\tquestion\tA\n"),
            "line 1: lacks the names of the columns B, image",
        ),
        (
            changed(MMBENCH_DEV, "mmbench_dev_20230712.tsv", "index\tquestion\tA\tB\timage\n1\tx\n"),
            "tsv, line 2: has 2 cells; expected 5",
        ),
        (
            changed(MMBENCH_DEV, "mmbench_dev_20230712.tsv", mmbench_rows({"index": 1, "A": "x", "answer": "B"})),
            "tsv, line 2: answer is 'B'; expected one of A",
        ),
        (
            changed(
                MMBENCH_DEV,
                "mmbench_dev_20230712.tsv",
                mmbench_rows({"index": 1, "A": "x", "answer": "A", "image": "?"}),
            ),
            r"tsv, line 2: image is '\?'; expected a picture in base64",
        ),
        (
            changed(MMBENCH_DEV, "mmbench_dev_20230712.tsv", mmbench_rows({"index": 1, "answer": "A"})),
            "tsv, line 2: has no options",
        ),
        (
            changed(MMBENCH_DEV, "mmbench_dev_20230712.tsv", mmbench_rows({"index": "one", "A": "x"})),
            "tsv, line 2: index is 'one'; expected a whole number",
        ),
    ],
)
def test_a_mistake_is_reported_with_its_file_and_line(benchmark_files: Benchmark, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=wanted):
        read(benchmark_files, tmp_path)


@pytest.mark.parametrize("key", ["question_id", "text", "image"])
def test_texts_that_no_file_can_contain_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"llava-mm-vet.jsonl, line 1: {key} is '\\ud800'"):
        read(row(MM_VET, "llava-mm-vet.jsonl", 0, **{key: "\ud800"}), tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "", "..", "a\0b"])
def test_pictures_that_cannot_exist_are_not_found(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 2 pictures not found"):
        check_images(read(row(MM_VET, "llava-mm-vet.jsonl", 0, image=name), tmp_path))


def test_a_split_is_one_of_the_task(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no split 'train' of vqav2; choose one of test-dev, val"):
        Data.of(task_named("vqav2"), tmp_path, split="train")
    with pytest.raises(ConfigError, match="there is no split 'val' of pope; it has none, omit --split"):
        Data.of(task_named("pope"), tmp_path, split="val")


# ------------------------------------------------------------------------------------------------------ single tasks


def test_questions_about_videos_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(read(SEED, tmp_path)) == 2
    assert "seed: 1 question about videos left out; --split all asks them, too" in caplog.text


@pytest.mark.parametrize(
    ("benchmark_files", "wanted"),
    [
        (MME, "1 picture with an answer to only one of two questions left out"),
        (MMBENCH_DEV, "1 question without replies to all rotations left out"),
    ],
)
def test_what_lacks_a_part_of_its_replies_is_counted_and_in_no_figure(
    benchmark_files: Benchmark, wanted: str, tmp_path: Path
) -> None:
    questions = read(benchmark_files, tmp_path)
    found = scores(
        task_named(benchmark_files.task), replied(benchmark_files, questions)[:-1], n_questions=len(questions)
    )
    assert found.note == wanted
    assert len(found.items) == len(scored(benchmark_files, tmp_path).items) - 1


def test_the_language_of_mmbench_is_that_of_the_split_whatever_the_folder_is_called(tmp_path: Path) -> None:
    task = task_named("mmbench")
    asked = {one.id: task.prompt(one) for one in read(MMBENCH_DEV, tmp_path / "mmbench_cn_2023")}
    assert asked == MMBENCH_DEV.prompts


def test_mme_equals_the_sums_of_its_own_program_on_random_replies(tmp_path: Path) -> None:
    questions, rng = read(MME, tmp_path), random.Random(3)
    for _ in range(50):
        answered = [Answered(one, rng.choice(["Yes", "no", "Maybe"])) for one in questions]
        direct = mme(
            MmeAnswer(one.question.groups[1], one.question.id.rpartition(":")[0], one.text, one.question.answer)
            for one in answered
        )
        found = scores(task_named("mme"), answered, n_questions=len(questions))
        assert found.value == pytest.approx(direct.perception)
        assert found.figures["cognition"] == pytest.approx(direct.cognition)
        wanted = {name: one.score for name, one in direct.categories.items()}
        assert {name: found.figures[name] for name in wanted} == pytest.approx(wanted)
        assert set(wanted) & set(PERCEPTION) == {"existence", "artwork"}


def test_pope_equals_scikit_learn_on_random_replies() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = random.Random(4)
    for _ in range(50):
        pairs = [(rng.choice(["Yes", "No"]), rng.choice(["yes", "no"])) for _ in range(rng.randint(4, 80))]
        said, meant = [text == "Yes" for text, _ in pairs], [label == "yes" for _, label in pairs]
        asked = [Question(id=str(i), text="", answer=label, groups=("random",)) for i, (_, label) in enumerate(pairs)]
        answered = [Answered(one, text) for one, (text, _) in zip(asked, pairs, strict=True)]
        found = scores(task_named("pope"), answered, n_questions=len(pairs))
        if any(said) or any(meant):
            assert found.figures["random"] == pytest.approx(100 * metrics.f1_score(meant, said))
            assert pope(pairs).f1 == pytest.approx(100 * metrics.f1_score(meant, said))
        assert found.details["accuracy"] == pytest.approx(100 * metrics.accuracy_score(meant, said))
        if any(said):
            assert found.details["precision"] == pytest.approx(100 * metrics.precision_score(meant, said))
        if any(meant):
            assert found.details["recall"] == pytest.approx(100 * metrics.recall_score(meant, said))


def test_gqa_and_the_groups_equal_scikit_learns_accuracy(tmp_path: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    questions, rng = read(GQA, tmp_path), random.Random(5)
    for _ in range(30):
        answered = [Answered(one, rng.choice([one.answer, one.answer.upper() + ".", "other"])) for one in questions]
        found = scores(task_named("gqa"), answered, n_questions=len(questions))
        for group in found.figures:
            some = [one for one in answered if group == "all" or group in one.question.groups]
            texts = [one.text.lower().strip(".") for one in some]
            wanted = metrics.accuracy_score([one.question.answer for one in some], texts)
            assert found.figures[group] == pytest.approx(100 * wanted)


# ------------------------------------------------------------------------------------------------------------- tables


def cells(content: bytes) -> list[dict[str, str]]:
    """The rows of a workbook, read from its XML: text by column letter."""
    name = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    sheet = ElementTree.fromstring(zipfile.ZipFile(io.BytesIO(content)).read("xl/worksheets/sheet1.xml"))
    return [
        {cell.attrib["r"].rstrip("0123456789"): "".join(cell.itertext()) for cell in line.iter(f"{name}c")}
        for line in sheet.iter(f"{name}row")
    ]


def test_the_submission_of_mmbench_has_the_columns_of_the_original(tmp_path: Path) -> None:
    task, data = task_named("mmbench"), MMBENCH_DEV.write(tmp_path)
    content = task.submission(replied(MMBENCH_DEV, read_questions(task, data)), data)["submission.xlsx"]
    names, first, second, *_ = cells(content)
    assert "".join(names) == "ABCDEFGHI"
    assert list(names.values()) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert list(first.values()) == ["8", "Which one?", "a cat", "a dog", "B", "B", "dev"]
    assert first["G"] == "B"
    assert "E" not in first
    assert second["G"] == "red"


@pytest.mark.parametrize("benchmark_files", [MMBENCH_DEV, MMBENCH_TEST], ids=["dev", "test"])
def test_pandas_reads_what_the_original_would_have_written(benchmark_files: Benchmark, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("openpyxl")
    task, data = task_named("mmbench"), benchmark_files.write(tmp_path)
    content = task.submission(replied(benchmark_files, read_questions(task, data)), data)["submission.xlsx"]
    table = pandas.read_table(next(data.folder.glob("*.tsv")))
    wanted = table.drop(columns=["hint", "category", "source", "image", "comment", "l2-category"], errors="ignore")
    wanted.insert(6, "prediction", [benchmark_files.replies[str(index)] for index in table["index"]])
    wanted.to_excel(tmp_path / "wanted.xlsx", index=False, engine="openpyxl")
    pandas.testing.assert_frame_equal(
        pandas.read_excel(io.BytesIO(content)), pandas.read_excel(tmp_path / "wanted.xlsx")
    )


def test_a_workbook_keeps_texts_as_they_are() -> None:
    rows = [["a" * 3, 5, ""], [" <&> \n", "=1+1", "ä\x00b"], ["x"] * 30]
    found = cells(workbook(rows))
    assert found[0] == {"A": "aaa", "B": "5"}
    assert found[1] == {"A": " <&> \n", "B": "=1+1", "C": "ä b"}
    assert list(found[2])[-1] == "AD"
    assert workbook(rows) == workbook(rows)


def test_a_table_equals_that_of_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    file = tmp_path / "t.tsv"
    values = {"index": ["1", "2"], "text": ['say "x"\nand\ty', "ä"], "image": ["A" * 200_000, ""]}
    pandas.DataFrame(values).to_csv(file, sep="\t", index=False)
    assert [entry.value for entry in read_table(file, ["index"])] == [
        {name: column[i] for name, column in values.items()} for i in range(2)
    ]


# ------------------------------------------------------------------------------------------------------- command line


def test_a_run_without_a_figure_says_why_and_where_the_answers_are(tmp_path: Path) -> None:
    MM_VET.write(tmp_path)
    done = run("eval", "run", "mm-vet", "--data", tmp_path, "--out", tmp_path / "run", "--max-new-tokens", 2)
    assert done.returncode == 0, done.stderr
    assert "mm-vet: no figure, since GPT-4 grades MM-Vet; the answers are in submission.json, for https" in done.stdout
    assert list(json.loads((tmp_path / "run/mm-vet/submission.json").read_text())) == ["v1_0", "v1_1"]
    assert json.loads((tmp_path / "run/mm-vet/scores.json").read_text())["value"] is None


@pytest.mark.parametrize("benchmark_files", [VQAV2_VAL, MMBENCH_DEV], ids=["vqav2 val", "mmbench dev"])
def test_llava_tiny_is_asked_and_scored(benchmark_files: Benchmark, tmp_path: Path) -> None:
    benchmark_files.write(tmp_path)
    split = ["--split", benchmark_files.split] if benchmark_files.split else []
    out = tmp_path / "run"
    options = ["--data", tmp_path, "--out", out, *split, "--max-new-tokens", 3, "--device", "cpu", "--json"]
    done = run("eval", "run", benchmark_files.task, *options)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (out / benchmark_files.task / "answers.jsonl").read_text().splitlines()]
    assert {one["question_id"]: one["prompt"] for one in answers} == {  # numbers, as the original's scripts compare
        int(id): prompt for id, prompt in benchmark_files.prompts.items()
    }
    found = json.loads(done.stdout)[benchmark_files.task]
    assert found["n"] == len(answers)
    assert found["value"] == json.loads((out / benchmark_files.task / "scores.json").read_text())["value"] is not None
