"""The measuring script of one GPU: every case passes on a CPU, and the failure of one case ends no other."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROJECT

pytest.importorskip("transformers")
SCRIPT = PROJECT / "benchmarks" / "gpu.py"
SKIPPABLE = {"first-token-jpeg"}  # without simplejpeg


def run(out: Path, *options: str) -> dict[str, Any]:
    """Runs the script with tiny models on the CPU and returns its result."""
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--layers", "2", "--device", "cpu", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text()) | {"stdout": done.stdout}


def gpt_fast(folder: Path, generate: str) -> str:
    """Writes a program in place of gpt-fast's, and returns the option that names its folder."""
    folder.mkdir()
    (folder / "generate.py").write_text(generate)
    (folder / "model.py").write_text("")
    return f"--gpt-fast={folder}"


def by_case(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in found["rows"]}


@pytest.mark.slow
def test_every_case_passes_with_two_layers(tmp_path: Path) -> None:
    found = run(tmp_path / "result.json")
    failed = [one for one in found["failures"] if not one["skipped"]]
    assert not failed
    rows = by_case(found)
    assert {case for case, row in rows.items() if "value" not in row} - {"agreement"} <= SKIPPABLE
    for case, row in rows.items():
        if "value" in row:
            assert 0 < row["min"] <= row["value"] <= row["max"], case
    with_peer = {case for case, row in rows.items() if row["peers"].get("transformers", {}).get("value")}
    assert with_peer == {
        "agreement", "decode-1", "decode-4000", "decode-8", "decode-32", "decode-128", "first-token", "clip-1",
        "clip-64", "requests-128", "start",
    }  # fmt: skip
    assert rows["prefix"]["figures"]["tokens_from_cache"] > 0
    for name in ("first-token-jpeg", "first-token-jpeg-pillow"):
        assert rows[name].get("figures", {}).get("values_unlike_pillow", 0) == 0
    assert rows["decode-1"]["peers"]["gpt-fast"] == {
        "skipped": "its source was not found; give its folder with --gpt-fast"
    }
    assert len(found["stdout"]) < 12_000


@pytest.mark.parametrize(
    ("generate", "options", "reason"),
    [
        ("raise RuntimeError('broken on purpose')", (), "RuntimeError: broken on purpose"),
        ("import os\nos._exit(3)", (), "the process ended with exit code 3"),
        ("import time\ntime.sleep(600)", ("--peer-seconds", "12"), "no result within"),
    ],
)
def test_a_case_that_fails_is_a_row_and_the_next_goes_on(
    tmp_path: Path, generate: str, options: tuple[str, ...], reason: str
) -> None:
    option = gpt_fast(tmp_path / "gpt-fast", generate)
    found = run(
        tmp_path / "result.json", "--cases", "mpt,decode-4000", option, "--kinds", "llava,mpt,gpt-fast", *options
    )
    rows = by_case(found)
    assert rows["decode-4000"]["value"] > 0
    assert rows["mpt-share"]["value"] > 0
    assert reason in rows["decode-1"]["peers"]["gpt-fast"]["error"]
    assert set(rows["decode-4000"]["peers"]["gpt-fast"]) <= {"error", "skipped"}
    assert reason in found["stdout"]


def test_a_result_is_completed_by_another_run(tmp_path: Path) -> None:
    first = run(tmp_path / "first.json", "--cases", "clip-1", "--skip-peers")
    both = run(tmp_path / "both.json", "--cases", "first-token", "--skip-peers", "--join", str(tmp_path / "first.json"))
    assert {"clip-1", "first-token"} <= set(by_case(both))
    assert by_case(both)["clip-1"]["value"] == by_case(first)["clip-1"]["value"]
    assert both["joined"]["command"] == first["command"]
    elsewhere = json.loads((tmp_path / "first.json").read_text())
    elsewhere["machine"]["gpu"] = "NVIDIA H200"
    (tmp_path / "elsewhere.json").write_text(json.dumps(elsewhere))
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--join", str(tmp_path / "elsewhere.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "NVIDIA H200" in done.stderr


def test_a_profile_lists_where_the_time_goes(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--device", "cpu", "--profile", "decode-8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "idle" in done.stdout
    assert "aten::" in done.stdout


def test_an_unknown_case_is_refused_with_the_names_of_all() -> None:
    command = [sys.executable, str(SCRIPT), "--cases", "decode-2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "decode-2" in done.stderr
    assert "decode-128" in done.stderr
