"""Helpers for the training tests: a small model with data, a recipe for them, and runs in separate processes."""

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
from safetensors.torch import load_file
from torch import Tensor

from llava.checkpoint.open import open_checkpoint
from llava.config import LoadOptions
from llava.errors import LlavaError
from llava.preprocess.inputs import ModelInput
from llava.train.batch import Batch, BatchDataset
from llava.train.distributed import join_world
from llava.train.loop import train
from llava.train.loss import LlavaWithLoss
from llava.train.optim import build_optimizer
from llava.train.recipe import Recipe, recipe_from, to_dict
from llava.train.resume import Checkpointer
from llava.train.start import fill, row_ids, start, trainable
from tests import tiny

TIMEOUT_S = 60  # for a run in separate processes, which takes 2 to 10 s
WORDS = tiny.TEXT.split()
Json = dict[str, Any]


@dataclass(frozen=True)
class Assets:
    """Models and data that a recipe can name."""

    llama: Path  # a language model without a tower
    clip: Path
    llava: Path  # a full model whose config names `clip`
    data: Path  # 22 samples with an image and 12 without, mixed
    images: Path


def build_assets(folder: Path, clip: Path, llava: Path) -> Assets:
    """Writes the data and a language model."""
    images = folder / "images"
    images.mkdir(parents=True)
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (20 + 9 * i, 64 - 5 * i, 3), np.uint8)
        Image.fromarray(noise).save(images / f"{i}.png")
    choose = random.Random(0)
    samples = [sample(choose, i, with_picture=i % 3 < 2 and i < 33) for i in range(34)]
    return Assets(tiny.write_llama(folder / "llama"), clip, llava, write_data(folder / "data.json", samples), images)


def sample(choose: random.Random, i: int, *, with_picture: bool) -> Json:
    """A sample of one to three exchanges. Lengths vary widely."""
    turns = []
    for turn in range(1 + i % 3):
        question = " ".join(choose.choices(WORDS, k=choose.randint(2, 9)))
        mark = "<image>\n" if with_picture and turn == 0 else ""
        turns.append({"from": "human", "value": mark + question})
        turns.append({"from": "gpt", "value": " ".join(choose.choices(WORDS, k=choose.randint(1, 4 + 9 * (i % 4))))})
    return {"id": f"s{i}", "conversations": turns} | ({"image": f"{i % 6}.png"} if with_picture else {})


def write_data(file: Path, samples: list[Json]) -> Path:
    """Writes the samples as a JSON array."""
    file.write_text(json.dumps(samples))
    return file


def recipe(assets: Assets, out: Path, **changes: Any) -> Recipe:
    """Six steps of full fine-tuning in float32; `changes` are recipe keys."""
    values = {
        "model": str(assets.llava),
        "data": str(assets.data),
        "images": str(assets.images),
        "output_dir": str(out),
    }
    values |= {
        "max_steps": 6,
        "global_batch_size": 6,
        "micro_batch_size": 3,
        "lr": 1e-3,
        "max_length": 256,
        "pad_to": 32,
    }
    values |= {
        "compute_dtype": "float32",
        "gradient_checkpointing": False,
        "num_workers": 0,
        "save_every": 2,
        "lora_dropout": 0.0,
    }
    return recipe_from({**values, **changes}, "test")


PRETRAINING: Json = {"template": "vicuna_v1", "train": ["projector"], "lr": 1e-2}
LORA: Json = {"lora_rank": 4, "lora_alpha": 8, "projector_lr": 1e-4, "lr": 5e-3}


def from_parts(assets: Assets) -> Json:
    """Recipe keys that combine a language model with a vision tower."""
    return {"model": str(assets.llama), "vision_tower": str(assets.clip)} | PRETRAINING


def rows(out: Path) -> list[Json]:
    """The rows of the run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    """The loss of each step. Checks that the log has every step once."""
    found = rows(out)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["loss"] for row in found]


def weights(model: Path, **options: Any) -> dict[str, torch.Tensor]:
    """A model's weights in float32, by our names."""
    return {
        name: source.read().float() for name, source in open_checkpoint(model, LoadOptions(**options)).tensors.items()
    }


def net_and_dataset(recipe: Recipe) -> tuple[LlavaWithLoss, BatchDataset]:
    """What a run on one CPU trains, and its micro-batches."""
    checkpoint = start(recipe, Path(recipe.output_dir) / "tokenizer")
    model = trainable(checkpoint, recipe)
    fill(model, checkpoint, recipe, torch.device("cpu"))
    net = LlavaWithLoss(model, trained_rows=row_ids(checkpoint, recipe), train_vision="vision" in recipe.train)
    return net.train(), BatchDataset.open(recipe, checkpoint)


def inputs_of(dataset: BatchDataset, step: int) -> list[ModelInput]:
    """The samples of a step, in the order of its micro-batches."""
    return [
        dataset.prepare(index) for micro_batch in dataset.order.micro_batches(step) for index in micro_batch.samples
    ]


def gradients(net: LlavaWithLoss, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss and its gradients."""
    net.zero_grad()
    loss = net(batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


# Runs in separate processes. A fork server that has already imported torch starts them quickly.

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.training", "torch._dynamo"])


@dataclass
class Background:
    """A run in other processes, one per rank."""

    processes: list[ForkServerProcess]
    output: Path  # what they write to stdout and stderr

    def wait(self, timeout_s: float = TIMEOUT_S) -> list[int | None]:
        """The exit codes. A rank that does not exit in time is killed and fails the test."""
        end = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        hanging = [process.is_alive() for process in self.processes]
        self.kill()
        assert not any(hanging), f"ranks that hang: {hanging}; {self.output.read_text()}"
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """Sends SIGKILL to all ranks at once, because a rank exits by itself when it loses the others."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join(10)


def begin(recipe: Recipe, *, ranks: int = 1, name: str = "output") -> Background:
    """Starts `train` in separate processes. A single rank runs without a process group."""
    output = Path(recipe.output_dir).with_suffix(f".{name}")
    output.write_text("")
    port = _free_port()
    make = _FORKS.Process  # daemons, so that none outlives the tests; they cannot have worker processes
    values = to_dict(recipe)
    processes = [make(target=_run, args=(values, rank, ranks, port, output), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    return Background(processes, output)


def run_in_background(recipe: Recipe, *, ranks: int = 1) -> None:
    """Trains in separate processes and waits for them."""
    run = begin(recipe, ranks=ranks)
    codes = run.wait()
    assert codes == [0] * ranks, run.output.read_text()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _run(values: Json, rank: int, ranks: int, port: int, output: Path) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in variables.items()}}
    with output.open("a", buffering=1) as stream:
        os.dup2(stream.fileno(), 2)
        os.dup2(stream.fileno(), 1)
        with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
            try:
                train(Recipe(**values), device="cpu")
            except LlavaError as error:
                stream.write(f"rank {rank}: {error}\n")
                os._exit(2)
            except KeyboardInterrupt:
                os._exit(130)


def run(recipe: Recipe) -> list[float]:
    """Trains in this process and returns the losses."""
    train(recipe, device="cpu")
    return losses(Path(recipe.output_dir))


def stored(model: Path) -> dict[str, Tensor]:
    """All tensors in all files of a model."""
    found = {}
    for file in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        found |= {f"{file.name}: {name}": tensor for name, tensor in tensors.items()}
    return found


def restore(recipe: Recipe, net: LlavaWithLoss) -> None:
    """Loads the last checkpoint of a run into `net`."""
    with join_world("cpu") as world:
        checkpointer = Checkpointer(Path(recipe.output_dir) / "checkpoints", recipe.keep_last, world)
        latest = checkpointer.latest()
        assert latest is not None
        checkpointer.load(latest, net, build_optimizer(net, recipe))


def toml(file: Path, recipe: Recipe) -> Path:
    """Writes a recipe to its file."""
    values = {key: value for key, value in to_dict(recipe).items() if value not in (None, ())}
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return file


def at_step(out: Path, step: int) -> Any:
    return lambda: (out / "log.jsonl").is_file() and (out / "log.jsonl").read_text().count("\n") >= step
