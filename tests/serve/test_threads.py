"""How many threads compute on a CPU while a server runs."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys, threading
import torch
from llava.serve.engine_thread import use_threads

before = torch.get_num_threads()
use_threads(eval(sys.argv[1]))
found = []
thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))  # as the engine's
thread.start()
thread.join()
print(before, found[0])
"""


@pytest.mark.parametrize(("asked", "variable"), [(None, None), (3, None), (None, "2"), (3, "2")])
def test_one_core_is_left_unless_a_number_is_given(asked: int | None, variable: str | None) -> None:
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env |= {"OMP_NUM_THREADS": variable} if variable else {}
    done = subprocess.run(
        [sys.executable, "-c", CODE, repr(asked)], env=env, capture_output=True, text=True, check=True
    )
    before, used = map(int, done.stdout.split())
    assert used == (asked or (int(variable) if variable else max(1, before - 1)))
