"""Runs that end early: by a signal, or because a worker was killed."""

import os
import signal
import time
from pathlib import Path

import pytest

from llava.errors import ConfigError
from llava.train.distributed import join_world
from llava.train.loop import train
from llava.train.resume import Checkpointer
from tests import command, training
from tests.training import Assets, at_step, recipe, rows, toml


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_one_line_and_a_complete_checkpoint(
    assets: Assets, tmp_path: Path, kind: signal.Signals
) -> None:
    """The signal goes to all processes, as from a terminal. Workers exit, and a checkpoint in progress is completed."""
    out = tmp_path / "run"
    file = toml(tmp_path / "recipe.toml", recipe(assets, out, max_steps=400, save_every=1, num_workers=2))
    going = command.start("train", file, "--device", "cpu", start_new_session=True)
    end = time.monotonic() + training.TIMEOUT_S
    while not at_step(out, 3)() and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="another process is training here"):
        train(recipe(assets, out, max_steps=400, save_every=1, num_workers=2), device="cpu")
    os.killpg(going.pid, kind)
    _, stderr = going.communicate(timeout=training.TIMEOUT_S)
    assert (going.returncode, stderr.decode()) == (130, "llava: interrupted\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(going.pid, 0)
    with join_world("cpu") as world:
        latest = Checkpointer(out / "checkpoints", 2, world).latest()
    assert latest is not None
    assert int(latest.name.removeprefix("step-")) >= len(rows(out)) - 2


def test_a_killed_worker_is_reported_in_one_line(assets: Assets, tmp_path: Path) -> None:
    file = toml(tmp_path / "recipe.toml", recipe(assets, tmp_path / "run", max_steps=4000, save_every=0, num_workers=1))
    going = command.start("train", file, "--device", "cpu")
    end = time.monotonic() + training.TIMEOUT_S
    while not at_step(tmp_path / "run", 2)() and time.monotonic() < end:
        time.sleep(0.01)
    (children,) = Path(f"/proc/{going.pid}/task/{going.pid}").glob("children")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    _, stderr = going.communicate(timeout=training.TIMEOUT_S)
    assert stderr.decode().startswith("llava: a data loading process was killed")
    assert going.returncode == 2
    assert stderr.count(b"\n") == 1
