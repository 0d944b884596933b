"""Where a test of the engine runs: on the CPU in an ordinary run, and on a GPU with `pytest -m gpu`."""

from typing import NamedTuple

import pytest
import torch


class Target(NamedTuple):
    device: str
    graphs: bool  # EngineOptions.graphs


TARGETS = [
    pytest.param(Target("cpu", False), id="cpu"),
    pytest.param(Target("cuda", False), id="cuda", marks=pytest.mark.gpu),
    pytest.param(Target("cuda", True), id="cuda with graphs", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    if request.param.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: pytest -m gpu")
    return request.param


@pytest.fixture(scope="module")
def device(target: Target) -> str:
    return target.device


@pytest.fixture(scope="module")
def graphs(target: Target) -> bool:
    return target.graphs
