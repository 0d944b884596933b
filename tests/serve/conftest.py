"""Servers that all tests of a worker share, as each takes seconds to start."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llava
from tests.serving import Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """llava-tiny, served with the default options."""
    log = tmp_path_factory.mktemp("serve") / "errors.txt"
    with serving(log, llava.load(device="cpu"), "llava-tiny", "--device", "cpu") as server:
        yield server


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, lora: Path) -> Iterator[Server]:
    """A small random LLaVA with the adapter "cats"."""
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    vlm = llava.load(checkpoint, adapters={"cats": lora}, **options)
    vlm.adapter(None)
    log = tmp_path_factory.mktemp("adapted") / "errors.txt"
    arguments = ("--model", checkpoint, "--adapter", f"cats={lora}", "--dtype", "float32", "--device", "cpu")
    with serving(log, vlm, checkpoint.name, *arguments) as server:
        yield server
