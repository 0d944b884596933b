"""Fixtures of the training tests."""

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava.train.recipe import Recipe
from tests import tiny, training
from tests.training import Assets, recipe, run


@pytest.fixture(scope="session")
def assets(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """Float32 models and data that all training tests share."""
    folder = tmp_path_factory.mktemp("assets")
    llava = tiny.write_llava(folder / "llava", clip=clip, torch_dtype="float32", layout="safetensors")
    return training.build_assets(folder, clip, llava)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Uses one thread, as background runs do, so that sums are computed in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def usual(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[float]]:
    """A run that other runs are compared with."""
    torch.set_num_threads(1)
    asked = recipe(assets, tmp_path_factory.mktemp("usual") / "run", max_steps=8)
    return asked, run(asked)


@pytest.fixture
def finished(usual: tuple[Recipe, list[float]], tmp_path: Path) -> Recipe:
    """A copy of the usual run that a test may modify."""
    shutil.copytree(usual[0].output_dir, tmp_path / "run")
    asked = replace(usual[0], output_dir=str(tmp_path / "run"))
    file = tmp_path / "run" / "recipe.json"
    file.write_text(file.read_text().replace(usual[0].output_dir, asked.output_dir))
    return asked


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the import of a package fail."""

    def absent(package: str) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == package or package in name.split(".")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return absent
