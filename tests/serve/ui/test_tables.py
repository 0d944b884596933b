"""The tabs Gallery and Compare in Chromium, as a visitor uses them."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llava
from llava.assistant import question_about
from tests import tiny
from tests.serve.ui.conftest import Browser
from tests.serving import Server, serving

PICTURES = Path(__file__).parents[3] / "examples" / "pictures"
QUESTION = "What is in the picture?"


@pytest.fixture
def page(browser: Browser, site: Server) -> Iterator[Any]:
    with browser.open(site.url) as page:
        yield page


def alert(page: Any, tab: str) -> str:
    page.locator(f"#{tab}-problem [role=alert]").wait_for()
    return str(page.locator(f"#{tab}-problem").inner_text()).strip()


def add(page: Any, *files: Path) -> None:
    page.locator("#gallery-question input[type=file]").set_input_files(list(files))
    page.locator("#gallery-question .thumbnail-item").nth(len(files) - 1).wait_for()


def ask(page: Any, question: str) -> None:
    page.locator("#gallery-question textarea").fill(question)
    page.locator("#gallery-question textarea").press("Enter")


def saved(page: Any, kind: str) -> str:
    with page.expect_download() as download:
        page.get_by_role("button", name=f"Download {kind.upper()}").click()
    assert re.fullmatch(rf"llava-gallery-[\dT-]+\.{kind}", download.value.suggested_filename)
    return Path(download.value.path()).read_bytes().decode()


def test_each_picture_of_a_gallery_is_asked_about(page: Any, tmp_path: Path, site: Server) -> None:
    pictures = sorted(PICTURES.glob("*.png"))
    (tmp_path / "broken <b>.png").write_bytes(b"no picture")
    (tmp_path / "=1+1.png").write_bytes(pictures[0].read_bytes())
    page.get_by_role("tab", name="Gallery").click()
    ask(page, QUESTION)
    assert alert(page, "gallery") == "add pictures first"
    add(page, *pictures, tmp_path / "broken <b>.png", tmp_path / "=1+1.png")
    ask(page, QUESTION)
    n = len(pictures) + 2
    page.get_by_text(f"{n} of {n} done, 1 of them with an error").wait_for()
    rows = page.locator("#gallery-table tbody tr")
    assert rows.count() == n
    for i, picture in enumerate(pictures):
        answer = site.vlm.generate(question_about(picture, QUESTION), max_new_tokens=128).text
        assert rows.nth(i).locator("th").inner_text() == picture.name
        assert rows.nth(i).locator("td").last.inner_text() == answer
        page.wait_for_function(f"document.querySelectorAll('#gallery-table img')[{i}].naturalWidth > 0")
    assert page.locator("#gallery-table tbody b").count() == 0
    assert "spreadsheets take for formulas" in page.locator("#gallery-problem").inner_text()
    text = saved(page, "csv")
    assert text.count("\r\n") == n + 1
    (*table, broken, _) = csv.DictReader(text.splitlines())
    assert [row["answer"] for row in table] == [rows.nth(i).locator("td").last.inner_text() for i in range(len(table))]
    assert (broken["answer"], broken["finish_reason"]) == ("", "error")
    assert json.loads(saved(page, "json"))[0] == {
        **table[0], "tokens": int(table[0]["tokens"]), "seconds": float(table[0]["seconds"]), "error": None,
    }  # fmt: skip


def test_a_gallery_is_stopped(page: Any, tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i:02}.png").write_bytes((PICTURES / "kitchen.png").read_bytes())
    page.get_by_role("tab", name="Gallery").click()
    add(page, *sorted(tmp_path.iterdir()))
    ask(page, "Describe this image in detail.")
    page.wait_for_function("/^[1-9]/.test(document.querySelector('#gallery-table p')?.innerText)")
    page.locator("#gallery-question .stop-button").click()
    page.wait_for_timeout(1500)
    state = page.locator("#gallery-table p").inner_text()
    assert int(state.split()[0]) < 60
    page.wait_for_timeout(1500)
    assert page.locator("#gallery-table p").inner_text() == state
    assert len(json.loads(saved(page, "json"))) == int(state.split()[0])


@pytest.fixture(scope="module")
def two_adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A small random model with two adapters."""
    folder = tmp_path_factory.mktemp("two")
    clip, base = tiny.write_clip(folder / "clip"), tiny.write_llama(folder / "base")
    adapters = {name: tiny.write_lora(folder / name, clip=clip, seed=i) for i, name in enumerate(("cats", "dogs"), 1)}
    vlm = llava.load(base, adapters=adapters, device="cpu", dtype="float32")
    arguments = ["--model", base, "--device", "cpu", "--dtype", "float32", "--ui"]
    for name, path in adapters.items():
        arguments += ["--adapter", f"{name}={path}"]
    with serving(folder / "errors.txt", vlm, "base", *arguments) as server:
        yield server


def test_two_adapters_answer_side_by_side(browser: Browser, two_adapters: Server) -> None:
    with browser.open(two_adapters.url) as page:
        page.get_by_role("tab", name="Compare").click()
        for i, name in enumerate(("cats", "dogs")):
            page.locator(f"#compare-model-{i} input").click()
            page.get_by_role("option", name=name).last.click()
        page.locator("#compare-question input[type=file]").set_input_files(PICTURES / "kitchen.png")
        page.locator("#compare-question .thumbnail-item").wait_for()
        page.locator("#compare-question textarea").fill("Hi")
        page.locator("#compare-question textarea").press("Enter")
        page.locator("#compare-answer-1 .figures").wait_for()
        page.locator("#compare-answer-0 .figures").wait_for()
        shown = [page.locator(f"#compare-answer-{i} .words").inner_text() for i in range(2)]
        assert shown[0] != shown[1]
        for name, text in zip(("cats", "dogs"), shown, strict=True):
            input = two_adapters.prepared(question_about(PICTURES / "kitchen.png", "Hi"), name)
            reply = two_adapters.reply(input, adapter=name, max_new_tokens=512)
            # random models write control characters, too, which a browser does not show
            assert "".join(text.split())[:40] == "".join(reply.text.split())[:40]
        page.locator("#compare-answer-1 .word").first.hover()
        assert "%" in page.locator("#alternatives").inner_text()


def test_a_server_with_one_model_says_how_to_compare(page: Any) -> None:
    page.get_by_role("tab", name="Compare").click()
    assert page.get_by_text("--adapter NAME=PATH").is_visible()
    page.locator("#compare-question textarea").fill("What is this?")
    page.locator("#compare-question textarea").press("Enter")
    for i in range(2):
        page.locator(f"#compare-answer-{i} .figures").wait_for()
    assert (
        page.locator("#compare-answer-0 .words").inner_text() == page.locator("#compare-answer-1 .words").inner_text()
    )
