"""Checkpoints and the in-process command that several journeys use."""

from pathlib import Path

import pytest
from PIL import Image

from llava.cli import main
from tests import tiny
from tests.command import Command, Said
from tests.conftest import Share


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Runs `llava ARGS` in this process. pytest captures the warnings, which otherwise go to stderr."""
    monkeypatch.setenv("COLUMNS", "400")

    def call(*args: object, fails: bool = False) -> Said:
        capsys.readouterr()
        caplog.clear()
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        said = Said(int(end.value.code or 0), *capsys.readouterr(), [record.getMessage() for record in caplog.records])
        assert (said.code != 0) == fails, said.err
        return said

    return call


@pytest.fixture(scope="session")
def picture(share: Share) -> Path:
    def draw(folder: Path) -> None:
        folder.mkdir()
        Image.linear_gradient("L").resize((90, 40)).convert("RGB").save(folder / "picture.png")

    return share("picture", draw) / "picture.png"


@pytest.fixture(scope="session")
def vicuna(share: Share) -> Path:
    return share("vicuna", lambda folder: tiny.write_llama(folder, _name_or_path="lmsys/vicuna-13b-v1.3"))


@pytest.fixture(scope="session")
def next_(share: Share, clip: Path) -> Path:
    """LLaVA-1.6: anyres, a tuned tower inside, bfloat16 in shards."""
    options = {"layout": "safetensors-shards", "tower_seed": 5, **tiny.ANYRES}
    return share("next", lambda folder: tiny.write_llava(folder, clip=clip, **options))


@pytest.fixture(scope="session")
def mpt(share: Share, clip: Path) -> Path:
    return share("mpt", lambda folder: tiny.write_mpt(folder, clip=clip))
