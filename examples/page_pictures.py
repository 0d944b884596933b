"""Takes the pictures of the page of `llava serve` that README and docs/serving.md show. Needs Chromium and Playwright.

    .venv/bin/python -m examples.page_pictures

Starts a server with llava-tiny, uses the page as a visitor does, and writes docs/page-chat.png, docs/page-gallery.png
and docs/page-phone.png.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

PROJECT = Path(__file__).resolve().parent.parent
PICTURES = PROJECT / "examples" / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIZES = {"page-chat": (1000, 1600), "page-gallery": (1000, 760), "page-phone": (390, 844)}
_COLOURS = 128  # of the files, which are a quarter as large as with all colours


def ask(page: Page, tab: str, question: str, *pictures: Path) -> None:
    """Asks in one of the tabs."""
    page.locator(f"#{tab} input[type=file]").set_input_files(pictures)
    page.locator(f"#{tab} .thumbnail-item").nth(len(pictures) - 1).wait_for()
    page.locator(f"#{tab} textarea").fill(question)
    page.locator(f"#{tab} textarea").press("Enter")


def chat(page: Page) -> None:
    """An answer, and what one of its words looks at."""
    ask(page, "question", "Describe this image in detail.", PICTURES / "kitchen.png")
    page.locator("#answers .figures").wait_for()
    page.locator("#answers .word", has_text="teapot").click()
    page.locator("#look canvas").wait_for()
    page.evaluate("scrollTo(0, 0)")
    page.mouse.move(1, 1)
    page.wait_for_timeout(300)
    page.locator("#answers .word", has_text="teapot").hover()  # shows its alternatives


def gallery(page: Page) -> None:
    """One question about all example pictures."""
    page.get_by_role("tab", name="Gallery").click()
    ask(page, "gallery-question", "What is in the picture?", *sorted(PICTURES.glob("*.png")))
    page.get_by_text("3 of 3 done").wait_for()
    page.wait_for_function("![...document.querySelectorAll('#gallery-table td')].some((one) => one.innerText === '…')")


def take(browser: Any, url: str, name: str, use: Callable[[Page], None], scheme: str) -> None:
    """Writes docs/NAME.png."""
    width, height = SIZES[name]
    size = {"width": width, "height": height}
    page = browser.new_page(viewport=size, color_scheme=scheme, device_scale_factor=1.5)
    page.goto(url)
    page.wait_for_selector("#question textarea")
    use(page)
    page.wait_for_timeout(500)  # pictures appear and buttons fade
    file = PROJECT / "docs" / f"{name}.png"
    page.screenshot(path=file)
    page.close()
    Image.open(file).convert("RGB").quantize(_COLOURS).save(file, optimize=True)
    print(f"wrote {file}")


def main() -> None:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        sys.exit(f"no browser; expected one of {', '.join(BROWSERS)} in PATH")
    command = [sys.executable, "-m", "llava.cli", "serve", "--port", "0", "--device", "cpu", "--ui"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
    try:
        assert server.stdout
        url = server.stdout.readline().split()[-1]
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
            take(browser, url, "page-chat", chat, "light")
            take(browser, url, "page-gallery", gallery, "dark")
            take(browser, url, "page-phone", chat, "light")
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
