"""Random schedules of requests give what the plain model gives. `python -m tests.schedules` runs many more."""

from pathlib import Path

import pytest

from tests.schedules import MODELS, World, load_worlds, run_case

N = 24  # schedules; the models take turns


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    folder: Path = tmp_path_factory.mktemp("schedules")
    return load_worlds(folder)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("number", range(N))
def test_a_random_schedule_gives_what_the_plain_model_gives(
    number: int, overlap: bool, worlds: dict[str, World]
) -> None:
    assert len(worlds) == len(MODELS)
    result = run_case(20, number, worlds, overlap=overlap)
    assert result["outcome"] == "equal", result["detail"]
