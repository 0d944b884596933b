"""Commands that ask a model: eval run, eval tasks."""

import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llava.cli.answer import load
from llava.cli.app import progress_bar
from llava.cli.eval import evaluation
from llava.cli.options import Adapters, AsJson, Base, EngineFlags, Model, ModelOptions, Seed, grouped, model_name
from llava.errors import ConfigError

if TYPE_CHECKING:
    from llava.assistant import Assistant
    from llava.eval.task import Scores
    from llava.eval.task_run import TaskRun

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Which questions are asked."""

    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="folder with the task's files, or with the folders of several tasks, as published; default: the files "
            "in this package, if the task is included",
        ),
    ] = None
    images: Annotated[Path | None, typer.Option("--images", help="folder of the pictures; default: as published")] = (
        None
    )
    split: Annotated[str | None, typer.Option("--split", help="of a task that has several")] = None
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="ask only so many questions, the first")] = None

    def open(self, name: str, out: Path, settings: Mapping[str, Any], model: str) -> "TaskRun":
        """Reads the questions of a task, and opens its part of the run."""
        from llava.eval.task import Data, read_questions
        from llava.eval.task_run import Share, TaskRun
        from llava.eval.tasks import task_named

        task = task_named(name)
        data = Data.of(task, self.data, images=self.images, split=self.split)
        questions = read_questions(task, data)[: self.limit]
        share = Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))  # set by torchrun
        made = TaskRun(task=task, questions=questions, folder=out / name, share=share, model=model, data=data)
        made.open({**settings, "--split": data.split or None, "--limit": self.limit})
        return made


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How replies are generated: greedily, unless an option says otherwise."""

    num_beams: Annotated[int, typer.Option("--num-beams", help="above 1: beam search with this many beams")] = 1
    temperature: Annotated[float, typer.Option("--temperature", help="sampling temperature; 0: greedy")] = 0.0
    seed: Seed = None
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="maximum length of a reply; default: that of the task")
    ] = None

    def options(self) -> dict[str, Any]:
        """Returns the options that are given, as those of `Assistant.generate`. Raises ConfigError."""
        from llava.engine.sampling_params import SamplingParams

        given = {name: value for name, value in vars(self).items() if value is not None}
        try:
            SamplingParams.from_options(**given)
        except ConfigError as error:
            name, _, rest = str(error).partition(" ")
            raise ConfigError(f"--{name.replace('_', '-')} {rest}") from None
        return given


@evaluation.command()
@grouped
def run(
    names: Annotated[list[str], typer.Argument(metavar="TASK", help="names of tasks, from llava eval tasks")],
    *,
    context: typer.Context,
    questions: Questions,
    out: Annotated[Path, typer.Option("--out", help="folder of the run; one that was interrupted is continued")],
    model: Model = None,
    base: Base = None,
    adapter: Adapters = None,
    loading: ModelOptions,
    engine: EngineFlags,
    generation: Generation,
    as_json: AsJson = False,
) -> None:
    """Ask a model the questions of benchmarks, and score its answers."""
    from llava.eval.record import weights_digest, write_record
    from llava.eval.report import charts_missing, write_report
    from llava.eval.run import evaluate
    from llava.eval.runs import RUN
    from llava.eval.task import Measured
    from llava.eval.task_run import check_run

    options = generation.options()
    if missing := charts_missing():
        log.warning("report.md will have no charts: %s", missing)
    source = {"name": model_name(model), "path": model, "base": base}
    given = {"model": model, "base": base, "adapter": adapter, "batch_invariant": engine.batch_invariant}
    settings = {f"--{key.replace('_', '-')}": value for key, value in (given | vars(loading) | options).items()}
    del settings["--device"]  # an interrupted run may continue on another one
    check_run(out, settings)
    folders = [model, base, *(one.partition("=")[2] for one in adapter or ())]
    of_tasks = {**settings, "weights": weights_digest(folders)}
    runs = [questions.open(name, out, of_tasks, str(source["name"])) for name in dict.fromkeys(names)]

    @cache
    def assistant() -> "Assistant":  # loaded when the first question is missing
        on = replace(loading, device=_device(loading.device))
        sees = not all(isinstance(one.task, Measured) for one in runs)
        vlm = load(model, on, base=base, adapters=adapter, vision=sees, engine=engine)
        if runs[0].share.rank == 0:
            write_record(out, vlm, source, settings)
        return vlm

    found = []
    for one in runs:
        vlm = assistant() if one.missing() or not (out / RUN).exists() else None
        with progress_bar(one.task.name, unit="questions") as progress:
            found.append(evaluate(vlm, one, options, describe=context.obj.render, progress=progress))
    if any(found):
        write_report(out)
    if found[-1]:  # else another process is still asking, and will print all scores
        scores = [one or task.finished() for one, task in zip(found, runs, strict=True)]
        if all(scores):
            _report([one for one in scores if one], out, as_json)


@evaluation.command()
def tasks(as_json: AsJson = False) -> None:
    """List the tasks, and the files that each expects."""
    from llava.eval.tasks import TASKS

    if as_json:
        fields = ("name", "title", "metric", "folder", "judged", "splits")
        listed = [
            {key: getattr(task, key) for key in fields} | {"included": bool(task.included), "files": dict(task.files)}
            for task in TASKS.values()
        ]
        print(json.dumps(listed))
        return
    for task in TASKS.values():
        print(f"{task.name}: {task.title}; {task.metric}" + "; included" * bool(task.included))
        if task.splits:
            print(f"  splits: {', '.join(task.splits)}")
        for file, content in task.files.items():
            print(f"  {Path(task.folder) / file}: {content}")


def _device(device: str) -> str:
    """Returns the device of this process: by default, torchrun's processes share the GPUs."""
    import torch

    if device == "auto" and "RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def _report(scores: Sequence["Scores"], out: Path, as_json: bool) -> None:
    """Prints scores. Exits with status 1 if there are questions without an answer."""
    if as_json:
        print(json.dumps({one.task: one.summary() for one in scores}))
    else:
        from rich.console import Console

        from llava.eval.report import REPORT, table

        Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False).print(*map(table, scores))
        for one in scores:
            if one.note:
                print(f"{one.task}: {one.note}")
        print(f"answers, scores and settings: {out}; report: {out / REPORT}")
        if any(one.unjudged for one in scores):
            words = ["llava", "eval", "judge", str(out), "--judge-url", "URL", "--judge-model", "NAME"]
            print(f"to judge the answers, run: {shlex.join(words)}")
    if any(one.unanswered for one in scores):
        raise SystemExit(1)
