"""The folder of one task of a run: its questions, its answers as they come, and its scores.

Answers are appended to a journal, answers.partial.RANK.jsonl. With several processes, each asks every n-th question,
and the last one to finish puts the journals together: answers.jsonl, in the order of the questions and in the layout of
the original's scripts, and scores.json. `runs` reads the folder.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from llava.errors import ConfigError, DataError
from llava.eval.entries import Entry, JsonFile, is_unicode
from llava.eval.questions import QUESTIONS, question_line
from llava.eval.reviews import REVIEWS, pairs_by_question
from llava.eval.runs import ANSWERS, PROMPTS, RUN, SCORES, SETTINGS, read_scores
from llava.eval.task import Answered, Data, Question, Scores, Task, check_images, scores
from llava.tensors.atomic import replacing

_EXPECTED = "an answer of this run as a JSON object"


@dataclass(frozen=True)
class Share:
    """The questions of one of several processes: every `world`-th one, beginning with number `rank`."""

    rank: int = 0
    world: int = 1


@dataclass(kw_only=True)
class TaskRun:
    """The answers to the questions of one task, in a folder of their own."""

    task: Task
    questions: Sequence[Question]
    folder: Path
    share: Share = field(default_factory=Share)
    model: str = ""  # name of the model, for the answers
    data: Data | None = None  # of the benchmark; None: no files for its own programs are written

    @property
    def journal(self) -> Path:
        """The file to which this process appends."""
        return self.folder / f"answers.partial.{self.share.rank}.jsonl"

    def open(self, settings: Mapping[str, Any]) -> None:
        """Creates the folder, or checks that an earlier run had the same settings. Raises ConfigError or DataError.

        The questions are written down, so that a run can be read without the files of the benchmark.

        settings: what the answers depend on, by the names that an error shows.
        """
        check_images(self.questions)
        lines = [_line(self.task, one) for one in self.questions]
        wanted = {"questions": fingerprint(self.task, self.questions), **settings}
        file = self.folder / SETTINGS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                if not file.exists():
                    _write(file, json.dumps(wanted, indent=1, ensure_ascii=False) + "\n")
                _check_same(self.folder, _settings(file).value, wanted)
                _write(self.folder / QUESTIONS, "".join(lines))
                self._failed(self.share.rank).unlink(missing_ok=True)  # of an earlier run
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot be written ({error.strerror}); choose another folder with --out"
            ) from None

    def answers(self) -> dict[str, dict[str, Any]]:
        """Returns the answers that exist, by question, except to those whose pictures have changed since."""
        files = [self.folder / ANSWERS, *sorted(self.folder.glob("answers.partial.*.jsonl"))]
        asked, found = {one.id: one for one in self.questions}, dict[str, dict[str, Any]]()
        for answer in (one for file in files if file.exists() for one in _complete_lines(file)):
            question = asked.get(str(answer["question_id"]))
            if question and not _changed(question, answer["metadata"].get("images")):
                found[question.id] = answer  # the outdated answer of one process does not hide that of another
        return {id: found[id] for id in asked if id in found}

    def missing(self) -> list[Question]:
        """Returns the questions that this process has to ask."""
        known = self.answers()
        mine = self.questions[self.share.rank :: self.share.world]
        return [question for question in mine if question.id not in known]

    def add(self, question: Question, text: str, metadata: Mapping[str, Any]) -> None:
        """Appends an answer, so that it outlives this process. Raises OSError."""
        prompt = self.task.prompt(question)
        line = {
            "question_id": int(question.id) if question.numbered else question.id,  # for the original's scripts
            "prompt": prompt,
            "text": text,
            "answer_id": hashlib.sha256(f"{question.id}\n{prompt}\n{text}".encode()).hexdigest()[:22],
            "model_id": self.model,
            "metadata": {**metadata, "images": _states(question)},
        }
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def add_examples(self, prompts: Sequence[str]) -> None:
        """Writes down some prompts as the model sees them. Raises OSError."""
        _write(self.folder / PROMPTS, json.dumps({"prompts": list(prompts)}, ensure_ascii=False) + "\n")

    def begin(self) -> None:
        """Removes a line that this process had not completed when it was killed, and the errors of its last run."""
        self._failed(self.share.rank).unlink(missing_ok=True)
        if self.journal.exists():
            data = self.journal.read_bytes()
            if torn := len(data) - (data.rfind(b"\n") + 1):
                os.truncate(self.journal, len(data) - torn)

    def finish(self, failed: Mapping[str, str]) -> Scores | None:
        """Puts the answers together and scores them, unless another process is still asking.

        failed: errors by question. Questions without an answer are asked again by the next run.
        """
        with FileLock(self.folder / ".lock"):
            _write(self._failed(self.share.rank), json.dumps(dict(failed)))
            known, errors = self.answers(), self._errors()
            if any(one.id not in known and one.id not in errors for one in self.questions):
                return None
            lines = [json.dumps(known[one.id], ensure_ascii=False) + "\n" for one in self.questions if one.id in known]
            (self.folder / SCORES).unlink(missing_ok=True)  # they are about the answers before
            _write(self.folder / ANSWERS, "".join(lines))
            for file in [*self.folder.glob("failed.*.json"), *self.folder.glob("answers.partial.*.jsonl")]:
                file.unlink()
            return self.score()

    def finished(self) -> Scores | None:
        """Returns the scores if the last process has put the answers together. Raises DataError."""
        with FileLock(self.folder / ".lock"):
            asking = any(self.folder.glob("failed.*.json"))  # which every process writes, and the last one removes
            return None if asking or not (self.folder / SCORES).exists() else read_scores(self.folder / SCORES)

    def _failed(self, rank: int) -> Path:
        return self.folder / f"failed.{rank}.json"

    def _errors(self) -> set[str]:
        return {id for file in self.folder.glob("failed.*.json") for id in JsonFile(file, "errors by question").value()}

    def score(self) -> Scores:
        """Scores the answers, with the verdicts on them if there are any, and writes scores.json."""
        known, verdicts = self.answers(), self.verdicts()
        answered = [
            Answered(one, known[one.id]["text"], tuple(verdicts.get(one.id, ())))
            for one in self.questions
            if one.id in known
        ]
        result = scores(self.task, answered, n_questions=len(self.questions))
        for name, content in (self.task.submission(answered, self.data) if self.data else {}).items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / name) as partial:
                partial.write_bytes(content)
        _write(self.folder / SCORES, result.json())
        return result

    def verdicts(self) -> dict[str, list[tuple[float, float]]]:
        """Returns the scores that a judge has given, by question, in the order in which it was asked."""
        file = self.folder / REVIEWS
        if not self.task.judged or not file.exists():
            return {}
        return pairs_by_question(file, self.answer_ids())

    def answer_ids(self) -> dict[str, str]:
        """Returns the id of each answer, by question."""
        return {id: str(answer.get("answer_id", id)) for id, answer in self.answers().items()}


def _line(task: Task, question: Question) -> str:
    """Returns the line of questions.jsonl. Raises DataError if it cannot be written."""
    line = question_line(question, task.prompt(question))
    if not is_unicode(line):
        raise DataError(
            f"{task.name}, question {question.id}: has half of a pair of surrogates, which no file can contain; "
            "correct the benchmark's file"
        )
    return line


def fingerprint(task: Task, questions: Sequence[Question]) -> str:
    """Returns a digest of everything that the model is asked, and of the right answers."""
    digest = hashlib.sha256()
    for one in questions:
        images = [name for name, _ in _states(one)]
        values = [one.id, task.prompt(one), images, one.answer, list(one.groups), dict(one.values)]
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _states(question: Question) -> list[list[Any]]:
    """Returns names and sizes of the pictures, by which a changed one is recognised. The size of a lost one is None."""
    return [_state(image) for image in question.images]


def _state(image: Path | bytes) -> list[Any]:
    if isinstance(image, bytes):
        return [hashlib.sha256(image).hexdigest()[:22], len(image)]
    return [image.name, image.stat().st_size if image.exists() else None]


def _changed(question: Question, before: Any) -> bool:
    """Whether pictures differ from their states `before`. Lost ones do not: answers may be judged without them."""
    now = _states(question)
    if not isinstance(before, list) or len(before) != len(now):
        return True
    return any(new != old and new[1] is not None for new, old in zip(now, before, strict=True))


def check_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError if the folder has a run with other settings, such as another model, in whatever tasks."""
    if (folder / RUN).exists():
        _check_same(folder, _settings(folder / RUN).part("settings").value, settings)


def _check_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    changed = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if changed:
        then, now = (", ".join(f"{name} {one.get(name)!r:.80}" for name in changed) for one in (found, wanted))
        raise ConfigError(
            f"{folder}: has answers of a run with {then}; this run has {now}; choose another folder with --out, "
            "or remove this one"
        )


def _settings(file: Path) -> Entry:
    return JsonFile(file, "the settings of a run").object()


def _complete_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of JSON lines; what follows the last line end was not completed, and is left out."""
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            value = json.loads(line)
            if not isinstance(value["question_id"], str | int) or not isinstance(value["text"], str):
                raise TypeError
            value["metadata"].get("images")
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(f"{file}: its line {number} is not {_EXPECTED}; remove that line") from None
        yield value


def _write(file: Path, text: str) -> None:
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")
