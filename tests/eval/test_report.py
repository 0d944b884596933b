"""report.md of a run, and the Markdown that a model's words cannot leave."""

import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from markdown_it import MarkdownIt
from PIL import Image

import llava
from llava.assistant import question_about
from llava.eval import markdown
from llava.eval.report import write_report
from llava.eval.task import Question
from tests.advice.table import Said, say
from tests.eval.answered import pope_questions, right, write_run, wrong_at
from tests.eval.pope import SUFFIX, write_pope

HOSTILE = [
    "<script>alert(1)</script>",
    "a | b | c",
    "![x](http://evil.example/x.png) [y](http://evil.example)",
    "https://evil.example www.evil.example me@evil.example",
    "`code` and ``` and ~~~",
    "*bold* _it_ ~~gone~~ ^up^ ==mark== $x$ &amp; &lt; &#60;",
    "line\n\n# title\n\n- item\n\n| a | b |\n|---|---|",
    "ends with a backslash \\",
    "\\| escaped already",
    "| --- |",
    "bell \x07, null \x00, right to left \u202e, line \u2028 and return \r",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_words_in_a_table_stay_words(text: str) -> None:
    made = markdown.table(("A", "B"), [[markdown.words(text), "1"]])
    html = MarkdownIt("gfm-like", {"linkify": False}).render(made)
    assert (html.count("<table>"), html.count("<td"), html.count("<tr>")) == (1, 2, 2)
    shown = html.split("<td>")[1].split("</td>")[0]
    assert "<" not in shown
    expected = text.strip().replace("\n", " ⏎ ")
    plain = shown.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
    assert plain == "".join(c if c.isprintable() else repr(c)[1:-1] for c in expected)


@pytest.mark.parametrize("text", [*HOSTILE, "```\n````\n~~~"])
def test_a_text_in_a_block_does_not_end_it(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(markdown.block(text) + "\nafter\n")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]


@pytest.mark.parametrize("text", ["see https://evil.example/a", "see www.evil.example", "write to me@evil.example"])
def test_addresses_do_not_become_links(text: str) -> None:
    assert not re.search(r"[^\\]://|www\.|[^\\]@", markdown.words(text))  # what GitHub looks for


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pope(tmp_path_factory.mktemp("data"), per_split=2)


def asked(data: Path, out: Path, *more: str) -> Said:
    said = say(("eval", "run", "pope", "--data", data, "--out", out, "--device", "cpu", *more))
    assert said.well, said.text
    return said


@pytest.fixture(scope="module")
def report(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    asked(data, folder / "run")
    return folder / "run" / "report.md"


def test_a_run_ends_with_a_report_of_scores_answers_settings_and_versions(report: Path) -> None:
    text = report.read_text()
    for part in ("| headline | ", "| all, accuracy | ", "| unjudged | 0 |", "| --num-beams | 1 |", "| torch | "):
        assert part in text
    assert text.count(SUFFIX.strip()) == 6  # in three prompts and three answers
    with Image.open(report.parent / "pope.png") as image:
        assert image.size[0] > 300
    assert "](pope.png)" in text


def test_the_report_shows_the_prompts_that_the_model_saw(report: Path, data: Path) -> None:
    with (data / "pope" / "llava_pope_test.jsonl").open() as file:
        first = json.loads(next(file))
    picture = str(data / "pope" / "val2014" / first["image"])
    seen = llava.load(device="cpu").prepare(question_about(picture, first["text"]))
    assert f"```text\n{seen.prompt}\n```" in report.read_text()


def test_equal_runs_have_equal_reports(report: Path, data: Path, tmp_path: Path) -> None:
    asked(data, tmp_path / "run")
    for name in ("report.md", "pope.png", "pope/questions.jsonl", "pope/scores.json"):
        assert (report.parent / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_without_matplotlib_the_report_has_no_charts_and_says_what_to_install_before_the_run(
    data: Path, tmp_path: Path
) -> None:
    with mock.patch.dict(sys.modules, {"matplotlib.figure": None}):
        said = asked(data, tmp_path / "run", "--limit", "1")
    assert "pip install 'llava-native[eval]'" in said.text.splitlines()[0]
    text = (tmp_path / "run" / "report.md").read_text()
    assert "pip install 'llava-native\\[eval\\]'" in text
    assert "![" not in text
    assert not list((tmp_path / "run").glob("*.png"))


def test_a_report_of_hostile_answers_is_one_document(tmp_path: Path) -> None:
    questions = pope_questions(tmp_path, len(HOSTILE))
    for number, text in enumerate(HOSTILE):
        folder = write_run(tmp_path / str(number), {"pope": (questions[:1], lambda one, text=text: text)}, name=text)
        html = MarkdownIt("gfm-like", {"linkify": False}).render(write_report(folder).read_text())
        assert "<script" not in html
        assert re.findall(r'(?:src|href)="([^"]*)"', html) == ["pope.png"]
        assert html.count("<h1>") == 1
        assert html.count("<table>") == 7


def test_a_report_has_all_tasks(tmp_path: Path) -> None:
    questions: list[Question] = pope_questions(tmp_path)
    gqa: list[Any] = [Question(id="q", text="What?", answer="yes")]
    text = write_report(
        write_run(tmp_path / "run", {"pope": (questions, wrong_at(1)), "gqa": (gqa, lambda one: None)})
    ).read_text()
    assert "| gqa | " in text
    assert "| unanswered | 1 |" in text
    assert "| pope | " in text
    assert right(questions[0]) in text


def test_a_very_long_prompt_is_cut_in_the_report(tmp_path: Path) -> None:
    text = "word " * 100_000
    run = write_run(tmp_path / "run", {"gqa": ([Question(id="1", text=text, answer="yes")], right)})
    found = write_report(run).read_text()
    assert len(found) < 10_000
    assert "… (498,000 more characters)" in found.replace("\\", "")
