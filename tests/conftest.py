"""Fixtures that most tests share: the reference data, and checkpoints that are built once per run."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests import tiny
from tests.expected import MARKS, V11

PROJECT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("LLAVA_SHARED", PROJECT.parent / "shared"))

# Tests never use the network, and a model in the user's cache cannot change a result. Set before huggingface_hub is
# imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(PROJECT / "build" / "empty-hub-cache")}


def pytest_configure(config: pytest.Config) -> None:
    """One torch thread per process, here and in subprocesses; no GPU unless `-m gpu` asks for it.

    Small models are fastest on one thread, and the workers of pytest-xdist then share the cores evenly.
    """
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    # tests send Ctrl-C to subprocesses, which would inherit an ignored SIGINT from a background job of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the reference data."""
    if not (SHARED / "golden" / "manifest.json").is_file():
        pytest.skip(f"no reference data in {SHARED}: set LLAVA_SHARED to the folder that holds golden/ and data/")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Outputs of the original LLaVA on the golden checkpoints."""
    return shared / "golden"


def build_golden(shared: Path) -> Path:
    """Builds the golden checkpoints below build/, unless they exist; a hash of the build scripts names the folder."""
    tools = shared / "golden" / "tools"
    sources = [*sorted(tools.glob("*.py")), shared / "golden" / "checkpoint_tensors.json"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    folder = PROJECT / "build" / f"golden-{digest}"
    folder.parent.mkdir(exist_ok=True)

    def build(unfinished: Path) -> None:
        unfinished.mkdir()
        # -B: no byte code is left in the tools' folder
        command = [sys.executable, "-B", str(tools / "make_checkpoints.py"), "--out", str(unfinished)]
        subprocess.run([*command, "--check", str(tools.parent / "checkpoint_tensors.json")], check=True, timeout=280)

    return build_once(folder, build)


def build_once(folder: Path, build: Callable[[Path], object]) -> Path:
    """Builds a folder that several processes use. It gets its final name only when it is complete."""
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            unfinished = folder.with_name(f".{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was killed
            build(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def golden_checkpoints(shared: Path) -> Path:
    return build_golden(shared)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of each file."""
    found = {str(path.relative_to(folder)): path.stat() for path in sorted(folder.rglob("*"))}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


Share = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def share(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Share]:
    """`share(name, build)`: the folder `name`, built by `build(folder)` once per run for all workers of pytest-xdist.

    Tests only read it; a test that changes files works on a copy. The end of the session fails if one was changed.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # above the folder of each worker
    (root / "shared").mkdir(exist_ok=True)
    built: dict[Path, dict[str, tuple[int, int]]] = {}

    def share(name: str, build: Callable[[Path], object]) -> Path:
        folder = build_once(root / "shared" / name, build)
        built[folder] = snapshot(folder)
        return folder

    yield share
    changed = [folder.name for folder, before in built.items() if snapshot(folder) != before]
    assert not changed, f"tests wrote into shared folders: {changed}"


@pytest.fixture(scope="session")
def clip(share: Share) -> Path:
    """A small CLIP in its own folder."""
    return share("clip", tiny.write_clip)


@pytest.fixture(scope="session")
def checkpoint(share: Share, clip: Path) -> Path:
    """A small LLaVA-1.5 in the original's layout: sharded .bin files, a config that names the CLIP folder."""
    return share("llava", lambda folder: tiny.write_llava(folder, clip=clip))


@pytest.fixture(scope="session")
def base(share: Share) -> Path:
    """The language model of `checkpoint` as a plain Llama."""
    return share("base", tiny.write_llama)


@pytest.fixture(scope="session")
def raw(share: Share) -> Path:
    """The raw LLaMA-1."""
    return share("raw", lambda folder: tiny.write_llama(folder, seed=7, **tiny.LLAMA_1))


@pytest.fixture(scope="session")
def delta(share: Share, clip: Path) -> Path:
    """A delta on the raw LLaMA-1, like v1.1's."""

    def write(folder: Path) -> None:
        tiny.write_delta(folder, clip=clip, added=MARKS, **V11)
        tiny.write_tokenizer(folder, added=MARKS, legacy=None)

    return share("delta", write)


@pytest.fixture(scope="session")
def lora(share: Share, clip: Path) -> Path:
    return share("lora", lambda folder: tiny.write_lora(folder, clip=clip))
