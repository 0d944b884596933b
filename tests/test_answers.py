"""One question about each image of a folder becomes a table, which survives broken images, kills and odd names."""

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import llava
from llava.answers import Answer, Journal, answer_all, find_pictures, open_run
from llava.errors import ConfigError, ImageError, LlavaError, PromptError
from tests import command, tiny
from tests.command import assert_one_line_error, run, run_well
from tests.conftest import PROJECT

QUESTION = 'Describe this image, please:\nwhat is "here"; and, where?'
SHORT = ("--max-new-tokens", 12, "--dtype", "float32", "--device", "cpu")
N_CROPS = 3  # of each example picture


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures of llava-tiny's world, a broken one, and what is left out of a folder."""
    folder = tmp_path_factory.mktemp("desk") / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("zoo", "beach", "kitchen"):
        with Image.open(PROJECT / f"examples/pictures/{name}.png") as picture:
            for i in range(N_CROPS):
                side = min(picture.size) - 10 * i
                picture.convert("RGB").crop((0, 0, side, side)).save(folder / f"{name}{i}.PNG")
    (folder / "broken.jpg").write_text("no image")
    (folder / "notes.txt").write_text("")
    shutil.copy(folder / "zoo0.PNG", folder / ".hidden.png")
    shutil.copy(folder / "zoo0.PNG", folder / "more" / "zoo.png")
    return folder


@pytest.fixture(scope="module")
def vlm() -> llava.Assistant:
    return llava.load(dtype="float32", device="cpu")


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table))


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# ---------------------------------------------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def table(photos: Path) -> Any:
    done = run("ask", "photos", QUESTION, "--csv", "answers.csv", *SHORT, cwd=photos.parent)
    assert done.returncode == 1  # an image has no answer
    return done


def test_a_table_has_the_answers_of_ask_for_each_image(table: Any, photos: Path, vlm: llava.Assistant) -> None:
    rows = read_csv(photos.parent / "answers.csv")
    names = sorted(path.name for path in photos.iterdir() if path.suffix in (".PNG", ".jpg"))
    assert [row["picture"] for row in rows] == [f"photos/{name}" for name in names]
    assert {row["question"] for row in rows} == {QUESTION}
    answered = [row for row in rows if not row["error"]]
    expected = [
        vlm.generate(llava.assistant.question_about(photos.parent / row["picture"], QUESTION), max_new_tokens=12)
        for row in answered
    ]
    assert [(row["answer"], int(row["tokens"]), row["finish_reason"]) for row in answered] == [
        (one.text, len(one.token_ids), one.finish_reason) for one in expected
    ]
    assert len(answered) == 3 * N_CROPS
    assert len({row["answer"] for row in answered}) >= 3  # the pictures were seen
    assert all(0 < float(row["seconds"]) < 60 for row in answered)


def test_a_broken_image_is_a_row_with_its_error(table: Any, photos: Path) -> None:
    (broken,) = [row for row in read_csv(photos.parent / "answers.csv") if row["error"]]
    error = "photos/broken.jpg: is not an image in a known format, or its header is damaged"
    assert broken == {
        **dict.fromkeys(("answer", "tokens", "seconds"), ""),
        **{"picture": "photos/broken.jpg", "question": QUESTION, "finish_reason": "error", "error": error},
    }
    assert table.stdout == "answers.csv: 9 answers, 1 error\n"


def test_what_is_left_out_of_a_folder_is_reported(table: Any, photos: Path) -> None:
    assert "photos: 1 subfolder and 1 file of other types are left out" in table.stderr
    assert command.files(photos.parent).keys() >= {"answers.csv"}
    assert not [name for name in command.files(photos.parent) if "partial" in name or "lock" in name]


def test_json_lines_have_the_rows_of_the_csv_file(table: Any, photos: Path) -> None:
    options = ("--jsonl", "answers.jsonl", "--json", *SHORT, "--max-batch", 2)
    done = run("ask", "photos", QUESTION, *options, cwd=photos.parent)
    assert json.loads(done.stdout) == {"file": "answers.jsonl", "answers": 9, "errors": 1}
    lines = [json.loads(line) for line in (photos.parent / "answers.jsonl").read_text().splitlines()]
    as_text = [{name: "" if value is None else str(value) for name, value in line.items()} for line in lines]
    assert without_seconds(as_text) == without_seconds(read_csv(photos.parent / "answers.csv"))
    assert [line["answer"] for line in lines if line["error"]] == [None]


def test_files_and_folders_are_mixed_and_each_image_has_one_row(photos: Path, tmp_path: Path) -> None:
    one = photos / "more" / "zoo.png"
    done = run_well("ask", one, photos / "more", one, "What?", "--csv", tmp_path / "a.CSV", *SHORT)
    assert [row["picture"] for row in read_csv(tmp_path / "a.CSV")] == [str(one)]
    assert done.stdout == f"{tmp_path / 'a.CSV'}: 1 answer, 0 errors\n"


def test_names_that_are_not_utf8_are_readable_text_in_both_tables(photos: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xc3\xa4.png")
    shutil.copy(photos / "zoo0.PNG", tmp_path / name)
    for out in ("a.csv", "a.jsonl"):
        run_well("ask", ".", "What?", f"--{out[2:]}", out, *SHORT, cwd=tmp_path)
    assert [row["picture"] for row in read_csv(tmp_path / "a.csv")] == ["./caf\\udce9 ä.png"]
    (line,) = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["picture"] == f"./{name}"


def test_cells_that_look_like_formulas_are_exact_and_reported(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    done = run_well("ask", photos / "more", "=1+1?", "--csv", out, *SHORT)
    assert [row["question"] for row in read_csv(out)] == ["=1+1?"]
    assert f"{out}: 1 cell begins with =, +, - or @, which spreadsheets take for formulas" in done.stderr


def test_a_carriage_return_in_an_answer_survives_the_csv_file(photos: Path, tmp_path: Path) -> None:
    question = "one\rtwo\r\nthree"
    run_well("ask", photos / "more", question, "--csv", tmp_path / "a.csv", *SHORT)
    assert [row["question"] for row in read_csv(tmp_path / "a.csv")] == [question]


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "mentions"),
    [
        (("photos", "?"), ("photos: is a folder", "add --csv OUT.csv")),
        (("photos", "?", "--csv", "a.txt"), ("--csv is 'a.txt'", ".csv")),
        (("photos", "?", "--jsonl", "a.json"), ("--jsonl is 'a.json'", ".jsonl")),
        (("photos", "?", "--csv", "a.csv", "--jsonl", "a.jsonl"), ("--csv and --jsonl",)),
        (("photos", "?", "--csv", "none/a.csv"), ("none/a.csv: the folder none does not exist",)),
        (("photos", "?", "--csv", "old.csv"), ("old.csv: already exists",)),
        (("empty", "?", "--csv", "a.csv"), ("empty: contains no image files", "0 subfolders")),
        (("above", "?", "--csv", "a.csv"), ("above: contains no image files", "1 subfolder;")),
        (("none.png", "?", "--csv", "a.csv"), ("none.png: no such image file",)),
        (("?", "--csv", "a.csv"), ("--csv needs images",)),
        (("-", "?", "--csv", "a.csv"), ("- is one image from standard input",)),
        (("photos", "--csv", "a.csv"), ("but is a folder", 'llava ask photos "What is this?" --csv a.csv')),
    ],
)
def test_a_table_that_cannot_be_written_is_refused_before_the_model_loads(
    words: tuple[str, ...], mentions: tuple[str, ...], photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    (tmp_path / "above" / "below").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "old.csv").write_text("mine")
    before = command.files(tmp_path)
    done = run("ask", *words, "--model", tmp_path / "no_model", cwd=tmp_path, stdin=b"")
    assert_one_line_error(done, *mentions)
    assert command.files(tmp_path) == before


def test_a_question_that_no_image_can_answer_ends_the_run(photos: Path, tmp_path: Path, base: Path) -> None:
    done = run("ask", photos / "more", "?", "--csv", tmp_path / "a.csv", "--model", base, "--template", "v1", *SHORT)
    assert_one_line_error(done, "no vision tower")
    assert command.files(tmp_path) == {}


def test_a_file_that_appears_during_the_run_is_not_overwritten(
    photos: Path, tmp_path: Path, vlm: llava.Assistant
) -> None:
    out = tmp_path / "a.csv"
    with open_run(find_pictures([str(photos / "more")]), "What?", out, {}) as one:
        out.write_text("mine")
        with pytest.raises(ConfigError, match="already exists"):
            answer_all(vlm, one, {"max_new_tokens": 2})
    assert out.read_text() == "mine"
    assert (tmp_path / "a.csv.partial").is_file()


def test_two_processes_cannot_write_one_table(tmp_path: Path) -> None:
    with (
        open_run(["a.png"], "What?", tmp_path / "a.csv", {}),
        pytest.raises(ConfigError, match="another process is writing"),
        open_run(["a.png"], "What?", tmp_path / "a.csv", {}),
    ):
        pass


# ---------------------------------------------------------------------------------------------------- interruptions


@pytest.fixture(scope="module")
def many(photos: Path) -> Path:
    """Sixty images, which keep a run busy."""
    folder = photos.parent / "many"
    folder.mkdir()
    pictures = [path for path in sorted(photos.iterdir()) if path.suffix == ".PNG"]
    for i in range(60):
        shutil.copy(pictures[i % len(pictures)], folder / f"{i:02}.png")
    (folder / "30.png").write_text("broken")
    return folder


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_continues_to_the_same_table(how: signal.Signals, many: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.csv", tmp_path / "answers.csv"
    options = ("--max-new-tokens", 24, "--dtype", "float32", "--device", "cpu", "--max-batch", 2)
    assert run("ask", many, QUESTION, "--csv", whole, *options).returncode == 1
    process = command.start("ask", many, QUESTION, "--csv", out, *options)
    partial, end = tmp_path / "answers.csv.partial", time.monotonic() + command.TIMEOUT_S
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 5):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(how)
    _, err = process.communicate(timeout=command.TIMEOUT_S)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert f"{partial}: has the answers so far; run the same command again to continue" in err.decode()
    n = partial.read_bytes().count(b"\n") - 1
    assert 5 <= n < 59
    assert not out.exists()
    done = run("ask", many, QUESTION, "--csv", out, *options)
    assert done.returncode == 1
    assert f"{partial}: continuing after {n} of 60 images" in done.stderr
    assert without_seconds(read_csv(out)) == without_seconds(read_csv(whole))
    assert set(command.files(tmp_path)) == {"whole.csv", "answers.csv"}


def row(picture: Path, text: str) -> Answer:
    return Answer(picture=str(picture), question="What?", answer=text, tokens=1, finish_reason="stop", seconds=0.1)


def state(picture: Path) -> list[int]:
    return [picture.stat().st_size, picture.stat().st_mtime_ns]


@pytest.fixture
def started(photos: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    """Three images, and the journal of a run that has answered two of them."""
    pictures = [shutil.copy(photos / f"zoo{i}.PNG", tmp_path / f"{i}.png") for i in range(3)]
    journal = Journal(tmp_path / "a.csv.partial", {"question": "What?", "--model": None})
    for i, picture in enumerate(pictures[:2]):
        journal.add(row(picture, f"known {i}"), state(picture))
    return tmp_path / "a.csv", pictures


def completed(out: Path, pictures: list[Path], vlm: llava.Assistant) -> list[str | None]:
    with open_run(list(map(str, pictures)), "What?", out, {"--model": None}) as one:
        return [answer.answer for answer in answer_all(vlm, one, {"max_new_tokens": 4})]


def test_answers_of_an_interrupted_run_are_used(started: tuple[Path, list[Path]], vlm: llava.Assistant) -> None:
    out, pictures = started
    new = vlm.ask(pictures[2], "What?", max_new_tokens=4)
    assert completed(out, pictures, vlm) == ["known 0", "known 1", new]
    assert [line["answer"] for line in read_csv(out)] == ["known 0", "known 1", new]


def test_a_line_that_was_not_completed_is_asked_again(started: tuple[Path, list[Path]], vlm: llava.Assistant) -> None:
    out, pictures = started
    partial = Path(f"{out}.partial")
    partial.write_bytes(partial.read_bytes()[:-20])
    old = vlm.ask(pictures[1], "What?", max_new_tokens=4)
    assert completed(out, pictures, vlm)[:2] == ["known 0", old]


def test_an_image_that_was_changed_is_asked_again(started: tuple[Path, list[Path]], vlm: llava.Assistant) -> None:
    out, pictures = started
    os.utime(pictures[0], ns=(1, 1))
    new = vlm.ask(pictures[0], "What?", max_new_tokens=4)
    assert completed(out, pictures, vlm)[:2] == [new, "known 1"]


def test_an_error_is_tried_again_by_the_next_run(tmp_path: Path, photos: Path, vlm: llava.Assistant) -> None:
    pictures = [shutil.copy(photos / "zoo0.PNG", tmp_path / "0.png"), tmp_path / "1.png"]
    out = tmp_path / "a.csv"
    with open_run(list(map(str, pictures)), "What?", out, {"--model": None}) as one:
        out.write_text("")
        with pytest.raises(ConfigError, match="already exists"):  # ends the run after all answers
            answer_all(vlm, one, {"max_new_tokens": 4})
        assert "no such image file" in str(one.answers[str(pictures[1])].error)
    out.unlink()
    shutil.copy(photos / "kitchen0.PNG", pictures[1])
    assert None not in completed(out, pictures, vlm)


@pytest.mark.parametrize(
    ("question", "settings", "mentions"),
    [
        ("Why?", {"--model": None}, "question 'What?'; this run has question 'Why?'"),
        ("What?", {"--model": "other"}, "--model None; this run has --model 'other'"),
        ("What?", {"--model": None, "--seed": 3}, "--seed None; this run has --seed 3"),
    ],
)
def test_answers_of_another_run_are_refused_and_kept(
    question: str, settings: dict[str, Any], mentions: str, started: tuple[Path, list[Path]]
) -> None:
    out, _ = started
    with Path(f"{out}.partial").open("a") as partial:
        partial.write('{"state": [')  # a line that was not completed
    before = command.files(out.parent)
    with pytest.raises(ConfigError, match="interrupted run with") as caught, open_run([], question, out, settings):
        pass
    assert mentions in str(caught.value)
    assert command.files(out.parent) == before


@pytest.mark.parametrize("content", [b"", b"mine", b"[]\n", b'{"settings": 3}\n', b'{"settings": {}}\nmine\n'])
def test_a_file_that_is_no_journal_is_refused_and_kept(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.csv.partial").write_bytes(content)
    with (
        pytest.raises(ConfigError, match=r"its line \d is not from an interrupted run"),
        open_run([], "What?", tmp_path / "a.csv", {}),
    ):
        pass
    assert (tmp_path / "a.csv.partial").read_bytes() == content


# ---------------------------------------------------------------------------------------------------- the engine


def test_each_reply_arrives_beside_the_errors_of_others(photos: Path, vlm: llava.Assistant) -> None:
    requests: list[Any] = ["Once", ("<image>", [photos / "none.png"]), "Twice", ("<image>", [])]
    params = llava.SamplingParams(max_new_tokens=4)
    found = dict(vlm.engine.generate_each(requests, params))
    assert [type(found[i]) for i in (1, 3)] == [ImageError, PromptError]
    for i in (0, 2):
        reply = found[i]
        assert not isinstance(reply, LlavaError)
        assert reply.text == vlm.generate(requests[i], max_new_tokens=4).text
    assert len(found) == 4


def test_only_a_batch_of_images_is_prepared_at_a_time(
    many: Path, vlm: llava.Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[object] = []
    prepare = vlm.engine.inputs.prepare

    def counting(*args: Any, **options: Any) -> Any:
        prepared.append(args)
        return prepare(*args, **options)

    monkeypatch.setattr(vlm.engine.inputs, "prepare", counting)
    requests = [("<image>", [path]) for path in sorted(many.iterdir())]
    results = vlm.engine.generate_each(requests, llava.SamplingParams(max_new_tokens=2), at_once=5)
    for done, _ in enumerate(results, start=1):
        assert len(prepared) - done < 5
    assert len(prepared) == 60


def test_a_closed_iterator_aborts_its_requests(vlm: llava.Assistant) -> None:
    results = vlm.engine.generate_each(["Once"] * 4, [llava.SamplingParams(max_new_tokens=n) for n in (1, 99, 99, 99)])
    next(results)
    results.close()
    vlm.engine.step()
    assert not vlm.engine.has_requests
    vlm.engine.check()


def test_a_prompt_that_is_too_long_is_a_row_with_its_option(clip: Path, photos: Path, tmp_path: Path) -> None:
    model = tiny.write_llava(tmp_path / "llava", clip=clip)
    options = ("--model", model, "--cache-memory", "48KiB", *SHORT)
    done = run("ask", photos / "more", "What?", "--csv", tmp_path / "a.csv", *options)
    assert done.returncode == 1
    (failed,) = read_csv(tmp_path / "a.csv")
    assert failed["error"].endswith("or raise --cache-memory")


@pytest.mark.parametrize("first", ["answered", "broken"])
def test_a_prompt_error_of_one_image_is_a_row_unless_no_image_had_an_answer(
    first: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anyres = llava.load(tiny.write_llava(tmp_path / "llava", clip=clip, **tiny.ANYRES), dtype="float32", device="cpu")
    for name, size in (("1.png", (50, 50)), ("2.png", (56, 168)), ("3.png", (50, 50))):
        Image.new("RGB", size).save(tmp_path / name)
    if first == "broken":
        (tmp_path / "0.png").write_text("broken")
        (tmp_path / "1.png").unlink()
    n_small, n_large = (len(anyres.prepare(question(tmp_path / name)).ids) for name in ("3.png", "2.png"))
    size = anyres.engine.options.page_size

    def needed(n_prompt: int) -> int:  # pages of two beams
        return n_prompt // size + 2 * (-(-(n_prompt % size + 4) // size) + 1)

    assert needed(n_small) < needed(n_large)
    monkeypatch.setattr(anyres.engine.inputs, "n_pages", needed(n_small))
    with open_run(find_pictures([str(tmp_path)]), "What?", tmp_path / "a.csv", {}) as one:
        options = {"max_new_tokens": 4, "num_beams": 2}
        if first == "broken":
            with pytest.raises(PromptError, match="beams of 4 tokens"):
                answer_all(anyres, one, options)
        else:
            rows = answer_all(anyres, one, options)
            assert [row.error is None for row in rows] == [True, False, True]


def question(picture: Path) -> list[dict[str, Any]]:
    return llava.assistant.question_about(picture, "What?")
