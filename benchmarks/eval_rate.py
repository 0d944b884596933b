"""Does `llava eval run` keep the engine busy, from picture files to answers on disk?

    python benchmarks/eval_rate.py --save
    python benchmarks/eval_rate.py --size tiny --layers 2 --device cpu --dtype float32     # a dry run

The same questions are asked twice in each round: by `evaluate`, which reads JPEG files, and by the engine alone, with
inputs that are already prepared. The model is random, of the published shapes, and no id ends a reply.
"""

import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from gpu_inputs import EndlessTokenizer
from gpu_setup import Setup
from PIL import Image
from result import OURS, Commit, Out, Result, Save
from timing import Device, DType

from llava.assistant import Assistant, question_about
from llava.engine.sampling_params import SamplingParams
from llava.eval.run import evaluate
from llava.eval.task import Data, Question
from llava.eval.task_run import TaskRun
from llava.eval.tasks.pope import Pope

_SIZE = 640, 480  # pixels of most pictures in COCO


def write_questions(folder: Path, n: int, seed: int) -> list[Question]:
    """Writes POPE with n questions about as many pictures, and returns the questions."""
    chance = random.Random(seed)
    (folder / "val2014").mkdir(parents=True)
    (folder / "coco").mkdir()
    questions, labels = [], []
    for i in range(n):
        name, text = f"{i}.jpg", f"Is there a thing of the kind {chance.randrange(10**6)} in the image?"
        noise = (
            Image.effect_noise((_SIZE[0] // 8, _SIZE[1] // 8), 60)
            .convert("RGB")
            .resize(_SIZE, Image.Resampling.BICUBIC)
        )
        noise.save(folder / "val2014" / name, quality=90)
        questions.append({"question_id": i, "image": name, "text": text, "category": "random"})
        labels.append({"question_id": i, "text": text, "label": chance.choice(["yes", "no"])})
    (folder / "llava_pope_test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    (folder / "coco" / "coco_pope_random.json").write_text("".join(json.dumps(one) + "\n" for one in labels))
    return Pope().questions(Data(folder=folder))


def from_files(vlm: Assistant, questions: list[Question], new: int, folder: Path) -> float:
    """Seconds that `evaluate` takes."""
    run = TaskRun(task=Pope(), questions=questions, folder=folder / "run", model="random")
    run.open({})
    started = time.perf_counter()
    found = evaluate(vlm, run, {"max_new_tokens": new})
    seconds = time.perf_counter() - started
    assert found is not None
    assert found.n == len(questions)
    shutil.rmtree(folder / "run")
    return seconds


def prepared(vlm: Assistant, questions: list[Question], new: int) -> float:
    """Seconds that the engine takes with prepared inputs."""
    inputs = [vlm.prepare(question_about(str(one.images[0]), one.text)) for one in questions]
    started = time.perf_counter()
    replies = vlm.engine.generate(inputs, SamplingParams(max_new_tokens=new))
    seconds = time.perf_counter() - started
    assert all(len(reply.token_ids) == new for reply in replies)
    return seconds


def main(
    size: Annotated[str, typer.Option("--size", help="7b or tiny")] = "7b",
    layers: Annotated[int | None, typer.Option("--layers", help="fewer layers")] = None,
    device: Device = "auto",
    dtype: DType = "bfloat16",
    n: Annotated[int, typer.Option("--questions", help="of each round, with a picture each")] = 512,
    batch: Annotated[int, typer.Option("--batch", help="requests at once")] = 128,
    new: Annotated[int, typer.Option("--new", help="tokens of each answer")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", help="after one to warm up")] = 3,
    out: Out = None,
    save: Save = False,
    commit: Commit = None,
) -> None:
    from gpu_ours import llava

    setup = Setup(size=size, layers=layers, device=device, dtype=dtype, folder="", gpt_fast=None)
    vlm = llava(setup).assistant(batch, 1024, prefix_cache=False)
    vlm.preprocessor.tokenizer = EndlessTokenizer(vlm.model.config.decoder.vocab_size)  # type: ignore[assignment]
    seconds: dict[str, list[float]] = {OURS: [], "prepared": []}
    for i in range(rounds + 1):
        with tempfile.TemporaryDirectory() as name:
            questions = write_questions(Path(name) / "pope", n, seed=i)
            found = {"prepared": prepared(vlm, questions, new), OURS: from_files(vlm, questions, new, Path(name))}
        for contestant, value in found.items() if i else ():
            seconds[contestant].append(value)
    target = setup.target
    Result(
        benchmark="eval-rate",
        question=f"Does llava eval run keep the engine busy? {n} questions with {size} shapes, a JPEG file each",
        device=target.device.type,
        dtype=target.dtype_name,
        settings={"size": size, "layers": layers, "questions": n, "batch": batch, "new": new, "pixels": _SIZE},
        seconds=seconds,
        unit="questions/s",
        scale=lambda name, value: n / value,
        pairs=((OURS, "prepared"),),
        commit=commit,
    ).report(out, save)  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
