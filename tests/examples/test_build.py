"""A small build of llava-tiny, from glyphs to a model that names what it sees, but only guesses without pictures.

All tests share one run of the command. It needs only the glyphs in tests/examples/glyphs.
"""

import json
import os
import random
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples.tiny.dataset import TRAINING_SEEDS, know
from examples.tiny.glyphs import Glyphs
from examples.tiny.questions import Asker, Turn, naming
from examples.tiny.score import answers
from examples.tiny.truth import Truth
from examples.tiny.vocabulary import vocabulary
from examples.tiny.world import Scene, draw
from llava.eval.marks import Vocabulary, correct
from tests.conftest import PROJECT, Share

pytestmark = pytest.mark.slow  # the build takes about a minute

GLYPHS = PROJECT / "tests" / "examples" / "glyphs"
STAGES = ["tower", "language", "pretrain", "finetune", "polish", "ship"]
THINGS = 8  # guessing gives 12 %
SCENES = 160
TIMEOUT_S = 280
CPU_LIMIT_S = 150  # processor time, which a busy machine hardly changes


@dataclass(frozen=True)
class Built:
    """The result of one run of the command."""

    work: Path
    output: str
    seconds: float
    cpu_s: float


def build(work: Path, *stages: str) -> str:
    """Runs the command with one thread, since two mostly wait for each other on a shared machine."""
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


def children_cpu_s() -> float:
    """Processor time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture(scope="session")
def built(share: Share) -> Built:
    def run(folder: Path) -> None:
        folder.mkdir()
        began, cpu_began = time.monotonic(), children_cpu_s()
        output = build(folder / "work")
        figures = {"output": output, "seconds": time.monotonic() - began, "cpu_s": children_cpu_s() - cpu_began}
        (folder / "figures.json").write_text(json.dumps(figures))

    folder = share("tiny-build", run)
    return Built(folder / "work", **json.loads((folder / "figures.json").read_text()))


def fresh() -> tuple[list[tuple[Scene, Turn]], Vocabulary]:
    """Scenes with one thing, in both styles, with seeds that training never uses."""
    glyphs = Glyphs.load(GLYPHS).first(THINGS)
    knowledge, asked = know(glyphs), []
    for i in range(SCENES):
        seed = TRAINING_SEEDS + i
        entry = glyphs.entries[i % THINGS]  # all equally often, so that a constant answer is correct for one in eight
        scene = draw(seed, glyphs, glyphs.styles, n_objects=1, chosen=[entry], words=())
        turn = naming(Asker(random.Random(seed), knowledge), Truth(scene))
        assert turn is not None
        asked.append((scene, turn))
    return asked, vocabulary(glyphs.entries)


def share_named(model: Path, *, blind: bool) -> float:
    asked, words = fresh()
    answer = answers(str(model), device="cpu", batch_size=32, template=None, blind=blind)
    replies = answer([(scene.image, turn) for scene, turn in asked])
    marks = [correct(turn.measure, turn.answer, reply, words) for (_, turn), reply in zip(asked, replies, strict=True)]
    return sum(marks) / SCENES


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in folder.read_text().splitlines()]


def test_the_model_names_things_in_unseen_scenes(built: Built) -> None:
    assert share_named(built.work / "llava-tiny", blind=False) >= 0.6


def test_the_model_only_guesses_without_pictures(built: Built) -> None:
    assert share_named(built.work / "llava-tiny", blind=True) <= 0.25


def test_a_model_trained_without_pictures_only_guesses(built: Built, tmp_path: Path) -> None:
    for part in ("tower", "lm", "pretrain"):
        (tmp_path / part).symlink_to(built.work / part)
    (tmp_path / "instruct").mkdir()
    (tmp_path / "instruct" / "images.tar").symlink_to(built.work / "instruct" / "images.tar")
    told = (built.work / "instruct" / "data.json").read_text(encoding="utf-8").replace("<image>\\n", "")
    samples = [{key: value for key, value in sample.items() if key != "image"} for sample in json.loads(told)]
    assert not any("<image>" in turn["value"] for sample in samples for turn in sample["conversations"])
    (tmp_path / "instruct" / "data.json").write_text(json.dumps(samples), encoding="utf-8")
    build(tmp_path, "finetune")
    assert share_named(tmp_path / "finetune" / "model", blind=False) <= 0.25


def test_each_stage_learns_and_logs(built: Built) -> None:
    for log in ("tower.jsonl", "lm.jsonl", "pretrain/log.jsonl", "finetune/log.jsonl"):
        found = losses(built.work / log)
        few = max(1, len(found) // 5)
        assert sum(found[-few:]) < 0.8 * sum(found[:few]), log
    assert losses(built.work / "polish" / "log.jsonl")[0] < losses(built.work / "finetune" / "log.jsonl")[0]


def test_each_stage_writes_its_folder(built: Built) -> None:
    work = built.work
    assert (work / "tower" / "preprocessor_config.json").is_file()
    assert (work / "lm" / "tokenizer.model").is_file()
    assert not (work / "text" / "images.tar").exists()
    for data in ("caption", "instruct", "fresh"):
        assert (work / data / "images.tar").is_file()
    assert sorted(path.name for path in (work / "pretrain" / "model").iterdir()) == ["config.json", "mm_projector.bin"]
    for stage in ("pretrain", "finetune", "polish"):
        assert (work / stage / "recipe.json").is_file()
    assert not list(work.glob(".*")), "an unfinished folder is left"


def test_the_shipped_model_is_the_polished_one_with_its_tower(built: Built) -> None:
    shipped = load_file(built.work / "llava-tiny" / "model.safetensors")
    assert {name.split(".")[0] for name in shipped} == {"vision", "projector", "decoder"}
    trained = load_file(built.work / "polish" / "model" / "model.safetensors")
    assert shipped["decoder.embed.weight"].equal(
        trained["model.embed_tokens.weight"].to(shipped["decoder.embed.weight"])
    )


def test_a_repeated_stage_gives_the_same_weights(built: Built, tmp_path: Path) -> None:
    for part in ("tower", "lm", "pretrain", "finetune", "fresh"):
        (tmp_path / part).symlink_to(built.work / part)
    output = build(tmp_path, "polish", "ship")
    assert [json.loads(line)["stage"] for line in output.splitlines() if '"stage"' in line] == ["polish", "ship"]
    again, before = (load_file(work / "llava-tiny" / "model.safetensors") for work in (tmp_path, built.work))
    assert again.keys() == before.keys()
    assert all(again[name].equal(tensor) for name, tensor in before.items())


def test_an_unknown_stage_is_refused() -> None:
    command = [sys.executable, "-m", "examples.tiny.build", "towers", "--smoke"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "towers" in done.stderr.decode()


def test_the_build_is_quick(built: Built) -> None:
    last = json.loads(built.output.splitlines()[-1])
    assert list(last["seconds"]) == STAGES
    assert last["total"] <= built.seconds
    assert built.cpu_s < CPU_LIMIT_S
