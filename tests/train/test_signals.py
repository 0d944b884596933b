"""Runs that end early: by a signal, or because a worker was killed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llava.errors import ConfigError
from llava.train.distributed import join_world
from llava.train.loop import train
from llava.train.recipe import Recipe
from llava.train.resume import Checkpointer, step_of
from tests import command, training
from tests.training import Assets, at_step, begin, losses, recipe, rows, run_in_background, toml


def latest_step(out: Path) -> int:
    with join_world("cpu") as world:
        latest = Checkpointer(out / "checkpoints", 2, world).latest()
    assert latest is not None
    return step_of(latest)


@pytest.mark.parametrize("save_every", [0, 1])
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_last_step_and_prints_the_command_to_continue(
    assets: Assets, tmp_path: Path, kind: signal.Signals, save_every: int
) -> None:
    """The signal goes to all processes, as from a terminal. Workers exit, and a checkpoint in progress is completed."""
    out = tmp_path / "run"
    file = toml(tmp_path / "a recipe.toml", recipe(assets, out, max_steps=400, save_every=save_every, num_workers=2))
    going = command.start("train", file, "--device", "cpu", start_new_session=True)
    end = time.monotonic() + training.TIMEOUT_S
    while not at_step(out, 3)() and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="another process is training here"):
        train(recipe(assets, out, max_steps=400, save_every=save_every, num_workers=2), device="cpu")
    sent = time.monotonic()
    os.killpg(going.pid, kind)
    _, stderr = going.communicate(timeout=training.TIMEOUT_S)
    assert time.monotonic() - sent < 20
    *warnings, saved, interrupted = stderr.decode().splitlines()
    assert going.returncode == 130
    assert all("num_workers is 2" in line for line in warnings)  # on a machine with one CPU
    assert saved == f"llava: step {len(rows(out))} of 400 is saved in {out / 'checkpoints'}"
    assert interrupted == f"llava: interrupted; to continue, run: llava train '{file}' --device cpu"
    with pytest.raises(ProcessLookupError):
        os.killpg(going.pid, 0)
    assert latest_step(out) == len(rows(out))  # whole steps only, each of them logged


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_interrupted_run_continues_with_the_same_losses(
    usual: tuple[Recipe, list[float]], tmp_path: Path, ranks: int
) -> None:
    """Ranks that receive a signal at different moments save the same step."""
    asked = replace(usual[0], output_dir=str(tmp_path / "run"), save_every=0)
    run = begin(asked, ranks=ranks)
    end = time.monotonic() + training.TIMEOUT_S
    while not at_step(tmp_path / "run", 2)() and time.monotonic() < end:
        time.sleep(0.005)
    for process in run.processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.02)
    codes = run.wait()
    done = len(rows(tmp_path / "run"))
    if codes == [0] * ranks:
        pytest.skip("the run was finished before the signal arrived")
    assert codes == [130] * ranks, run.output.read_text()
    assert f"step {done} of 8 is saved" in run.output.read_text()
    assert latest_step(tmp_path / "run") == done
    run_in_background(asked, ranks=ranks)
    assert losses(tmp_path / "run") == pytest.approx(usual[1], abs=1e-5)


def test_a_full_disk_is_one_line_that_names_no_checkpoint_that_does_not_exist(assets: Assets, tmp_path: Path) -> None:
    file = toml(tmp_path / "recipe.toml", recipe(assets, tmp_path / "run", save_every=1))
    limited = ["bash", "-c", 'ulimit -f 300; exec "$@"', "-", *command.LLAVA]  # KB, less than a checkpoint
    done = command.run("train", file, "--device", "cpu", command=limited)
    command.assert_one_line_error(done, "step-00000001: cannot be written", "start from step 0")
    assert "enforce" not in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


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


def test_a_worker_killed_while_it_holds_a_shared_lock_does_not_block_the_exit(tmp_path: Path) -> None:
    """The DataLoader's destructor waits for that lock. The worker takes it in its start-up, and dies with it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        "from torch.utils.data import DataLoader\n"
        "from llava.train.signals import iterate_loader\n"
        "def die(worker_id):\n"
        "    sys._getframe(1).f_locals['done_event']._cond.acquire()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "loader = iter(DataLoader(range(8), num_workers=1, worker_init_fn=die, multiprocessing_context='fork'))\n"
        "batches = iterate_loader(loader)\n"
        "del loader\n"
        "try:\n"
        "    next(batches)\n"
        "except Exception as error:\n"
        "    print(error)\n"
        "    del error, batches\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=training.TIMEOUT_S)
    assert done.stdout.startswith("a data loading process was killed"), done.stderr
    assert done.stderr == ""
