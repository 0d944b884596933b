"""Random schedules of requests give what the plain model gives. `python -m tests.schedules` runs many more."""

from pathlib import Path

import pytest

from llava.engine import runner
from tests.recorded import RecordedGraphs
from tests.schedules import MODELS, World, load_worlds, run_case

N = 24  # schedules; the models take turns


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    folder: Path = tmp_path_factory.mktemp("schedules")
    return load_worlds(folder)


@pytest.mark.parametrize("how", ["in turn", "overlap", "fused", "graphs"])
@pytest.mark.parametrize("number", range(N))
def test_a_random_schedule_gives_what_the_plain_model_gives(
    number: int, how: str, worlds: dict[str, World], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(worlds) == len(MODELS)
    overlap = how in ("overlap", "fused") or (how == "graphs" and number // len(MODELS) % 2 == 1)
    fused = how in ("fused", "graphs")
    if how == "graphs":
        monkeypatch.setattr(runner, "Graphs", lambda device, active: RecordedGraphs(poison=not overlap))
    result = run_case(20, number, worlds, overlap=overlap, fused=fused)
    assert result["outcome"] == "equal", result["detail"]
