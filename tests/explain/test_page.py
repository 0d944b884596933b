"""The page of an explanation in a real browser."""

import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageChops

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
    text = page(found, [Image.open(KITCHEN)], "What is in the picture?", "the prompt")
    words = [word.strip(".,") for word, _ in found.words]
    shown, hottest = {}, {}
    for word in ("croissant", "teapot"):
        i = words.index(word)
        shown[word] = picture_in(shot(text.replace("view.show(0)", f"view.show({i})"), tmp_path))
        heat = found.pictures[0].pixels(found.words[i][1])
        y, x = divmod(int(heat.argmax()), heat.shape[1])
        hottest[word] = (x + 5, y + 5)  # within the patch
    for word, other in (("croissant", "teapot"), ("teapot", "croissant")):
        at = hottest[word]
        assert brightness(shown[word], at) > brightness(shown[other], at) + 60


def picture_in(shown: Image.Image) -> Image.Image:
    """The picture on the page, at its own size. Its background is blue."""
    blue = shown.convert("HSV").point([*[255 * (140 < hue < 190) for hue in range(256)], *range(256), *range(256)])
    saturated = shown.convert("HSV").getchannel("S").point([255 * (value > 120) for value in range(256)])
    box = ImageChops.multiply(blue.getchannel("H"), saturated).getbbox()
    assert box
    assert (box[2] - box[0]) / (box[3] - box[1]) == pytest.approx(256 / 192, rel=0.05)
    return shown.crop(box).resize((256, 192))


def brightness(image: Image.Image, at: tuple[int, int]) -> int:
    value = image.convert("L").getpixel(at)
    assert isinstance(value, int)
    return value
