"""The build of llava-tiny, small, from glyphs to a model that names what it sees; without its pictures it guesses.

One run of the command serves all tests. Only the glyphs of tests/glyphs are needed.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import llava
from examples.tiny.dataset import TRAINING_SEEDS, know
from examples.tiny.glyphs import Glyphs
from examples.tiny.marks import Names, correct
from examples.tiny.questions import Asker, Turn, naming
from examples.tiny.score import answers
from examples.tiny.truth import Truth
from examples.tiny.world import Scene, draw
from tests.conftest import PROJECT

GLYPHS = PROJECT / "tests" / "glyphs"
STAGES = ["tower", "language", "pretrain", "finetune", "polish", "ship"]
THINGS = 8  # guessing names one of them: 12 %
SCENES = 160
TIMEOUT_S = 280
QUIET = 2.5  # load average above which a time says nothing


@dataclass(frozen=True)
class Built:
    """What one run of the command left."""

    work: Path
    output: str
    seconds: float
    load: float  # of the machine when it began


def build(work: Path, *stages: str) -> str:
    """What the command printed. One thread: a second one only waits in steps so small."""
    command = [sys.executable, "-m", "examples.tiny.build", *stages, "--smoke"]
    done = subprocess.run(
        [*command, "--work", str(work), "--glyphs", str(GLYPHS)],
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    work, load, began = tmp_path_factory.mktemp("smoke") / "tiny", os.getloadavg()[0], time.monotonic()
    output = build(work)
    return Built(work, output, time.monotonic() - began, load)


def fresh() -> tuple[list[tuple[Scene, Turn]], Names]:
    """One thing a scene, in both styles; seeds that training never uses."""
    glyphs = Glyphs.load(GLYPHS).first(THINGS)
    knowledge, asked = know(glyphs), []
    for i in range(SCENES):
        seed = TRAINING_SEEDS + i
        entry = glyphs.entries[i % THINGS]  # each equally often, so that a constant answer is right in one of eight
        scene = draw(seed, glyphs, glyphs.styles, n_objects=1, chosen=[entry], words=())
        turn = naming(Asker(random.Random(seed), knowledge), Truth(scene))
        assert turn is not None
        asked.append((scene, turn))
    return asked, Names.of_things(entry.name for entry in glyphs.entries)


def share_named(model: Path, *, blind: bool) -> float:
    asked, names = fresh()
    answer = answers(str(model), device="cpu", batch_size=32, template=None, blind=blind)
    replies = answer([(scene.image, turn) for scene, turn in asked])
    return sum(correct(turn, reply, names) for (_, turn), reply in zip(asked, replies, strict=True)) / SCENES


def log_of(work: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / stage / "log.jsonl").read_text().splitlines()]


def test_it_names_what_it_sees_on_fresh_scenes(built: Built) -> None:
    assert share_named(built.work / "llava-tiny", blind=False) >= 0.6


def test_without_its_pictures_it_guesses(built: Built) -> None:
    assert share_named(built.work / "llava-tiny", blind=True) <= 0.25
