"""`llava eval run`: answers, scores, interruptions, several processes, and what is refused."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

import llava
from llava.assistant import question_about
from llava.errors import DataError
from llava.eval.task import Data, Question
from llava.eval.task_run import Share, TaskRun
from llava.eval.tasks import task_named
from tests.command import assert_one_line_error, interrupt, run, run_well, start
from tests.eval.pope import SUFFIX, write_pope


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pope(tmp_path_factory.mktemp("data"), per_split=10)


def arguments(data: Path, out: Path) -> list[str]:
    return ["eval", "run", "pope", "--data", str(data), "--out", str(out), "--device", "cpu", "--batch-invariant"]


def read(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def complete(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted."""
    out = tmp_path_factory.mktemp("run") / "run"
    run_well(*arguments(data, out))
    return out


def test_answers_are_those_of_the_assistant_in_the_order_of_the_questions(data: Path, complete: Path) -> None:
    answers = read(complete / "pope" / "answers.jsonl")
    questions = read(data / "pope" / "llava_pope_test.jsonl")
    assert [one["question_id"] for one in answers] == [one["question_id"] for one in questions]  # numbers stay numbers
    assert [one["prompt"] for one in answers] == [one["text"] for one in questions]
    assert all(str(one["prompt"]).endswith(SUFFIX) for one in answers)
    assert {one["model_id"] for one in answers} == {"llava-tiny"}
    assert len({one["answer_id"] for one in answers}) == len(answers)
    vlm = llava.load(device="cpu")
    for question, answer in list(zip(questions, answers, strict=True))[::7]:
        picture = data / "pope" / "val2014" / str(question["image"])
        reply = vlm.generate(question_about(str(picture), str(question["text"])), max_new_tokens=128)
        assert answer["text"] == reply.text


def test_scores_follow_from_the_answers_and_the_record_says_what_was_run(data: Path, complete: Path) -> None:
    scores = json.loads((complete / "pope" / "scores.json").read_text())
    answers = read(complete / "pope" / "answers.jsonl")
    labels = [i % 2 == 0 for i in range(10)] * 3
    said = [not {"no", "No", "not"} & set(str(one["text"]).split(".")[0].split(" ")) for one in answers]
    for i, split in enumerate(("random", "popular", "adversarial")):
        mine = slice(10 * i, 10 * i + 10)
        both = sum(map(all, zip(labels[mine], said[mine], strict=True)))
        expected = 200 * both / (sum(labels[mine]) + sum(said[mine]))
        assert scores["figures"][split] == pytest.approx(expected)
    assert (scores["n"], scores["unanswered"]) == (30, 0)
    record = json.loads((complete / "run.json").read_text())
    assert record["model"] == {"name": "llava-tiny", "path": None, "base": None, "zoo": []}
    assert record["versions"]["llava"] == llava.__version__
    assert record["settings"]["--batch-invariant"] is True


@pytest.mark.parametrize("kills", [(3,), (1, 11, 25)])
def test_a_run_that_is_killed_continues_and_gives_the_same_files(
    kills: tuple[int, ...], data: Path, complete: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    journal = out / "pope" / "answers.partial.0.jsonl"
    for n in kills:
        process = start(*arguments(data, out), "--max-batch", "1")
        end = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= n):
            assert time.monotonic() < end
            if process.poll() is not None:
                break
            time.sleep(0.005)
        process.kill()
        process.communicate()
    before = read_lines(journal)
    with journal.open("ab") as file:
        file.write(b'{"question_id": "29", "te')  # a line that was being written
    run_well(*arguments(data, out))
    for name in ("scores.json", "answers.jsonl"):
        assert (out / "pope" / name).read_bytes() == (complete / "pope" / name).read_bytes()
    assert set(before) <= set(read_lines(out / "pope" / "answers.jsonl"))
    assert not journal.exists()


def read_lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines() if file.exists() else []


def test_ctrl_c_leaves_the_answers_so_far(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(*arguments(data, out), "--max-batch", "1")
    journal = out / "pope" / "answers.partial.0.jsonl"
    while process.poll() is None and not journal.exists():
        time.sleep(0.01)
    code, _, message = interrupt(process)
    if code:  # it may have just finished
        assert (code, "Traceback" in message) == (130, False)
        assert read_lines(journal)
    run_well(*arguments(data, out))


def test_two_processes_of_torchrun_share_the_questions(data: Path, complete: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run(*arguments(data, out), "--json", command=[*torchrun, "-m", "llava.cli"])
    assert done.returncode == 0, done.stderr
    assert (out / "pope" / "scores.json").read_bytes() == (complete / "pope" / "scores.json").read_bytes()
    assert json.loads(done.stdout)["pope"]["n"] == 30
    assert sorted(path.name for path in (out / "pope").iterdir()) == [
        ".lock", "answers.jsonl", "prompts.json", "questions.jsonl", "scores.json", "settings.json",
    ]  # fmt: skip


def shares(data: Path, folder: Path, world: int) -> list[TaskRun]:
    """A run of POPE as each of several processes has it, without a model."""
    task = task_named("pope")
    questions = task.questions(Data.of(task, data))
    return [TaskRun(task=task, questions=questions, folder=folder, share=Share(i, world)) for i in range(world)]


def answer(share: TaskRun, text: str) -> None:
    for question in share.missing():
        share.add(question, text, {})


def test_a_task_is_finished_for_every_process_once_the_last_one_is(data: Path, tmp_path: Path) -> None:
    first, last = shares(data, tmp_path / "pope", 2)
    first.open({})
    last.open({})
    answer(first, "Yes")
    assert first.finish({}) is None
    assert first.finished() is None
    answer(last, "No")
    scores = last.finish({})
    assert scores is not None
    found = first.finished()
    assert found is not None
    assert found.json() == scores.json()


def test_an_outdated_answer_of_another_process_does_not_hide_a_new_one(tmp_path: Path) -> None:
    data = write_pope(tmp_path / "data")
    *_, killed = shares(data, tmp_path / "pope", 4)
    killed.open({})
    answer(killed, "No")
    for name in ("red.png", "blue.png"):
        picture = data / "pope" / "val2014" / name
        picture.write_bytes(picture.read_bytes() + bytes(99))
    (alone,) = shares(data, tmp_path / "pope", 1)
    alone.begin()
    answer(alone, "Yes")
    assert {one["text"] for one in alone.answers().values()} == {"Yes"}
    scores = alone.finish({})
    assert scores is not None
    assert scores.n == 12


def test_a_question_that_no_file_can_contain_is_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    task = task_named("pope")
    damaged = TaskRun(task=task, questions=[Question(id="7", text="a", answer=["\ud800"])], folder=tmp_path / "pope")
    with pytest.raises(DataError, match="pope, question 7: has half of a pair of surrogates"):
        damaged.open({})
    assert not damaged.folder.exists()


def test_a_task_that_is_named_twice_is_asked_and_printed_once(data: Path, complete: Path) -> None:
    line = arguments(data, complete)
    assert run_well(*line[:3], *line[2:]).stdout == run_well(*line).stdout


def test_a_finished_run_is_scored_again_without_the_model(data: Path, complete: Path) -> None:
    before = (complete / "pope" / "scores.json").read_bytes()
    (complete / "pope" / "scores.json").unlink()
    done = run_well(*arguments(data, complete), "--json")
    assert "llava-tiny" not in done.stderr  # the line that says which model is loaded
    assert (complete / "pope" / "scores.json").read_bytes() == before


def test_other_settings_are_refused(data: Path, complete: Path) -> None:
    for more, said in (
        (["--num-beams", "2"], "--num-beams 1; this run has --num-beams 2"),
        (["--limit", "5"], "--limit"),
    ):
        done = run(*arguments(data, complete), *more)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("option", "value"), [("--num-beams", "2"), ("--model", "another")])
def test_a_run_has_one_model_and_the_same_settings_in_all_tasks(
    option: str, value: str, data: Path, complete: Path
) -> None:
    line = ["eval", "run", "gqa", *arguments(data, complete)[3:], option, value]
    assert_one_line_error(run(*line), "has answers of a run with", option, value)


def test_a_picture_that_cannot_be_read_is_a_question_without_an_answer_until_it_is_mended(tmp_path: Path) -> None:
    data, out = write_pope(tmp_path / "data"), tmp_path / "run"
    picture = data / "pope" / "val2014" / "blue.png"
    good = picture.read_bytes()
    picture.write_bytes(good[:40])
    done = run(*arguments(data, out), "--json")
    assert done.returncode == 1
    scores = json.loads(done.stdout)["pope"]
    assert (scores["n"], scores["unanswered"]) == (6, 6)
    assert "no answer: " in done.stderr
    assert "3 more questions" in done.stderr
    picture.write_bytes(good)
    assert json.loads(run_well(*arguments(data, out), "--json").stdout)["pope"]["n"] == 12


def test_questions_about_a_picture_that_has_changed_are_asked_again(tmp_path: Path) -> None:
    data, out = write_pope(tmp_path / "data"), tmp_path / "run"
    run_well(*arguments(data, out))
    picture = data / "pope" / "val2014" / "blue.png"
    picture.write_bytes((data / "pope" / "val2014" / "red.png").read_bytes() + bytes(99))
    done = run_well(*arguments(data, out))
    assert "llava-tiny" in done.stderr  # the model was loaded
    texts = {one["question_id"]: one["text"] for one in read(out / "pope" / "answers.jsonl")}
    assert len(texts) == 12


def test_what_a_run_needs_is_checked_before_the_model_is_loaded(data: Path, tmp_path: Path) -> None:
    cases = {
        ("eval", "run", "pop", "--data", data): "there is no task 'pop'; choose from",
        ("eval", "run", "pope"): "--data is missing",
        ("eval", "run", "pope", "--data", tmp_path / "none"): "which is no folder",
        ("eval", "run", "pope", "--data", tmp_path): "llava_pope_test.jsonl: not found; expected questions",
        ("eval", "run", "pope", "--data", data, "--images", tmp_path): "2 of 2 pictures not found",
        ("eval", "run", "pope", "--data", data, "--num-beams", "0"): "--num-beams is 0",
    }
    for words, said in cases.items():
        done = run(*words, "--out", tmp_path / "run", "--model", "missing/model")
        assert done.returncode == 2
        assert said in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


def test_tasks_are_listed_with_their_files() -> None:
    text = run_well("eval", "tasks").stdout
    assert "pope/llava_pope_test.jsonl: questions" in text
    listed = json.loads(run_well("eval", "tasks", "--json").stdout)
    assert "llava_pope_test.jsonl" in next(one for one in listed if one["name"] == "pope")["files"]


def test_other_weights_in_the_folder_of_the_model_are_refused(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    command = [*arguments(data, tmp_path / "run"), "--model", str(model), "--limit", "2", "--max-new-tokens", "2"]
    run_well(*command)
    run_well(*command)
    file = next(file for file in model.iterdir() if file.suffix in (".safetensors", ".bin"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = run(*command)
    assert done.returncode == 2
    assert "has answers of a run with weights" in done.stderr
