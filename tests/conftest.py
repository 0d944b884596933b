"""Where the reference data are, the checkpoints built from them, and the small checkpoints that most tests share."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

PROJECT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("LLAVA_SHARED", PROJECT.parent / "shared"))

# No test asks the network, and no model in somebody's cache changes a result. Set before huggingface_hub is imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(PROJECT / "build" / "empty-hub-cache")}


def pytest_configure(config: pytest.Config) -> None:
    """Tests are of the CPU, on machines with a GPU too; `pytest -m gpu` runs those of the GPU."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the reference data."""
    if not (SHARED / "golden" / "manifest.json").is_file():
        pytest.skip(f"no reference data in {SHARED}: set LLAVA_SHARED to the folder that holds golden/ and data/")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """What the original LLaVA does on the golden checkpoints."""
    return shared / "golden"


def build_once(shared: Path) -> Path:
    """The golden checkpoints, below build/, under a name that changes with the code that makes them.

    They are written under another name first: a build that was broken off is never taken for a whole one.
    """
    tools = shared / "golden" / "tools"
    sources = [*sorted(tools.glob("*.py")), shared / "golden" / "checkpoint_tensors.json"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    folder = PROJECT / "build" / f"golden-{digest}"
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    # -B: no byte code is left beside the tools
    command = [sys.executable, "-B", str(tools / "make_checkpoints.py"), "--out", str(unfinished)]
    subprocess.run([*command, "--check", str(tools.parent / "checkpoint_tensors.json")], check=True, timeout=300)
    try:
        unfinished.rename(folder)
    except OSError:  # another run was faster
        shutil.rmtree(unfinished)
    return folder


@pytest.fixture(scope="session")
def golden_checkpoints(shared: Path) -> Path:
    return build_once(shared)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP in its own folder. Tests that change files work on a copy."""
    return tiny.write_clip(tmp_path_factory.mktemp("tiny") / "clip")


@pytest.fixture(scope="session")
def checkpoint(clip: Path) -> Path:
    """A small merged checkpoint like LLaVA-1.5: sharded .bin, its config names the CLIP folder."""
    return tiny.write_llava(clip.parent / "llava", clip=clip)
