"""Servers that all tests of a worker share, as each takes seconds to start."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llava
from tests import tiny
from tests.conftest import Share
from tests.serving import PICTURE_MARKS, Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """llava-tiny, served with the default options."""
    log = tmp_path_factory.mktemp("serve") / "errors.txt"
    with serving(log, llava.load(device="cpu"), "llava-tiny", "--device", "cpu") as server:
        yield server


@pytest.fixture(scope="session")
def marked(share: Share, clip: Path) -> Path:
    """A LoRA whose vocabulary and prompts have marks around pictures."""
    options: dict[str, Any] = {"vocab_size": tiny.PIECES + len(PICTURE_MARKS), "mm_use_im_start_end": True}
    return share("marked", lambda folder: tiny.write_lora(folder, clip=clip, added=PICTURE_MARKS, rows=True, **options))


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory, base: Path, lora: Path, marked: Path) -> Iterator[Server]:
    """A small random Llama, which has no vision, with the adapters "cats" and "marked", which have."""
    adapters = {"cats": lora, "marked": marked}
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "template": "vicuna_v1"}
    vlm = llava.load(base, adapters=adapters, **options)
    vlm.adapter(None)
    arguments: list[object] = ["--model", base]
    for name, folder in adapters.items():
        arguments += ["--adapter", f"{name}={folder}"]
    for name, value in options.items():
        arguments += [f"--{name}", value]
    log = tmp_path_factory.mktemp("adapted") / "errors.txt"
    with serving(log, vlm, base.name, *arguments) as server:
        yield server
