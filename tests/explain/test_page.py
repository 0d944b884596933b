"""The page of an explanation in a real browser."""

import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import llava
from llava.assistant import question_about
from llava.explain.page import page

KITCHEN = Path(__file__).parents[2] / "examples" / "pictures" / "kitchen.png"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")


def shot(text: str, folder: Path) -> Image.Image:
    """The page in a window of 700 x 700 pixels."""
    (folder / "page.html").write_text(text, encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", *QUIET, "--window-size=700,700"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000"]
    command += [f"--screenshot={folder / 'shot.png'}", (folder / "page.html").as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    return Image.open(folder / "shot.png").convert("RGB")


def test_the_page_shows_the_picture_and_what_a_word_looks_at(tmp_path: Path) -> None:
    found = llava.load(device="cpu").attention_map(question_about(KITCHEN, "What is in the picture?"))
    picture = Image.open(KITCHEN)
    text = page(found, [picture], "What is in the picture?", "the prompt")
    last = len(found.words) - 1
    shown = shot(
        text.replace("show(buttons[0], data.words[0])", f"show(buttons[{last}], data.words[{last}])"), tmp_path
    )
    blue = [(x, y) for y in range(700) for x in range(700) if is_blue(shown.getpixel((x, y)))]
    left, top = min(x for x, _ in blue), min(y for _, y in blue)
    right, bottom = max(x for x, _ in blue) + 1, max(y for _, y in blue) + 1
    assert (right - left) / (bottom - top) == pytest.approx(256 / 192, rel=0.05)
    teapot = shown.crop((left, top, right, bottom)).resize((256, 192)).crop((133, 55, 213, 132))
    before = picture.convert("RGB").crop((133, 55, 213, 132))
    assert difference(teapot, before) > 3 * difference(
        shown.crop((left, top, right, bottom)).resize((256, 192)).crop((55, 10, 120, 70)),  # the croissant
        picture.convert("RGB").crop((55, 10, 120, 70)),
    )


def is_blue(pixel: object) -> bool:
    assert isinstance(pixel, tuple)
    red, _, blue = pixel
    return blue > 140 > red + 20


def difference(one: Image.Image, other: Image.Image) -> float:
    pairs = zip(one.tobytes(), other.tobytes(), strict=True)
    return sum(abs(a - b) for a, b in pairs) / len(one.tobytes())
