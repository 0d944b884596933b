"""The number of worker processes."""

import os
from pathlib import Path

import pytest

from llava.data.workers import available_cpus, capped_workers, default_workers


def no_limits(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000\n"}, 16),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
    ],
)
def test_the_affinity_and_the_quota_of_a_container_count(
    files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_limits(monkeypatch, 16)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cpus(tmp_path) == cpus


@pytest.mark.parametrize(("asked", "processes", "started"), [(0, 1, 0), (2, 1, 2), (9, 1, 2), (9, 2, 1), (9, 8, 1)])
def test_workers_beyond_the_cpus_are_not_started_and_one_line_says_so(
    asked: int, processes: int, started: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_limits(monkeypatch, 2)
    assert capped_workers(asked, "num_workers", processes) == started
    assert len(caplog.records) == (asked > started)
    if asked > started:
        assert f"num_workers is {asked}" in caplog.text


@pytest.mark.parametrize(("cpus", "processes", "started"), [(16, 1, 4), (2, 1, 2), (16, 8, 2), (2, 8, 1)])
def test_a_number_that_nobody_asked_for_is_lowered_without_a_word(
    cpus: int, processes: int, started: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_limits(monkeypatch, cpus)
    assert default_workers(4, processes) == started
    assert not caplog.records
