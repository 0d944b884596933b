"""Asks a judge for its verdicts on the answers of a run, which are kept in the reviews.jsonl of each task.

Verdicts are appended as they come; the same command continues after an interruption. At the end, they are put into the
order of the questions.
"""

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llava.errors import ConfigError, DataError, LlavaError, counted
from llava.eval.endpoint import Chat, Endpoint, NoReplyError, RefusedError
from llava.eval.entries import Entry, JsonFile
from llava.eval.questions import QUESTIONS, read_questions
from llava.eval.reviews import REVIEWS, check_answers, metadata, parse_scores, read_reviews, sample, warn_of_scale
from llava.eval.runs import ANSWERS
from llava.eval.task import Judged, Question
from llava.eval.task_run import TaskRun
from llava.eval.tasks import TASKS
from llava.tensors.atomic import replacing
from llava.tensors.writer import Progress, no_progress

log = logging.getLogger(__name__)
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
BYTES_PER_TOKEN = 4  # of English text, about
_GIVE_UP = 5  # questions in a row without a reply
_EXPECTED = "a verdict as a JSON object"


@dataclass(frozen=True)
class Case:
    """A verdict that is missing."""

    question: Question
    answer: Mapping[str, Any]  # as in answers.jsonl
    sample: int  # number of the verdict among those on the question, from 0

    @property
    def name(self) -> str:
        """Names the verdict in messages."""
        return f"question {self.question.id}" + (f", verdict {self.sample + 1}" if self.sample else "")


@dataclass(frozen=True)
class Estimate:
    """What the missing verdicts cost, at most and without retries."""

    requests: int
    input_tokens: int  # at BYTES_PER_TOKEN
    output_tokens: int  # if every reply has the maximum length

    def price(self, *, input: float, output: float) -> float:
        """Returns the price. input, output: of a million tokens."""
        return (self.input_tokens * input + self.output_tokens * output) / 1e6


def judged_runs(folder: Path, name: str | None = None) -> list[TaskRun]:
    """Returns the tasks of a run that need a judge, or the one of this name.

    Raises ConfigError or DataError if there are none, or their answers are not complete.
    """
    judged = [one for one in TASKS.values() if isinstance(one, Judged)]
    found = [one for one in judged if name in (None, one.name) and (folder / one.name / QUESTIONS).is_file()]
    if not found:
        raise ConfigError(
            f"{folder}: has no answers to judge{f' of a task {name}' if name else ''}; expected the folder of a run of "
            + ", ".join(one.name for one in judged)
        )
    runs = [TaskRun(task=one, questions=_questions(folder / one.name), folder=folder / one.name) for one in found]
    for run in runs:
        if not (run.folder / ANSWERS).is_file():
            raise ConfigError(f"{run.folder}: its answers are not complete; run the same llava eval run command again")
    return runs


def _questions(folder: Path) -> list[Question]:
    found = read_questions(folder / QUESTIONS)
    for one in found:
        needed = [one.answer, *(one.values.get(key) for key in ("context", "category"))]
        if not all(isinstance(value, str) for value in needed):
            raise DataError(f"{folder / QUESTIONS}: question {one.id} lacks its reference answer, context or category")
    return found


@dataclass(kw_only=True)
class Reviews:
    """The verdicts on the answers of a task."""

    run: TaskRun
    answers: Mapping[str, Mapping[str, Any]] = field(init=False)  # by question

    def __post_init__(self) -> None:
        self.answers = self.run.answers()

    @property
    def file(self) -> Path:
        """Where they are."""
        return self.run.folder / REVIEWS

    @property
    def task(self) -> Judged:
        """The task, with what the judge is asked."""
        assert isinstance(self.run.task, Judged)
        return self.run.task

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from adding verdicts. Raises ConfigError if one is at work."""
        try:
            with FileLock(self.run.folder / ".judge.lock", timeout=0):
                yield
        except Timeout:
            raise ConfigError(f"{self.run.folder}: another process judges these answers; wait for its end") from None
        except OSError as error:
            raise ConfigError(f"{self.run.folder}: cannot be written ({error.strerror})") from None

    def entries(self) -> list[Entry]:
        """Returns the verdicts that exist. Raises DataError if some are on other answers than those of the run."""
        if not self.file.exists():
            return []
        entries = list(JsonFile.appended(self.file, _EXPECTED).entries())
        ours = [one for one in entries if one.id("question_id") in self.answers]
        check_answers(self.file, ours, self.run.answer_ids())
        return entries

    def missing(self, samples: int) -> list[Case]:
        """Returns the verdicts that do not exist yet, one question after the other, `samples` times."""
        have = {(one.id("question_id"), sample(one)) for one in self.entries()}
        asked = [one for one in self.run.questions if one.id in self.answers]
        return [Case(one, self.answers[one.id], i) for i in range(samples) for one in asked if (one.id, i) not in have]

    def begin(self, endpoint: Endpoint) -> None:
        """Removes a line that was not completed. Raises ConfigError if there are verdicts of another judge."""
        given = {"judge": endpoint.model, "temperature": endpoint.temperature}
        for one in self.entries():
            found = {key: metadata(one).get(key) for key in given}
            if found != given:
                then, now = (f"{pair['judge']} at temperature {pair['temperature']}" for pair in (found, given))
                raise ConfigError(
                    f"{one.where}: a verdict of {then}, and this judge is {now}; move {self.file} "
                    "elsewhere to start anew"
                )
        if self.file.exists():
            data = self.file.read_bytes()
            if torn := len(data) - (data.rfind(b"\n") + 1):
                os.truncate(self.file, len(data) - torn)

    def add(self, case: Case, content: str, endpoint: Endpoint) -> None:
        """Appends a verdict, in the layout of the original. Raises OSError."""
        id, answer_id = case.question.id, case.answer.get("answer_id", case.question.id)
        hashed = f"{id}\n{answer_id}\n{case.sample}\n{content}".encode(errors="replace")
        value = {
            "review_id": hashlib.sha256(hashed).hexdigest()[:22],
            "question_id": case.answer["question_id"],
            "answer1_id": case.question.values.get("reference_id"),
            "answer2_id": answer_id,
            "reviewer_id": endpoint.model,
            "metadata": {"judge": endpoint.model, "temperature": endpoint.temperature, "sample": case.sample},
            "content": content,
            "tuple": list(parse_scores(content)),
            "category": case.question.values["category"],
        }
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")

    def finish(self) -> None:
        """Puts the verdicts into the order of the questions. Raises OSError."""
        order = {one.id: i for i, one in enumerate(self.run.questions)}
        entries = sorted(self.entries(), key=lambda one: (order.get(one.id("question_id"), len(order)), sample(one)))
        self._write([one.value for one in entries])

    def take(self, file: Path) -> None:
        """Takes the verdicts of a file. Raises DataError or ConfigError.

        Those on questions that the run does not have are left out, with a warning. The verdicts on a question are
        samples, in the order of the file.
        """
        read_reviews(file)  # checks each line, and warns
        entries = list(JsonFile(file, _EXPECTED).entries())
        ours = [one for one in entries if one.id("question_id") in self.answers]
        if not ours:
            raise DataError(f"{file}: has no verdict on a question that the run in {self.run.folder} answers")
        check_answers(file, ours, self.run.answer_ids())
        if n := len(entries) - len(ours):
            log.warning("%s: %s on questions that the run does not answer, left out", file, counted(n, "verdict"))
        values = [one.value for one in ours]
        if (known := [one.value for one in self.entries()]) and known != values:
            raise ConfigError(f"{self.file}: has other verdicts than {file}; move it elsewhere to use the file")
        self._write(values)

    def _write(self, values: Sequence[Mapping[str, Any]]) -> None:
        with replacing(self.file) as partial:
            partial.write_text("".join(json.dumps(one) + "\n" for one in values), encoding="utf-8")


def estimate(work: Mapping[str, tuple[Reviews, Sequence[Case]]], endpoint: Endpoint) -> Estimate:
    """Returns what the missing verdicts cost."""
    prompts = [_prompt(reviews, case) for reviews, cases in work.values() for case in cases]
    tokens = [-(-len((SYSTEM + prompt).encode(errors="replace")) // BYTES_PER_TOKEN) for prompt in prompts]
    return Estimate(len(prompts), sum(tokens), len(prompts) * endpoint.max_tokens)


def _prompt(reviews: Reviews, case: Case) -> str:
    return reviews.task.judge_prompt(case.question, case.answer["text"])


def judge(
    reviews: Reviews, cases: Sequence[Case], endpoint: Endpoint, *, progress: Progress = no_progress
) -> dict[str, str]:
    """Asks for missing verdicts. Returns the errors of those that it did not get, by name.

    Raises LlavaError if the endpoint refuses all requests, or a verdict cannot be written.
    """
    try:
        failed = asyncio.run(_Court(reviews, endpoint, progress, len(cases)).hear(cases))
        reviews.finish()
        warn_of_scale(reviews.file, [pair for pairs in reviews.run.verdicts().values() for pair in pairs])
        return failed
    except RefusedError as error:
        raise LlavaError(
            f"{endpoint.address} refuses requests: {error}; check --judge-url, --judge-model and the key"
        ) from None
    except OSError as error:
        raise LlavaError(
            f"{reviews.file}: cannot be written ({error.strerror or error}); fix the cause and run the same command "
            "again"
        ) from None


@dataclass
class _Court:
    """One pass over the missing verdicts of a task."""

    reviews: Reviews
    endpoint: Endpoint
    progress: Progress
    total: int
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    in_a_row: int = 0  # questions without a reply since the last one with

    async def hear(self, cases: Sequence[Case]) -> dict[str, str]:
        """Asks about all cases, or until too many in a row get no reply."""
        self.progress(0, self.total)
        queue = iter(cases)
        async with Chat.open(self.endpoint) as chat:
            workers = [asyncio.create_task(self._work(chat, queue)) for _ in range(self.endpoint.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        for case in queue:
            self.failed[case.name] = f"not asked, because the judge failed {self.in_a_row} times in a row"
        return self.failed

    async def _work(self, chat: Chat, queue: Iterator[Case]) -> None:
        while self.in_a_row < _GIVE_UP and (case := next(queue, None)):
            try:
                content = await chat.reply(SYSTEM, _prompt(self.reviews, case))
            except NoReplyError as error:
                self.failed[case.name] = str(error)
                self.in_a_row += 1
            else:
                self.reviews.add(case, content, self.endpoint)
                self.in_a_row = 0
            self.done += 1
            self.progress(self.done, self.total)
