"""llava explain: what each word of an answer looks at, as a picture and as a page."""

import json
from pathlib import Path

import pytest
from PIL import Image

import llava
from tests.command import run, run_well
from tests.conftest import PROJECT

KITCHEN = PROJECT / "examples" / "pictures" / "kitchen.png"
QUESTION = "What is in the picture?"


def test_the_page_and_the_sheet_are_about_the_answer_of_ask(tmp_path: Path) -> None:
    answer = llava.load(device="cpu").ask(KITCHEN, QUESTION)
    for name in ("words.html", "words.png"):
        done = run_well("explain", KITCHEN, QUESTION, "--out", tmp_path / name, "--device", "cpu")
        assert done.stdout.strip() == answer
    text = (tmp_path / "words.html").read_text(encoding="utf-8")
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert " ".join(word["text"] for word in data["words"]) == answer
    assert data["question"] == QUESTION
    assert "USER: <image>" in data["prompt"]
    with Image.open(tmp_path / "words.png") as sheet:
        assert sheet.width == 6 * 220
    assert sorted(path.name for path in tmp_path.iterdir()) == ["words.html", "words.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", "1,x"], "expected comma-separated numbers"),
        (["--layers", "5"], "expected different numbers from 0 to 4"),
        (["--heads", "0,0"], "expected different numbers from 0 to 3"),
        (["--out", "words.gif"], "ends with .gif"),
        (["--out", "nowhere/words.png"], "does not exist"),
    ],
    ids=str,
)
def test_what_cannot_be_shown_is_refused_in_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "words.png")]
    done = run("explain", KITCHEN, QUESTION, *out, *arguments, "--device", "cpu")
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
