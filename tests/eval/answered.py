"""Writes small runs of several tasks with made-up replies, by the code that writes those of a model."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava.eval.runs import RUN, SCHEMA
from llava.eval.task import Question
from llava.eval.task_run import TaskRun
from llava.eval.tasks import TASKS

SPLITS = ("random", "popular", "adversarial")
Reply = Callable[[Question], str | None]  # None: no answer


def picture(folder: Path, n: int) -> Path:
    """A picture whose colour depends on `n`."""
    file = folder / f"picture-{n}.png"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (24, 16), (n * 40 % 256, 120, 255 - n * 40 % 256)).save(file)
    return file


def pope_questions(folder: Path, n: int = 24, *, per_picture: int = 1) -> list[Question]:
    """Questions of POPE, of which every second one is right with yes."""
    return [
        Question(
            id=str(i),
            text=f"Is there a thing of kind {i} in the image?",
            images=(picture(folder / "pictures", i // per_picture),),
            answer=("yes", "no")[i % 2],
            groups=(SPLITS[i // 2 % 3],),
        )
        for i in range(n)
    ]


def right(question: Question) -> str:
    return str(question.answer).capitalize()


def wrong(question: Question) -> str:
    return {"yes": "No", "no": "Yes"}[question.answer]


def wrong_at(*ids: int) -> Reply:
    return lambda question: (wrong if int(question.id) in ids else right)(question)


def write_run(
    folder: Path, tasks: Mapping[str, tuple[Sequence[Question], Reply]], *, name: str = "model", **settings: Any
) -> Path:
    """Writes a run, and returns its folder. tasks: questions and replies by name."""
    named = {f"--{key.replace('_', '-')}": value for key, value in settings.items()}
    for task, (questions, reply) in tasks.items():
        run = TaskRun(task=TASKS[task], questions=questions, folder=folder / task, model=name)
        run.open(named)
        texts = {one.id: text for one in questions if (text := reply(one)) is not None}
        for one in questions:
            if one.id in texts:
                run.add(one, texts[one.id], {"finish_reason": "stop"})
        assert run.finish({one.id: "no answer" for one in questions if one.id not in texts})
    write_record(folder, name=name, settings=named)
    return folder


def write_record(folder: Path, *, name: str, settings: Mapping[str, Any]) -> None:
    value = {
        "schema": SCHEMA,
        "model": {"name": name, "path": None, "base": None, "zoo": []},
        "settings": settings,
        "versions": {"llava": "0.1.0"},
        "machine": {"device": "cpu"},
    }
    (folder / RUN).write_text(json.dumps(value))
