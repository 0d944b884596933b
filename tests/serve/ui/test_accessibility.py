"""The page has no serious fault that axe finds (https://github.com/dequelabs/axe-core)."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.ui.conftest import Browser
from tests.serving import Server

KITCHEN = Path(__file__).parents[3] / "examples" / "pictures" / "kitchen.png"
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def axe() -> str:
    """axe's script. The environment variable NODE_MODULES names a folder `node_modules` with the package axe-core."""
    script = Path(os.environ.get("NODE_MODULES", "")) / "axe-core" / "axe.min.js"
    if not script.is_file():
        pytest.skip("needs NODE_MODULES, a folder with the npm package axe-core")
    return script.read_text()


def chat(page: Any) -> None:
    page.locator("#question input[type=file]").set_input_files(KITCHEN)
    page.locator("#question .thumbnail-item").wait_for()
    page.locator("#question textarea").fill("Describe this image in detail.")
    page.locator("#question textarea").press("Enter")
    page.locator("#answers .figures").wait_for()
    page.locator("#answers .look").click()
    page.locator("#look canvas").wait_for()
    page.get_by_role("button", name="Options").first.click()
    page.locator("#problem").evaluate("one => (one.innerHTML = '<p role=alert>a problem</p>')")


def gallery(page: Any) -> None:
    page.get_by_role("tab", name="Gallery").click()
    page.locator("#gallery-question input[type=file]").set_input_files(KITCHEN)
    page.locator("#gallery-question .thumbnail-item").wait_for()
    page.locator("#gallery-question textarea").fill("What is this?")
    page.locator("#gallery-question textarea").press("Enter")
    page.get_by_text("1 of 1 done").wait_for()


def compare(page: Any) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-question textarea").fill("What is this?")
    page.locator("#compare-question textarea").press("Enter")
    page.locator("#compare-answer-1 .figures").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("use", [chat, gallery, compare])
def test_axe_finds_no_serious_fault(
    use: Callable[[Any], None], scheme: str, axe: str, browser: Browser, site: Server
) -> None:
    with browser.open(site.url, color_scheme=scheme, bypass_csp=True) as page:
        use(page)
        page.evaluate(axe)
        found = page.evaluate("axe.run()")
        assert found["passes"]
        faults = [one for one in found["violations"] if one["impact"] in SERIOUS]
        assert not faults, "\n".join(
            f"{one['id']}: {one['help']}: {[node['html'][:150] for node in one['nodes'][:3]]}" for one in faults
        )
