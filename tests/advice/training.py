"""Advice about training: recipes, run folders, logs, broken data, and checkpoints of a run."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from filelock import FileLock
from PIL import Image

from llava.train.batch import Batch
from tests import tiny
from tests.advice.table import Run, Steps, World, advice, say
from tests.training import Assets, toml
from tests.training import recipe as tests_recipe


def train(w: World, *more: object, **changes: Any) -> Run:
    """One step of a tiny run into the folder `run`, from a recipe with `changes`."""
    assets = Assets(w.llama, w.clip, w.llava, w.data, w.images)
    values = {"max_steps": 1, "global_batch_size": 2, "micro_batch_size": 2, "train": ["projector"], "save_every": 1}
    own = {key: value for key, value in changes.items() if key in ("model", "data", "images")}
    file = toml(w / "recipe.toml", tests_recipe(assets, w / "run", **values))
    sets = [f"{key}={_toml(value)}" for key, value in {**own, **changes}.items()]
    return ("train", file, "--device", "cpu", *(word for one in sets for word in ("--set", one)), *more)


def _toml(value: object) -> str:
    return str(value) if isinstance(value, Path) else json.dumps(value)


@advice("no recipe given; run llava train --list to see the shipped recipes")
def no_recipe(w: World) -> Steps:
    said = yield ("train",)
    assert say(said.advised()[:2]).well
    yield ("train", "custom/finetune-lora", "--set", f"data={w.data}", "--plan", *_of(w))


def _of(w: World) -> tuple[object, ...]:
    return "--set", f"model={w.llava}", "--set", f"images={w.images}", "--set", f"output_dir={w / 'run'}"


@advice("For your own recipe, pass the path to a .toml file")
def a_recipe_without_its_suffix(w: World) -> Steps:
    _, file, *rest = train(w, "--plan")
    yield ("train", Path(str(file)).with_suffix(""), *rest)
    yield ("train", file, *rest)


@advice("--set {}: expected key=value")
def a_setting_without_a_value(w: World) -> Steps:
    yield train(w, "--plan", "--set", "lr")
    yield train(w, "--plan", "--set", "lr=1e-3")


@advice("{} is missing; set it in the file or with --set {}=…")
def a_recipe_without_its_model(w: World) -> Steps:
    command = train(w, "--plan")
    file = w / "recipe.toml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("model")))
    yield command
    yield (*command, "--set", f"model={w.llava}")


@advice('train does not include "decoder"; add "decoder", or set lora_rank=0')
def a_lora_without_a_decoder(w: World) -> Steps:
    yield train(w, "--plan", lora_rank=4)
    yield train(w, "--plan", lora_rank=0)


@advice('train does not include "decoder"; add "decoder", or set lora_rank=0')
def a_lora_with_a_decoder(w: World) -> Steps:
    yield train(w, "--plan", lora_rank=4)
    yield train(w, "--plan", lora_rank=4, train=["projector", "decoder"])


@advice('because 4-bit weights cannot be trained; set lora_rank, or set quantize_base="none"')
def quantized_weights_without_a_lora(w: World) -> Steps:
    yield train(w, "--plan", quantize_base="nf4", train=["projector", "decoder"])
    yield train(w, "--plan", quantize_base="nf4", train=["projector", "decoder"], lora_rank=4)


@advice('leave the model unquantized (in a recipe: quantize_base = "none")')
def matrices_that_nf4_cannot_hold(w: World) -> Steps:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    odd = tiny.write_llava(w / "odd", clip=w.clip, hidden_size=60, intermediate_size=31, **heads)
    lora = {"model": odd, "train": ["projector", "decoder"], "lora_rank": 4}
    yield train(w, **lora, quantize_base="nf4")
    yield train(w, **lora, quantize_base="none")


@advice("which requires start_end; set start_end=true")
def rows_without_start_and_end(w: World) -> Steps:
    yield train(w, "--plan", train=["projector", "rows"])
    yield train(w, "--plan", train=["projector", "rows"], start_end=True)


@advice("requires pinpoints; set pinpoints to a list of [width, height] canvas sizes")
def anyres_without_pinpoints(w: World) -> Steps:
    yield train(w, "--plan", aspect="anyres")
    yield train(w, "--plan", aspect="anyres", pinpoints=[[tiny.IMAGE_SIZE, 2 * tiny.IMAGE_SIZE]])


@advice("is a language model without a vision tower; set vision_tower in the recipe")
def a_language_model_alone(w: World) -> Steps:
    yield train(w, "--plan", model=w.llama)
    yield train(w, "--plan", model=w.llama, vision_tower=w.clip)


@advice("--set {}={}")
def a_lora_without_its_base(w: World) -> Steps:
    folder = w.copy("single")
    tiny.edit_json(folder / "config.json", mm_vision_tower=tiny.ABSENT)
    said = yield train(w, "--plan", model=folder)
    assert "--set vision_tower=…" in said.text
    yield train(w, "--plan", model=folder, vision_tower=w.clip)


# ------------------------------------------------------------------------------------------------------ run folders


def ran(w: World, **changes: Any) -> Path:
    """The folder of a run that has finished one step."""
    assert say(train(w, **changes)).well
    return w / "run"


@advice("{}: cannot be read ({}); remove the run folder to start over")
def a_damaged_recipe_of_a_run(w: World) -> Steps:
    (ran(w) / "recipe.json").write_text("{")
    yield train(w)
    shutil.rmtree(w / "run")


@advice("so this older run cannot be resumed; set output_dir=… to a new folder")
def a_run_of_an_older_version(w: World) -> Steps:
    tiny.edit_json(ran(w) / "recipe.json", rate=1.0)
    yield train(w)
    yield train(w, output_dir=w / "new")


@advice("set output_dir=… to a new folder, or remove this folder")
def a_folder_of_another_recipe(w: World) -> Steps:
    ran(w)
    yield train(w, lr=1.0)
    yield train(w, lr=1.0, output_dir=w / "new")


@advice("set output_dir=… to a new folder, or remove this folder")
def a_folder_of_another_recipe_that_is_removed(w: World) -> Steps:
    ran(w)
    yield train(w, lr=1.0)
    shutil.rmtree(w / "run")


@advice("exists but is not a run folder; set output_dir=… to a new folder")
def a_folder_without_a_run(w: World) -> Steps:
    (w / "run").mkdir()
    (w / "run" / "notes.txt").write_text("")
    yield train(w)
    yield train(w, output_dir=w / "new")


@advice("another process is training here; wait for it, or set output_dir=… to a new folder")
def two_runs_in_a_folder(w: World) -> Steps:
    (w / "run").mkdir()
    with FileLock(w / "run" / ".lock"):
        yield train(w)
        yield train(w, output_dir=w / "new")


@advice("another process is training here; wait for it, or set output_dir=… to a new folder")
def a_run_that_ends(w: World) -> Steps:
    (w / "run").mkdir()
    with FileLock(w / "run" / ".lock"):
        yield train(w)


@advice("do not run another command that writes to this folder", succeeds=False)
def a_disk_without_locks(w: World) -> Steps:
    with mock.patch("llava.tensors.lock.FileLock.acquire", side_effect=NotImplementedError("no locks")):
        yield train(w)
    yield train(w)


@advice("restore the data files, or set output_dir=… to a new folder")
def data_that_grew_and_is_restored(w: World) -> Steps:
    data = shutil.copy(w.data, w / "data.json")
    interrupted(w, data=data)
    data.write_text(json.dumps(json.loads(w.data.read_text()) * 2))
    yield train(w, data=data, max_steps=3)
    shutil.copy(w.data, data)


@advice("restore the data files, or set output_dir=… to a new folder")
def data_that_grew(w: World) -> Steps:
    data = shutil.copy(w.data, w / "data.json")
    interrupted(w, data=data)
    data.write_text(json.dumps(json.loads(w.data.read_text()) * 2))
    yield train(w, data=data, max_steps=3)
    yield train(w, data=data, max_steps=3, output_dir=w / "new")


def interrupted(w: World, **changes: Any) -> Path:
    """The folder of a run of three steps that was interrupted when it would have saved its result."""
    with mock.patch("llava.train.loop.export", side_effect=KeyboardInterrupt):
        say(train(w, max_steps=3, **changes))
    return w / "run" / "checkpoints"


@advice("{}: cannot be read ({}); remove this checkpoint to resume from the previous one")
def a_damaged_checkpoint(w: World) -> Steps:
    newest = max(interrupted(w).glob("step-*"))
    for file in newest.glob("*.distcp"):
        file.write_bytes(b"")
    yield train(w, max_steps=3)
    shutil.rmtree(newest)


@advice("{}: cannot be written ({}); free some space and run the same command again to {}")
def a_disk_that_fills_at_a_checkpoint(w: World) -> Steps:
    with full_at_checkpoints():
        yield train(w)


@advice("start from step 0, as no checkpoint is complete")
def a_disk_that_fills_at_the_first_checkpoint(w: World) -> Steps:
    with full_at_checkpoints():
        yield train(w)


def full_at_checkpoints() -> Any:
    """The disk fills while a checkpoint is written."""
    writer = torch.distributed.checkpoint.FileSystemWriter
    return mock.patch.object(writer, "write_data", side_effect=OSError(28, "No space left on device"))


@advice("{}: cannot be written ({}); free some space, or choose another folder")
def a_run_below_a_file(w: World) -> Steps:
    (w / "file").write_text("")
    yield train(w, output_dir=w / "file" / "run")
    yield train(w)


# ------------------------------------------------------------------------------------------------------ logs, plots


@advice("pip install 'llava-native[train]'")
def a_plot_without_matplotlib(w: World) -> Steps:
    folder = log(w, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0})
    with mock.patch.dict(sys.modules, {"matplotlib.figure": None}):
        yield ("train", "--plot", folder)


def log(w: World, *rows: object) -> Path:
    (w / "run").mkdir(exist_ok=True)
    (w / "run" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return w / "run"


@advice("is not a JSON object with an integer step; fix or remove that line")
def a_damaged_log(w: World) -> Steps:
    yield ("train", "--plot", log(w, {"step": 1, "loss": 1.0}, [], {"step": 2, "loss": 1.0}))
    log(w, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0})


@advice("contains no rows yet; plot again after the first step")
def an_empty_log(w: World) -> Steps:
    yield ("train", "--plot", log(w))
    log(w, {"step": 1, "loss": 1.0})


# ------------------------------------------------------------------------------------------------------------- data


def damaged(w: World) -> Path:
    """Data that needs a picture which is missing, in each sample."""
    samples = json.loads(w.data.read_text())
    data = w / "damaged.json"
    data.write_text(json.dumps([{**sample, "image": "missing.png"} for sample in samples if "image" in sample]))
    return data


@advice("{} of {} samples are broken, more than {}; to see why, run: {}")
def broken_samples(w: World) -> Steps:
    data = damaged(w)
    said = yield train(w, data=data)
    check = said.advised()
    assert "missing.png: no such picture" in say(check).text
    assert say((*check, "--fix", w / "fixed.json")).well is False  # no sample would remain
    yield train(w, data=w.data, output_dir=w / "new")


@advice("samples have a picture, but the recipe does not say where; set images=… to")
def pictures_without_a_location(w: World) -> Steps:
    _, file, *rest = train(w)
    text = Path(str(file)).read_text()
    Path(str(file)).write_text("".join(line for line in text.splitlines(True) if not line.startswith("images")))
    yield ("train", file, *rest)
    yield ("train", file, *rest, "--set", f"images={w.images}")


@advice("are skipped, {} of them because they are longer than the model's context; to see why, run: {}")
def samples_longer_than_the_context(w: World) -> Steps:
    short = tiny.write_llava(w / "short", clip=w.clip, max_position_embeddings=20)
    said = yield train(w, model=short, global_batch_size=34)
    assert "20" in say(said.advised()).text
    yield train(w, output_dir=w / "new")


@advice("pictures that lost values or transparency: {}; to list them, run: {}", succeeds=False)
def transparent_pictures(w: World) -> Steps:
    (w / "clear").mkdir()
    for file in w.images.iterdir():
        Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(w / "clear" / file.name)
    said = yield train(w, images=w / "clear")
    assert "transparent" in say(said.advised()).text
    yield train(w, images=w / "clear", transparency="white", output_dir=w / "new")


@advice("an image of {} exceeds the limit of {} tokens; increase max_length")
def an_image_after_the_limit(w: World) -> Steps:
    turns = [("human", "Hi"), ("gpt", "Hello."), ("human", "<image>\nAnd this?"), ("gpt", "A cat.")]
    conversation = [{"from": role, "value": text} for role, text in turns]
    data = w / "data.json"
    data.write_text(json.dumps([{"id": "a", "image": "0.png", "conversations": conversation}] * 2))
    yield train(w, data=data, max_length=100, max_skipped=1.0)
    yield train(w, data=data, max_length=256, max_skipped=1.0, output_dir=w / "new")


@advice("(counted from 0); check these samples, or lower lr")
def a_learning_rate_that_is_too_high(w: World) -> Steps:
    yield train(w, lr=1e30, max_steps=3, warmup_ratio=0.0, max_grad_norm=0.0)
    yield train(w, lr=1e-3, max_steps=3, output_dir=w / "new")


@advice("a data loading process was killed, often because memory (or /dev/shm) ran out; if so, lower num_workers")
def a_killed_data_worker(w: World) -> Steps:
    def batches() -> Iterator[Batch]:
        raise RuntimeError("DataLoader worker (pid 1) is killed")
        yield

    with mock.patch("llava.train.loop._loader", return_value=batches()):
        yield train(w, num_workers=1)
    yield train(w, num_workers=0)


@advice("out of GPU memory ({}); lower micro_batch_size or max_length, or set gradient_checkpointing=true; add --plan")
def a_gpu_that_is_too_small(w: World) -> Steps:
    with mock.patch("llava.train.loop.iterate_loader", side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried")):
        yield train(w)
    assert "memory" in say(train(w, "--plan")).text
    yield train(w, micro_batch_size=1, output_dir=w / "new")


@advice("no GPU was found that this PyTorch can use; to train on the CPU, pass --device cpu")
def a_machine_without_gpus(w: World) -> Steps:
    command = [str(word) for word in train(w)]
    yield ["cuda" if word == "cpu" else word for word in command]
    yield command


@advice("llava: interrupted; to continue, run: {}")
def a_run_that_is_interrupted(w: World) -> Steps:
    with mock.patch("llava.train.loop.export", side_effect=KeyboardInterrupt):
        said = yield train(w)
    yield said.advised()


@advice("to export it with export={}, move that folder away and run the same command again")
def a_finished_run_with_another_export(w: World) -> Steps:
    ran(w)
    yield train(w, export="llava")
    (w / "run" / "model").rename(w / "model")


@advice("to save a whole model instead, pass export=llava (--set export=llava)")
def a_projector_of_a_delta(w: World) -> Steps:
    delta = {"model": w.delta, "base": w.raw, "start_end": True, "template": "v1"}
    said = yield train(w, "--plan", **delta)
    assert said.text.strip().endswith("pass --set export=llava")
    yield train(w, "--plan", **delta, export="llava")


@advice("{}: does not exist yet; {} is the result of another recipe, so first run: llava train {}")
def the_second_stage_first(w: World) -> Steps:
    def tiny_run(recipe: str) -> Run:
        values = {"model": w.llama, "vision_tower": w.clip, "data": w.data, "images": w.images, "max_steps": 1}
        values |= {"global_batch_size": 2, "micro_batch_size": 2, "max_length": 256, "num_workers": 0}
        sets = [f"{key}={value}" for key, value in values.items()]
        return ("train", recipe, "--device", "cpu", *(word for one in sets for word in ("--set", one)))

    said = yield tiny_run("llava-v1.5/finetune")
    assert say(tiny_run(said.advised()[1])).well
    yield tiny_run("llava-v1.5/finetune")


@advice("{} cannot be imported ({}); install it with {}")
def a_tracker_that_is_not_installed(w: World) -> Steps:
    with mock.patch.dict(sys.modules, {"matplotlib.figure": None}):
        yield ("train", "--plot", log(w, {"step": 1, "loss": 1.0}))


@advice("--set {}")
def a_key_of_an_older_version(w: World) -> Steps:
    said = yield train(w, "--plan", "--set", "rate=1e-3")
    assert "`rate` is now called `lr`" in said.text
    yield (*train(w, "--plan")[:4], "--plan")
