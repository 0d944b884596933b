"""What the tests of training share: data of all kinds in small, a recipe for them, runs in processes of their own."""

import contextlib
import json
import multiprocessing
import os
import random
import socket
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava.checkpoint.open import open_checkpoint
from llava.data.samples import Samples
from llava.errors import LlavaError
from llava.preprocess.inputs import ModelInput, Preprocessor
from llava.train.batch import Batch, Batches, Order
from llava.train.loop import train
from llava.train.loss import Trainee
from llava.train.recipe import Recipe, recipe_from, to_dict
from llava.train.start import fill, row_ids, start, trainable
from tests import tiny

TIMEOUT_S = 60  # of a run apart; one takes 2 to 10
WORDS = tiny.TEXT.split()
Json = dict[str, Any]


@dataclass(frozen=True)
class School:
    """What there is to train and to learn from."""

    llama: Path  # a language model alone
    clip: Path
    llava: Path  # merged, its config names the CLIP
    data: Path  # 22 samples with pictures, 12 of text alone, mixed
    images: Path


def build_school(folder: Path, clip: Path, llava: Path) -> School:
    """Writes data and a language model."""
    images = folder / "images"
    images.mkdir(parents=True)
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (20 + 9 * i, 64 - 5 * i, 3), np.uint8)
        Image.fromarray(noise).save(images / f"{i}.png")
    choose = random.Random(0)
    samples = [sample(choose, i, with_picture=i % 3 < 2 and i < 33) for i in range(34)]
    return School(tiny.write_llama(folder / "llama"), clip, llava, write_data(folder / "data.json", samples), images)


def sample(choose: random.Random, i: int, *, with_picture: bool) -> Json:
    """One of one to three exchanges; lengths differ much."""
    turns = []
    for turn in range(1 + i % 3):
        question = " ".join(choose.choices(WORDS, k=choose.randint(2, 9)))
        mark = "<image>\n" if with_picture and turn == 0 else ""
        turns.append({"from": "human", "value": mark + question})
        turns.append({"from": "gpt", "value": " ".join(choose.choices(WORDS, k=choose.randint(1, 4 + 9 * (i % 4))))})
    return {"id": f"s{i}", "conversations": turns} | ({"image": f"{i % 6}.png"} if with_picture else {})


def write_data(file: Path, samples: list[Json]) -> Path:
    """The samples as LLaVA's JSON."""
    file.write_text(json.dumps(samples))
    return file


def recipe(school: School, out: Path, **changes: Any) -> Recipe:
    """Six short steps of full tuning in float32; `changes` as in a recipe's file."""
    values = {"model": str(school.llava), "data": str(school.data), "images": str(school.images), "out": str(out)}
    values |= {"max_steps": 6, "batch": 6, "micro_batch": 3, "rate": 1e-3, "max_length": 256, "pad_to": 32}
    values |= {"compute": "float32", "checkpointing": False, "workers": 0, "save_every": 2, "lora_dropout": 0.0}
    return recipe_from({**values, **changes}, "test")


PRETRAINING: Json = {"template": "vicuna_v1", "train": ["projector"], "rate": 1e-2}  # with the school's llama and clip
LORA: Json = {"lora_rank": 4, "lora_alpha": 8, "projector_rate": 1e-4, "rate": 5e-3}


def from_parts(school: School) -> Json:
    """Keys of a recipe that puts a language model and a tower together."""
    return {"model": str(school.llama), "vision_tower": str(school.clip)} | PRETRAINING


def rows(out: Path) -> list[Json]:
    """Of the run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    """Of each step; the log has every step once."""
    found = rows(out)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["loss"] for row in found]


def weights(model: Path, **options: Any) -> dict[str, torch.Tensor]:
    """By our names, in float32."""
    return {name: source.read().float() for name, source in open_checkpoint(model, **options).sources.items()}


def trainee_of(recipe: Recipe) -> tuple[Trainee, Batches]:
    """What a run on one CPU trains, and its micro-batches."""
    checkpoint = start(recipe, Path(recipe.out) / "tokenizer")
    model = trainable(checkpoint, recipe)
    fill(model, checkpoint, recipe, torch.device("cpu"))
    trainee = Trainee(model, rows=row_ids(checkpoint, recipe), tower_learns="vision" in recipe.train)
    samples = Samples([Path(file) for file in recipe.data], Path(recipe.images) if recipe.images else None)
    preprocessor = Preprocessor(checkpoint.config, checkpoint.tokenizer, template=recipe.template)
    return trainee.train(), Batches(samples, preprocessor, recipe, Order(recipe, samples.lengths), rank=0, ranks=1)


def inputs_of(batches: Batches, step: int) -> list[ModelInput]:
    """The samples of a step, micro-batch after micro-batch."""
    return [batches.prepare(index) for place in batches.order.step(step) for index in place.samples]


def gradients(trainee: Trainee, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Summed loss and its gradients."""
    trainee.zero_grad()
    loss = trainee(batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainee.named_parameters() if p.grad is not None}


# Runs apart. A server that has torch loaded forks them: each is a process of its own that starts in no time.

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.training", "torch._dynamo"])


@dataclass
class Apart:
    """A run in other processes, one a rank."""

    processes: list[ForkServerProcess]
    told: Path  # what they wrote to stderr

    def wait(self, timeout_s: float = TIMEOUT_S) -> list[int | None]:
        """Exit codes; a rank that hangs is killed and fails the test."""
        end = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        hanging = [process.is_alive() for process in self.processes]
        self.kill()
        assert not any(hanging), f"ranks that hang: {hanging}; {self.told.read_text()}"
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """kill -9, all at once: a rank that is left alone ends by itself."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join(10)


def begin(recipe: Recipe, *, ranks: int = 1, name: str = "told") -> Apart:
    """Starts `train` in processes; one rank knows nothing of others."""
    told = Path(recipe.out).with_suffix(f".{name}")
    told.write_text("")
    port = _free_port()
    # daemons: none outlives the tests; so no workers here
    make = _FORKS.Process
    values = to_dict(recipe)
    processes = [make(target=_run, args=(values, rank, ranks, port, told), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    return Apart(processes, told)


def run_apart(recipe: Recipe, *, ranks: int = 1) -> None:
    """Trains in processes of its own, to the end."""
    run = begin(recipe, ranks=ranks)
    codes = run.wait()
    assert codes == [0] * ranks, run.told.read_text()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _run(values: Json, rank: int, ranks: int, port: int, told: Path) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in places.items()}}
    with told.open("a", buffering=1) as stream:
        os.dup2(stream.fileno(), 2)
        os.dup2(stream.fileno(), 1)
        with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
            try:
                train(Recipe(**values), device="cpu")
            except LlavaError as error:
                stream.write(f"rank {rank}: {error}\n")
                os._exit(2)
