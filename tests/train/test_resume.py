"""Checkpoints: resuming after kill -9, on another number of ranks, and damaged or partial checkpoints."""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llava.errors import CheckpointError
from llava.train.distributed import join_world
from llava.train.loop import train
from llava.train.recipe import Recipe
from llava.train.resume import Checkpointer
from tests import command, training
from tests.training import LORA, Assets, at_step, begin, losses, recipe, rows, run, run_in_background, stored, toml

STAGES = {
    "stage 1": {"train": ["projector"], "lr": 1e-2},
    "stage 2": {"packing": False},
    "LoRA with dropout": {**LORA, "lora_dropout": 0.5},
}


LONG = {"max_steps": 12, "save_every": 1, "global_batch_size": 3, "micro_batch_size": 1, "order": "by_modality_length"}


def until(moment: Any, run: training.Background) -> None:
    """Kills the run once `moment()` is true, which must be before it finishes."""
    end = time.monotonic() + training.TIMEOUT_S
    while not moment() and all(process.is_alive() for process in run.processes) and time.monotonic() < end:
        time.sleep(0.001)
    assert moment(), run.output.read_text()
    run.kill()
    assert [process.exitcode for process in run.processes] == [-9] * len(run.processes)


def while_saving(out: Path, step: int) -> Any:
    return lambda: any(path.name >= f".step-{step:08}" for path in (out / "checkpoints").glob(".step-*"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_with_identical_results(assets: Assets, tmp_path: Path, stage: str) -> None:
    values = LONG | STAGES[stage]
    wanted = run(recipe(assets, tmp_path / "whole", **values))
    out = tmp_path / "killed"
    asked = recipe(assets, out, **values)
    until(at_step(out, random.Random(stage).randint(1, 4)), begin(asked))
    until(while_saving(out, random.Random(stage).randint(7, 10)), begin(asked))
    left = len(list((out / "checkpoints").glob("step-*")))
    assert 1 <= left <= 3
    run_in_background(asked)
    assert losses(out) == wanted
    found, expected = stored(out / "model"), stored(tmp_path / "whole" / "model")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert sorted(p.name for p in (out / "checkpoints").glob("step-*")) == ["step-00000011", "step-00000012"]
    for key in ("samples", "tokens", "lr", "epoch"):
        assert [row[key] for row in rows(out)] == [row[key] for row in rows(tmp_path / "whole")]


@pytest.mark.parametrize(("stage", "before", "after"), [("stage 2", 2, 1), ("LoRA with dropout", 1, 2)])
def test_a_run_resumes_on_another_number_of_ranks(
    assets: Assets, tmp_path: Path, stage: str, before: int, after: int
) -> None:
    values = LONG | STAGES[stage] | {"max_steps": 10, "micro_batch_size": 1, "global_batch_size": 2}
    wanted = run(recipe(assets, tmp_path / "whole", **values))
    out = tmp_path / "killed"
    asked = recipe(assets, out, **values)
    until(at_step(out, 5), begin(asked, ranks=before))
    assert list((out / "checkpoints").glob("step-*"))
    run_in_background(asked, ranks=after)
    assert losses(out) == pytest.approx(wanted, abs=1e-5)
    found, expected = stored(out / "model"), stored(tmp_path / "whole" / "model")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_a_run_killed_during_export_only_exports_again(finished: Recipe) -> None:
    out = Path(finished.output_dir)
    before, log = stored(out / "model"), (out / "log.jsonl").read_bytes()
    shutil.rmtree(out / "model")
    train(finished, device="cpu")
    after = stored(out / "model")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [json.loads(a)["loss"] for a in log.splitlines()] == losses(out)


def test_a_partial_checkpoint_is_not_loaded(usual: tuple[Recipe, list[float]], finished: Recipe) -> None:
    out = Path(finished.output_dir)
    shutil.rmtree(out / "model")
    last = max((out / "checkpoints").glob("step-*"))
    last.rename(last.with_name(f".{last.name}.partial"))
    for whole in (out / "checkpoints").glob("step-*"):
        shutil.rmtree(whole)
    next((out / "checkpoints").glob(".step-*/*.distcp")).write_bytes(b"incomplete")
    train(finished, device="cpu")
    assert losses(out) == usual[1]


def test_a_damaged_checkpoint_is_named(finished: Recipe) -> None:
    out = Path(finished.output_dir)
    shutil.rmtree(out / "model")
    last = max((out / "checkpoints").glob("step-*"))
    file = next(last.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"{last.name}.*remove this checkpoint") as raised:
        train(finished, device="cpu")
    assert "\n" not in str(raised.value)


def test_a_checkpoint_holds_the_state_at_the_time_of_save(tmp_path: Path) -> None:
    """It is written in the background while further steps change the weights."""
    model = nn.Linear(1000, 1000)
    adam = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step() -> None:
        model(torch.ones(1000)).sum().backward()
        adam.step()
        adam.zero_grad()

    with join_world("cpu") as world:
        checkpointer = Checkpointer(tmp_path, 2, world)
        step()
        before = model.weight.detach().clone()
        moment = adam.state[model.weight]["exp_avg"].clone()
        checkpointer.save(1, model, adam, {"step": 1})
        for _ in range(3):
            step()
        checkpointer.finish()
        latest = checkpointer.latest()
        assert latest is not None
        assert checkpointer.load(latest, model, adam) == {"step": 1}
    assert torch.equal(model.weight, before)
    assert torch.equal(adam.state[model.weight]["exp_avg"], moment)
    assert adam.state[model.weight]["step"] == 1


def test_a_checkpoint_that_cannot_be_written_is_one_line(assets: Assets, tmp_path: Path) -> None:
    """ulimit caps files at 100 kB, to simulate a full disk."""
    file = toml(tmp_path / "recipe.toml", recipe(assets, tmp_path / "run"))
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *command.LLAVA]
    done = command.run("train", file, "--device", "cpu", command=limited)
    command.assert_one_line_error(done, "step-00000002: cannot be written", "free some space")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
