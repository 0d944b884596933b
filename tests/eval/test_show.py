"""The answers of a run as one HTML file, in Chromium as a reader uses it."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.eval.runs import read_run
from llava.eval.show import page
from llava.eval.task import Question
from tests.command import assert_one_line_error, run, run_well
from tests.eval.answered import pope_questions, right, write_run, wrong_at

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
HOSTILE = "</script><script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">"
LIMIT = 10**7  # bytes of pictures


@pytest.fixture(scope="module")  # while it is open, no other test can run an event loop
def chromium() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("Chromium is not installed (Debian: chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        yield started
        started.close()


@dataclass(frozen=True)
class Reader:
    """Opens files, and notes errors of scripts, messages on the console, and requests."""

    chromium: Any
    wrong: list[str]

    @contextmanager
    def open(self, file: Path, **options: Any) -> Iterator[Any]:
        context = self.chromium.new_context(**{"viewport": {"width": 1000, "height": 800}, **options})
        try:
            opened = context.new_page()
            opened.on("console", lambda line: self.wrong.append(line.text))
            opened.on("pageerror", lambda error: self.wrong.append(str(error)))
            opened.on("request", lambda request: self._check(request.url, file))
            opened.goto(file.as_uri())
            yield opened
        finally:
            context.close()

    def _check(self, url: str, file: Path) -> None:
        if url != file.as_uri() and not url.startswith("data:"):
            self.wrong.append(f"request: {url}")


@pytest.fixture
def reader(chromium: Any) -> Iterator[Reader]:
    made = Reader(chromium, [])
    yield made
    assert made.wrong == []


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return pope_questions(tmp_path)


def shown(folder: Path, *more: object) -> Path:
    return Path(run_well("eval", "show", folder, *more).stdout.strip())


def position(opened: Any) -> str:
    return str(opened.locator("#position").inner_text())


def field(opened: Any, name: str) -> str:
    return str(opened.locator(f"dt:text-is('{name}') + dd").inner_text())


def test_a_reader_steps_through_questions_with_buttons_and_keys(
    reader: Reader, questions: list[Question], tmp_path: Path
) -> None:
    file = shown(write_run(tmp_path / "run", {"pope": (questions, wrong_at(1))}, name="some model"))
    assert file == tmp_path / "run" / "show.html"
    with reader.open(file) as opened:
        assert opened.title() == "Answers of some model"
        assert (position(opened), opened.locator("#previous").is_disabled()) == ("1 of 24", True)
        assert (field(opened, "Right answer"), field(opened, "Verdict")) == ("yes", "right")
        opened.keyboard.press("ArrowRight")
        assert (field(opened, "Answer"), field(opened, "Right answer"), field(opened, "Verdict")) == (
            "Yes",
            "no",
            "wrong",
        )
        opened.get_by_role("button", name="Next").click()
        opened.keyboard.press("j")
        assert (position(opened), field(opened, "Question")) == ("4 of 24", "3")
        opened.keyboard.press("k")
        opened.get_by_role("button", name="Previous").click()
        assert position(opened) == "2 of 24"
        for _ in range(30):
            opened.keyboard.press("ArrowRight")
        assert (position(opened), opened.locator("#next").is_disabled()) == ("24 of 24", True)


def test_filters_by_verdict_group_and_text_combine(reader: Reader, questions: list[Question], tmp_path: Path) -> None:
    reply = {"1": "Yes", "6": "No", "7": "Yes", "9": None}
    folder = write_run(tmp_path / "run", {"pope": (questions, lambda one: reply.get(one.id, right(one)))})
    with reader.open(shown(folder)) as opened:
        opened.get_by_label("Verdict").select_option("wrong")
        assert position(opened) == "1 of 3"
        opened.get_by_label("Group").select_option("random")
        assert (position(opened), field(opened, "Question")) == ("1 of 3", "1")
        opened.get_by_label("Text").fill("KIND 7")
        assert (position(opened), field(opened, "Question")) == ("1 of 1", "7")
        opened.get_by_label("Text").fill("nothing has this")
        assert position(opened) == "no question"
        assert opened.locator("#question").inner_text() == ""
        opened.get_by_label("Text").fill("")
        opened.get_by_label("Group").select_option("")
        opened.get_by_label("Verdict").select_option("no answer")
        assert (position(opened), field(opened, "Question"), field(opened, "Answer")) == ("1 of 1", "9", "–")


def test_keys_in_the_search_box_are_text(reader: Reader, questions: list[Question], tmp_path: Path) -> None:
    with reader.open(shown(write_run(tmp_path / "run", {"pope": (questions, right)}))) as opened:
        opened.get_by_label("Text").press_sequentially("kind")
        opened.get_by_label("Text").press("ArrowLeft")
        assert (position(opened), opened.get_by_label("Text").input_value()) == ("1 of 24", "kind")


def test_whatever_a_run_says_stays_text(reader: Reader, questions: list[Question], tmp_path: Path) -> None:
    hostile = [replace(questions[0], text=HOSTILE, groups=(HOSTILE,)), *questions[1:]]
    folder = write_run(tmp_path / "run", {"pope": (hostile, lambda one: HOSTILE)}, name=HOSTILE)
    review = {"question_id": "0", "content": HOSTILE, "tuple": [5, 6]}
    (folder / "pope" / "reviews.jsonl").write_text(json.dumps(review) + "\n")
    with reader.open(shown(folder)) as opened:
        for name in ("Prompt", "Answer", "Groups", "Review"):
            assert field(opened, name) == HOSTILE
        assert opened.locator("h1").inner_text() == opened.title() == f"Answers of {HOSTILE}"
        assert opened.locator("img").count() == 1


def test_only_the_scripts_of_the_page_may_run(reader: Reader, questions: list[Question], tmp_path: Path) -> None:
    file = shown(write_run(tmp_path / "run", {"pope": (questions, right)}))
    text = file.read_text()
    head = text.partition('<script type="application/json"')[0]
    assert re.findall(r"(?:src|href)=[\"']?([^\"'> ]+)", head) == ["data:,"]
    (tmp_path / "with.html").write_text(text.replace("</body>", "<script>document.title = 'broken'</script></body>"))
    watcher = Reader(reader.chromium, [])
    with watcher.open(tmp_path / "with.html") as opened:
        assert opened.title() == "Answers of model"
    assert "Content Security Policy" in watcher.wrong[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_light_and_dark(
    scheme: str, reader: Reader, questions: list[Question], tmp_path: Path
) -> None:
    long = [replace(questions[0], text="word" * 200, groups=("group" * 40,)), *questions[1:]]
    folder = write_run(tmp_path / "run", {"pope": (long, lambda one: "x" * 500)}, name="name" * 50)
    with reader.open(shown(folder), viewport={"width": 390, "height": 800}, color_scheme=scheme) as opened:
        assert opened.evaluate("document.documentElement.scrollWidth") == 390
        dark = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        text = opened.evaluate("getComputedStyle(document.querySelector('dd')).color")
        assert (dark, text != "rgb(0, 0, 0)") == (scheme == "dark", scheme == "dark")


def test_pictures_are_in_the_file_scaled_down_and_once(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = pope_questions(tmp_path, 6, per_picture=3)
    Image.effect_noise((2000, 1000), 50).save(questions[0].images[0])
    folder = write_run(tmp_path / "run", {"pope": (questions, right)})
    text, n_left_out = page(read_run(folder), max_bytes=LIMIT)
    assert (text.count("data:image/jpeg"), n_left_out) == (2, 0)
    shutil.rmtree(tmp_path / "pictures")  # no longer needed
    (tmp_path / "page.html").write_text(text)
    with reader.open(tmp_path / "page.html") as opened:
        opened.wait_for_function("document.querySelector('img').complete")
        size = opened.evaluate("(i => [i.naturalWidth, i.naturalHeight])(document.querySelector('img'))")
        assert size == [512, 256]


def test_pictures_above_the_limit_are_left_out_with_a_warning(
    reader: Reader, questions: list[Question], tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", {"pope": (questions, right)})
    whole, _ = page(read_run(folder), max_bytes=LIMIT)
    urls = json.loads(re.search(r'id="data">(.*?)</script>', whole)[1])["pictures"]
    text, n_left_out = page(read_run(folder), max_bytes=len("".join(urls[:5])))
    assert (text.count("data:image/jpeg"), n_left_out) == (5, 19)
    done = run_well("eval", "show", folder, "--pictures", 0, "--out", tmp_path / "small.html")
    assert "24 pictures left out of the page; set --pictures to more megabytes" in done.stderr
    with reader.open(tmp_path / "small.html") as opened:
        assert "left out" in opened.locator(".missing").inner_text()


def test_a_picture_that_is_gone_broken_or_without_a_file_is_replaced_by_a_reason(tmp_path: Path) -> None:
    questions = pope_questions(tmp_path, 3)
    questions[2] = replace(questions[2], images=(questions[2].images[0].read_bytes(),))
    folder = write_run(tmp_path / "run", {"pope": (questions, right)})
    questions[0].images[0].unlink()
    questions[1].images[0].write_bytes(b"no picture")
    text, _ = page(read_run(folder), max_bytes=LIMIT)
    for reason in ("cannot be shown: ", "is not an image", "part of the benchmark's file"):
        assert reason in text


def test_equal_runs_have_equal_pages(questions: list[Question], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"pope": (questions, right)})
    assert page(read_run(folder), max_bytes=LIMIT) == page(read_run(folder), max_bytes=LIMIT)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    assert_one_line_error(run("eval", "show", tmp_path), "run.json", "expected the record of an evaluation run")
    assert not list(tmp_path.iterdir())


def test_a_run_without_recorded_questions_shows_its_answers_with_a_warning(
    questions: list[Question], tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", {"pope": (questions, right)})
    (folder / "pope" / "questions.jsonl").unlink()
    done = run_well("eval", "show", folder)
    assert "pictures and right answers are unknown" in done.stderr
    assert questions[0].text in (folder / "show.html").read_text()
