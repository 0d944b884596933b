"""The model in the package: it loads, it is small, and it recognises pictures."""

import json
import re
import shlex

import pytest

import llava
from llava.assistant import LLAVA_TINY, Assistant
from tests.command import run_well
from tests.conftest import PROJECT

PICTURES = PROJECT / "examples" / "pictures"
SHOWN = {
    "kitchen.png": ("red apple", "croissant", "carrot", "teapot", "MENU"),
    "beach.png": ("sailboat", "palm tree", "crab", "SUMMER"),
    "zoo.png": ("giraffe", "lion", "penguin", "ZOO"),
}


@pytest.fixture(scope="module")
def vlm() -> Assistant:
    return llava.load(device="cpu")


@pytest.mark.parametrize("name", SHOWN)
def test_it_describes_a_picture(vlm: Assistant, name: str) -> None:
    answer = vlm.ask(PICTURES / name, "Describe this image in detail.", max_new_tokens=96)
    assert all(thing in answer for thing in SHOWN[name]), answer


def test_the_answer_depends_on_the_picture(vlm: Assistant) -> None:
    question = "Is there a lion in the picture?"
    assert vlm.ask(PICTURES / "zoo.png", question).startswith("Yes")
    assert vlm.ask(PICTURES / "kitchen.png", question).startswith("No")
    assert vlm.ask(PICTURES / "beach.png", "What is the colour of the background?") != vlm.ask(
        PICTURES / "zoo.png", "What is the colour of the background?"
    )


def test_it_answers_in_a_conversation(vlm: Assistant) -> None:
    image = {"type": "image", "image": PICTURES / "kitchen.png"}
    first = {"role": "user", "content": [image, {"type": "text", "text": "Is there a teapot in the picture?"}]}
    said = vlm.generate([first]).text
    assert said.startswith("Yes")
    then = {"role": "user", "content": "What colour is the background?"}
    assert "blue" in vlm.generate([first, {"role": "assistant", "content": said}, then]).text


def test_ask_without_a_model_uses_it_and_says_so() -> None:
    done = run_well("ask", PICTURES / "zoo.png", "What animals are in the picture?")
    assert "penguin" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "llava-tiny" in line
    assert "drawn objects" in line
    assert "--model" in line


def test_chat_without_a_model_uses_it() -> None:
    typed = f"/image {PICTURES / 'beach.png'}\nIs there a crab in the picture?\n/quit\n"
    done = run_well("chat", "--temperature", "0", stdin=typed.encode())
    assert "Yes" in done.stdout
    assert "llava-tiny" in done.stderr


def test_it_is_an_ordinary_llava_of_at_most_16_megabytes() -> None:
    assert sum(file.stat().st_size for file in LLAVA_TINY.iterdir()) <= 16_000_000
    described = json.loads(run_well("inspect", LLAVA_TINY, "--json").stdout)
    assert described["kind"] == "native"
    assert not described["missing"]


def test_no_code_makes_a_special_case_of_it() -> None:
    """Its name is only where the default model is chosen, and in the benchmark which has that name."""
    root = PROJECT / "llava"
    named = {
        file.relative_to(root).as_posix() for file in root.rglob("*.py") if "llava-tiny" in file.read_text("utf-8")
    }
    assert named == {"assistant.py", "cli/answer.py", "cli/options.py", "eval/tasks/llava_tiny.py"}


def test_the_readme_shows_its_real_answer() -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"^\$ (llava ask .*)\n(.*)\n", readme, re.MULTILINE)
    assert shown
    done = run_well(*shlex.split(shown[1])[1:], cwd=PROJECT)
    assert done.stdout == shown[2] + "\n"


def test_the_model_card_has_the_measured_scores() -> None:
    card = (LLAVA_TINY / "README.md").read_text(encoding="utf-8")
    file = PROJECT / "benchmarks" / "results" / "2026-11-22-llava-tiny-scores.json"
    scores = json.loads(file.read_text(encoding="utf-8"))["scores"]
    rows = {"naming of single objects": "naming of single objects", "counting": "counting", "position": "position"}
    rows |= {"colour": "colour", "yes or no": "yes or no", "reading": "reading"}
    for title, kind in rows.items():
        figures = (f"{100 * scores[style]['kinds'][kind]['right']:.1f}" for style in ("noto", "twemoji", "openmoji"))
        assert f"| {title} | {' | '.join(figures)} |" in card
    figures = (f"**{100 * scores[style]['conversation']['right']:.1f}**" for style in ("noto", "twemoji", "openmoji"))
    assert f"| **all conversation** | {' | '.join(figures)} |" in card
