"""Garbage collections while a batch is generated."""

import gc
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

from llava.engine.collection import set_aside
from llava.engine.sampling_params import SamplingParams
from tests.asking import opened


def test_old_objects_are_not_visited_while_a_batch_is_generated(checkpoint: Path) -> None:
    engine = opened(checkpoint).engine
    old: list[int] = []

    def is_visited() -> bool:
        return any(one is old for one in gc.get_objects())

    params = SamplingParams(max_new_tokens=2)
    assert [is_visited() for _ in engine.generate_each(["Hi", "Ho"], params)] == [False, False]
    assert is_visited()


def test_objects_stay_set_aside_until_whoever_did_it_first_ends_it() -> None:
    with set_aside():
        with set_aside():
            pass
        assert gc.get_freeze_count() > 10_000
    assert gc.get_freeze_count() == 0


def test_what_python_sets_aside_when_it_starts_does_not_keep_other_objects_from_being_set_aside() -> None:
    code = """
        import gc
        gc.freeze()  # as Python 3.12 does
        from llava.engine.collection import set_aside
        ours = []
        with set_aside():
            print(any(one is ours for one in gc.get_objects()), end=" ")
        print(any(one is ours for one in gc.get_objects()))
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
