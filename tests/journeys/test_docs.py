"""The code on documentation pages runs as printed, and the map lists every file."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests import tiny
from tests.conftest import PROJECT
from tests.forkserver import fast_llava

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
SERVING = PROJECT / "docs" / "serving.md"  # its examples need a server: test_serving_page.py
FAMILY_PAGES = sorted((PROJECT / "docs" / "families").glob("*.md"))  # their commands run in test_family_pages.py


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything the pages mention: small checkpoints under published names, pictures, rows, scripts."""
    folder = tmp_path_factory.mktemp("desk")
    tiny.write_llava(folder / "llava-v1.5-7b", clip=tiny.write_clip(folder / "clip-vit-large-patch14-336"))
    tiny.write_llama(folder / "vicuna-7b-v1.5", _name_or_path="lmsys/vicuna-7b-v1.5")
    for seed, name in enumerate(("llava-v1.5-7b-lora", "my-lora")):
        tiny.write_lora(
            folder / name, clip=folder / "clip-vit-large-patch14-336", seed=seed, base="lmsys/vicuna-7b-v1.5"
        )
    for name, size in (("photo.jpg", (96, 64)), ("second.jpg", (40, 80))):
        Image.linear_gradient("L").resize(size).convert("RGB").save(folder / name)
    (folder / "photos").mkdir()
    for name in ("photo.jpg", "second.jpg"):
        shutil.copy(folder / name, folder / "photos")
    (folder / "rows.jsonl").write_text('{"text": "A pier at a lake."}\n{"text": "It is", "image": "photo.jpg"}\n')
    (folder / "scripts").symlink_to(PROJECT / "scripts")
    return folder


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def commands() -> Iterator[str]:
    """A PATH with python and the fast llava of tests/forkserver.py, because pages run about fifty commands."""
    with fast_llava() as folder:
        yield os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.mark.parametrize("page", [page for page in PAGES if page != SERVING], ids=lambda page: page.name)
def test_code_on_a_page_runs(page: Path, desk: Path, commands: str) -> None:
    environment = os.environ | {"PATH": commands}
    python, shell = "\n".join(blocks(page, "python")), "\n".join(blocks(page, "bash"))
    for command in ([sys.executable, "-c", python], ["bash", "-euo", "pipefail", "-c", shell]):
        run = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, timeout=280)
        assert run.returncode == 0, run.stderr[-2000:]


def test_the_map_names_every_file() -> None:
    named = set(re.findall(r"^\| `(llava/[^`]+)`", (PROJECT / "docs/map.md").read_text(encoding="utf-8"), re.MULTILINE))
    files = {str(path.relative_to(PROJECT)) for path in (PROJECT / "llava").rglob("*.py")}
    assert named == {file for file in files if not file.endswith("/__init__.py") or file == "llava/__init__.py"}


@pytest.mark.parametrize("page", [*PAGES, *FAMILY_PAGES], ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target
