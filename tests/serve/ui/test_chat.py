"""The chat in Chromium, as a visitor uses it."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llava
from tests.serve.ui.conftest import KEYS, Browser
from tests.serving import Server

KITCHEN = Path(__file__).parents[3] / "examples" / "pictures" / "kitchen.png"
DESCRIBE = "Describe this image in detail."
LAST_TURN = ["User: How many apples are there?", "Assistant: There is one red apple."]
EVIL = "<img src=x onerror=\"document.title='evil'\"> {{value}} ${1+1} a < b &amp; R&D"


# As fast as a visitor can be, so that the answer does not end before.
STOP_EARLY = """() => {
    const timer = setInterval(() => {
        const stop = document.querySelector("#question .stop-button"), answer = document.querySelector("#answers .bot");
        if (!stop || !(answer?.innerText.trim().length > 10)) return;
        window.finished = document.querySelectorAll("#answers .figures").length;
        stop.click();
        clearInterval(timer);
    }, 20);
}"""


@pytest.fixture
def page(browser: Browser, site: Server) -> Iterator[Any]:
    with browser.open(site.url) as page:
        yield page


def attach(page: Any, *files: Any) -> None:
    page.locator("#question input[type=file]").set_input_files(list(files))
    page.wait_for_selector("#question .thumbnail-item, #question button[aria-label='Remove file'], #question img")


def ask(page: Any, text: str) -> None:
    page.locator("#question textarea").fill(text)
    page.locator("#question textarea").press("Enter")


def answered(page: Any, n: int = 1) -> str:
    """Waits for answer `n`, counted from 1, and returns its words."""
    page.locator("#answers .figures").nth(n - 1).wait_for()
    return str(page.locator("#answers .words").nth(n - 1).inner_text()).strip()


def option(page: Any, label: str, value: str) -> None:
    fields = page.get_by_label(re.compile(label)).and_(page.locator("input[type=number]"))
    if not fields.first.is_visible():
        page.get_by_role("button", name="Options").click()
    fields.first.fill(value)
    fields.first.press("Tab")


def alert(page: Any) -> str:
    page.locator("#problem [role=alert]").wait_for()
    return str(page.locator("#problem").inner_text()).strip()


def test_a_picture_is_asked_about_over_several_turns(page: Any, site: Server) -> None:
    attach(page, KITCHEN)
    ask(page, DESCRIBE)
    first_words = answered(page)
    assert "red apple, a croissant" in first_words
    assert page.locator("#question textarea").input_value() == ""
    ask(page, "How many apples are there?")
    assert answered(page, 2) == "There is one red apple."
    first, second = page.locator("#answers .figures").all_inner_texts()
    assert re.search(
        r"first token after [\d.]+ s · \d+ tokens in [\d.]+ s · [\d.]+ tokens/s · \d+ prompt tokens", first
    )
    cached = re.search(r"(\d+) of them cached", second)
    assert cached
    assert int(cached[1]) > 100  # the picture was there before
    picture = page.get_by_alt_text("Picture 1 of the conversation")
    assert picture.evaluate("one => one.complete && one.naturalWidth") == 256
    page.get_by_role("button", name="Copy the conversation").click()
    page.get_by_role("button", name="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()").split("\n\n")
    assert copied[:2] == ["User: [picture]", f"User: {DESCRIBE}"]
    assert copied[2:] == [f"Assistant: {first_words}", *LAST_TURN]
    page.locator("#answers .copy").last.click()
    page.wait_for_function("navigator.clipboard.readText().then((text) => text === 'There is one red apple.')")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the conversation").click()
    assert re.fullmatch(r"llava-chat-[\dT-]+\.json", download.value.suggested_filename)
    messages = json.loads(Path(download.value.path()).read_text())["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant", "user", "assistant"]
    url = messages[0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.split(",")[1]) == KITCHEN.read_bytes()
    assert messages[3]["content"] == "There is one red apple."


def test_pictures_are_pasted_and_dropped(page: Any) -> None:
    contents = base64.b64encode(KITCHEN.read_bytes()).decode()
    put = """([kind, contents]) => {
        const bytes = Uint8Array.from(atob(contents), (c) => c.charCodeAt(0)), data = new DataTransfer();
        data.items.add(new File([bytes], `${kind}.png`, { type: "image/png" }));
        const field = document.querySelector("#question textarea"), common = { bubbles: true, cancelable: true };
        field.dispatchEvent(kind === "paste" ? new ClipboardEvent("paste", { clipboardData: data, ...common })
                                             : new DragEvent("drop", { dataTransfer: data, ...common }));
    }"""
    for n, kind in enumerate(("paste", "drop"), start=1):
        page.evaluate(put, [kind, contents])
        page.locator("#question .thumbnail-item").nth(n - 1).wait_for()
    ask(page, "How many apples are there?")
    assert "apple" in answered(page)
    assert page.locator("#answers .user img").count() == 2


def test_a_photo_is_taken_and_an_example_asked(page: Any) -> None:
    page.get_by_role("button", name="Photograph").click()
    page.get_by_role("button", name="Take the photo").click()
    page.locator("#question .thumbnail-item").first.wait_for()
    ask(page, "What is in the picture?")
    answered(page)
    assert page.locator("#camera").count() == 0
    page.locator("#examples").get_by_text("How many boats are there?").click()
    page.wait_for_function("document.querySelector('#question textarea').value.includes('boats')")
    page.locator("#question textarea").press("Enter")
    assert "boat" in answered(page, 2)


def test_an_answer_is_stopped_and_a_question_edited_and_asked_again(page: Any) -> None:
    option(page, "Temperature", "2")
    option(page, "Maximum tokens", "800")
    attach(page, KITCHEN)
    page.evaluate(STOP_EARLY)
    ask(page, DESCRIBE)
    assert answered(page)
    assert page.evaluate("window.finished") == 0  # answers, when there was text: it streams
    assert page.locator("#answers .figures").inner_text() == "stopped"
    option(page, "Temperature", "0")
    edit(page, DESCRIBE, "How many apples are there?")
    page.wait_for_function("document.querySelector('#answers .words')?.innerText.includes('one red apple')")
    assert page.locator("#answers .figures").count() == 1
    before = page.locator("#answers .words").get_attribute("data-answer")
    page.locator("#answers").get_by_role("button", name="Retry").click()
    page.wait_for_function(
        f"![undefined, '{before}'].includes(document.querySelector('#answers .words')?.dataset.answer)"
    )
    assert answered(page) == "There is one red apple."
    page.locator("#answers").get_by_role("button", name="Undo").click()
    page.wait_for_function("document.querySelector('#question textarea').value === 'How many apples are there?'")
    assert page.locator("#question .thumbnail-item").count() == 1
    assert page.locator("#answers .bot").count() == 0


def test_what_is_being_written_stays_when_an_answer_is_asked_for_again(page: Any) -> None:
    ask(page, "What is this?")
    answered(page)
    page.locator("#question textarea").fill("a draft")
    before = page.locator("#answers .words").get_attribute("data-answer")
    page.locator("#answers").get_by_role("button", name="Retry").click()
    page.wait_for_function(
        "before => (document.querySelector('#answers .words')?.dataset.answer ?? before) !== before", arg=before
    )
    assert page.locator("#question textarea").input_value() == "a draft"
    edit(page, "What is this?", " ")
    assert alert(page) == "write a question first"
    assert "What is this?" in page.locator("#answers .user").inner_text()


def test_what_the_server_says_is_shown_after_a_problem_of_the_browser(page: Any) -> None:
    page.evaluate("() => { navigator.mediaDevices.getUserMedia = () => Promise.reject(new Error('denied')); }")
    page.get_by_role("button", name="Photograph").click()
    page.get_by_text("The camera cannot be used: denied").wait_for()
    page.locator("#question textarea").press("Enter")
    assert alert(page) == "write a question first"


def test_a_conversation_is_cleared_while_an_answer_grows_and_the_next_question_can_be_sent(page: Any) -> None:
    option(page, "Temperature", "2")
    option(page, "Maximum tokens", "800")
    ask(page, DESCRIBE)
    page.wait_for_function("document.querySelector('#answers .bot')?.innerText.trim().length > 10")
    page.locator("#answers").get_by_role("button", name="Clear").click()
    page.locator("#question .submit-button").wait_for()
    page.wait_for_function("document.querySelector('#answers .bot') === null")  # drawn after the button
    page.wait_for_timeout(500)
    assert page.locator("#answers .bot").count() == 0  # it does not come back
    assert page.locator("#question .stop-button").count() == 0


def edit(page: Any, old: str, new: str) -> None:
    page.locator("#answers").get_by_text(old).hover()
    page.locator("#answers").get_by_role("button", name="Edit").last.click()
    page.locator("#answers textarea").fill(new)
    page.locator("#answers").get_by_role("button", name="Submit").click()


def test_words_show_their_alternatives_and_what_they_look_at(page: Any, site: Server) -> None:
    attach(page, KITCHEN)
    ask(page, DESCRIBE)
    answered(page)
    word = page.locator("#answers .word", has_text="croissant")
    word.hover()
    tip = page.locator("#alternatives")
    assert re.search(r"▸.*\d+\.\d %", tip.inner_text(), re.DOTALL)
    page.mouse.move(1, 1)
    assert tip.is_hidden()
    word.click()
    page.locator("#look canvas").wait_for()
    assert page.locator("#look [aria-pressed=true]").inner_text().startswith("croissant")
    croissant = heat(page)
    page.locator("#answers .word", has_text="teapot").click()
    page.wait_for_function("document.querySelector('#look [aria-pressed=true]').innerText.startsWith('teapot')")
    teapot = heat(page)
    expected = llava.load(device="cpu").attention_map(llava.assistant.question_about(KITCHEN, DESCRIBE))
    for text, (x, y) in (("croissant", croissant), ("teapot", teapot)):
        (tokens,) = (span for one, span in expected.words if one.startswith(text))
        pixels = expected.pictures[0].pixels(tokens)
        at = divmod(int(pixels.argmax()), pixels.shape[1])
        assert (abs(at[1] / 256 - x) < 0.06, abs(at[0] / 192 - y) < 0.06) == (True, True), (text, x, y, at)
    page.get_by_text("The prompt as the model saw it").click()
    assert "USER:" in page.locator("#look .prompt").inner_text()
    assert page.locator("#look .note").count() == 1  # the answer is the same


def heat(page: Any) -> list[float]:
    """Where the map over the picture is lightest, as parts of its width and height."""
    found = page.evaluate(
        """() => {
            const canvas = document.querySelector("#look canvas"), [w, h] = [canvas.width, canvas.height];
            const pixels = canvas.getContext("2d").getImageData(0, 0, w, h).data;
            let best = -1, at = 0;
            for (let i = 0; i < w * h; i++) if (pixels[4 * i + 3] * 4 + pixels[4 * i + 1] > best)
                [best, at] = [pixels[4 * i + 3] * 4 + pixels[4 * i + 1], i];
            return [(at % w) / w, Math.floor(at / w) / h];
        }"""
    )
    return [float(one) for one in found]


def test_a_sampled_answer_is_explained_as_it_was(page: Any) -> None:
    option(page, "Temperature", "1")
    attach(page, KITCHEN)
    ask(page, DESCRIBE)
    text = answered(page)
    page.get_by_role("button", name=re.compile("Show what it looked at")).click()
    page.locator("#look canvas").wait_for()
    assert " ".join(page.locator("#look .words button").all_inner_texts()) == " ".join(text.split())


def test_text_is_never_html(page: Any) -> None:
    ask(page, EVIL)
    answered(page)
    assert EVIL in page.locator("#answers .user").inner_text()
    assert page.locator("#answers img").count() == 0
    page.get_by_role("button", name=re.compile("Show what it looked at")).click()
    page.locator("#look .prompt").wait_for(state="attached")
    assert EVIL in page.locator("#look .question").inner_text()
    edit(page, EVIL[:20], EVIL + " again")
    page.locator("#look .viewer").wait_for(state="detached")  # the new answer begins
    answered(page)
    assert EVIL + " again" in page.locator("#answers .user").inner_text()
    assert page.title() == "llava-tiny · llava"


def test_what_goes_wrong_is_one_line_and_the_question_is_not_lost(page: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(KITCHEN.read_bytes()[:200])
    attach(page, tmp_path / "broken.png")
    ask(page, DESCRIBE)
    assert "picture" in alert(page) or "image" in alert(page)
    assert page.locator("#question textarea").input_value() == DESCRIBE
    page.locator("#question button[aria-label='Remove file'], #question .delete-button").first.click()
    ask(page, "a word " * 2000)
    page.wait_for_function("document.querySelector('#problem').innerText.includes('tokens')")
    assert "\n" not in alert(page)
    assert page.locator("#question textarea").input_value() == ("a word " * 2000).strip()
    ask(page, "What is this?")
    answered(page)
    assert page.locator("#problem [role=alert]").count() == 0


def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Browser, site: Server) -> None:
    with browser.open(site.url) as page:
        page.set_viewport_size({"width": 390, "height": 844})
        attach(page, KITCHEN)
        ask(page, DESCRIBE)
        answered(page)
        page.get_by_role("button", name=re.compile("Show what it looked at")).click()
        page.locator("#look canvas").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        box = page.locator("#look img").bounding_box()
        assert box
        assert box["x"] + box["width"] <= 390


def test_dark_mode_follows_the_system_and_the_button(browser: Browser, site: Server) -> None:
    brightness = "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    for scheme, dark in (("light", False), ("dark", True)):
        with browser.open(site.url, color_scheme=scheme) as page:
            page.wait_for_function(f"({brightness} < 100) === {str(dark).lower()}")
            page.get_by_role("button", name="Dark or light").click()
            page.wait_for_function(f"({brightness} < 100) === {str(not dark).lower()}")
            page.reload()
            page.wait_for_selector("#question textarea")
            page.wait_for_function(f"({brightness} < 100) === {str(not dark).lower()}")


def test_all_of_it_works_with_the_keyboard(page: Any) -> None:
    page.locator("#question textarea").focus()
    page.keyboard.type("What is this?")
    page.keyboard.press("Enter")
    answered(page)
    page.locator("#answers .word").first.focus()
    assert page.locator("#alternatives").is_visible()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.word") == "1"
    page.keyboard.press("Escape")
    assert page.locator("#alternatives").is_hidden()
    page.keyboard.press("Tab")
    assert "looked at" in page.evaluate("document.activeElement.innerText")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.locator("#look .viewer").wait_for()


def test_the_key_is_asked_for_and_used(browser: Browser, locked: Server) -> None:
    with browser.open(locked.url, http_credentials={"username": "me", "password": KEYS[0]}) as page:
        attach(page, KITCHEN)
        ask(page, "How many apples are there?")
        assert answered(page) == "There is one red apple."
