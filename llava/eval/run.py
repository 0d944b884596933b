"""Asks a model the questions of a benchmark, and scores its answers.

Answers are on the disk as soon as the engine has them, so that the same command continues after an interruption.
"""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple

from llava.assistant import Assistant, question_about
from llava.engine.sampling_params import SamplingParams
from llava.errors import LlavaError, counted
from llava.eval.task import Measured, Question, Scores, Task
from llava.eval.task_run import TaskRun
from llava.tensors.writer import Progress, no_progress

log = logging.getLogger(__name__)
_SHOWN = 3  # errors in the log; the others are counted
_EXAMPLES = 3  # prompts that are kept as the model saw them


def evaluate(
    assistant: Assistant | None,
    run: TaskRun,
    options: Mapping[str, Any],
    *,
    describe: Callable[[LlavaError], str] = str,
    progress: Progress = no_progress,
) -> Scores | None:
    """Asks the missing questions and returns the scores, or None if another process is still asking.

    assistant: may be None if no question is missing.
    A question whose picture cannot be read, or whose prompt does not fit, has no answer, and a warning says why.

    options: keyword options of `Assistant.generate`. describe: returns the text of an error.
    """
    failed: dict[str, str] = {}
    try:
        run.begin()
        missing = run.missing() if assistant else []
        if assistant and run.share.rank == 0:
            run.add_examples(_examples(assistant, run))
        progress(0, len(missing))
        with closing(_ask(assistant, run.task, missing, options)) as results:
            for done, (question, result) in enumerate(results, start=1):
                if isinstance(result, LlavaError):
                    failed[question.id] = describe(result)
                else:
                    run.add(question, result.text, {"finish_reason": result.finish_reason})
                progress(done, len(missing))
        _warn(run.task.name, failed)
        return run.finish(failed)
    except OSError as error:
        raise LlavaError(
            f"{run.folder}: cannot be written ({error.strerror or error}); fix the cause and run the same command again"
        ) from None


def _examples(assistant: Assistant, run: TaskRun) -> list[str]:
    """Returns the first prompts as the model sees them. Those that cannot be prepared are left out; see `evaluate`."""
    found: list[str] = []
    for one in run.questions[: 0 if isinstance(run.task, Measured) else _EXAMPLES]:
        with suppress(LlavaError):
            found.append(assistant.prepare(question_about(list(one.images), run.task.prompt(one))).prompt)
    return found


def _ask(
    assistant: Assistant | None, task: Task, questions: Sequence[Question], options: Mapping[str, Any]
) -> Generator[tuple[Question, Any], None, None]:
    """Yields questions with their replies or errors, in the order in which the engine gives them."""
    if assistant is None:
        return
    if isinstance(task, Measured):
        yield from ((one, _measured(assistant, task, one)) for one in questions)
        return
    params = SamplingParams.from_options(**{"max_new_tokens": task.max_new_tokens, **options})
    requests = [question_about(list(one.images), task.prompt(one)) for one in questions]
    with closing(assistant.engine.generate_each(requests, params, adapter=assistant.active)) as results:
        for i, result in results:
            yield questions[i], result


def _measured(assistant: Assistant, task: Measured, question: Question) -> "Measurement | LlavaError":
    try:
        return Measurement(task.measure(assistant, question))
    except LlavaError as error:
        return error


class Measurement(NamedTuple):
    """What takes the place of a reply."""

    text: str
    finish_reason: str = "measured"


def _warn(task: str, failed: Mapping[str, str]) -> None:
    for id, error in list(failed.items())[:_SHOWN]:
        log.warning("%s, question %s: no answer: %s", task, id, error)
    if len(failed) > _SHOWN:
        log.warning("%s: %s have no answer", task, counted(len(failed) - _SHOWN, "more question"))
