"""Runs the tests of each kernel in Triton's interpreter on the CPU. See conftest.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava.kernels.support import is_interpreted, triton
from tests.command import PROJECT

FILES = sorted(set(Path(__file__).parent.glob("test_*.py")) - {Path(__file__)})
TIMEOUT_S = 290  # less than that of a test, to report the output

pytestmark = [
    pytest.mark.skipif(triton is None, reason="needs Triton: pip install triton -c constraints.txt"),
    pytest.mark.skipif(is_interpreted(), reason="this process runs in the interpreter"),
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_"))
def test_kernels_pass_their_tests_in_the_interpreter(file: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-q", "-m", "not gpu", "-p", "no:cacheprovider", "--basetemp", tmp_path],
        cwd=PROJECT,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
