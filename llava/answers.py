"""Asks one question about each of many images, and writes the answers to a table: a CSV file or JSON lines.

Answers are appended to a journal, OUT.partial, as soon as the engine has them. After an interruption, the same command
takes them from there and asks about the other images. The table is written at the end, in the order of the images.
"""

import csv
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from llava.assistant import Assistant, question_about
from llava.config import IMAGE_SUFFIXES
from llava.engine.reply import Reply
from llava.engine.sampling_params import SamplingParams
from llava.errors import ConfigError, ContextError, ImageError, LlavaError, PromptError, counted
from llava.tensors.atomic import check_new, replacing
from llava.tensors.lock import locked
from llava.tensors.writer import Progress, no_progress

log = logging.getLogger(__name__)
_FORMULA = ("=", "+", "-", "@")  # spreadsheets compute cells that begin with one of these
State = list[int]  # size in bytes and time of the last change in ns, by which a changed file is recognised


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One row of the table. What an image without an answer does not have is None: an empty cell in a CSV file."""

    picture: str  # path of the image
    question: str
    answer: str | None = None
    tokens: int | None = None  # of the answer
    finish_reason: str  # "stop", "length" or "error"
    seconds: float | None = None  # from opening the image to the last token, beside other requests
    error: str | None = None  # one line


def find_pictures(paths: Iterable[str]) -> list[str]:
    """Returns image files in the order of `paths`, each once. A folder stands for the image files in it, by name.

    Raises ImageError if a folder contains no image files or cannot be read. Logs what is left out of a folder.
    """
    found: list[str] = []
    for path in paths:
        found += _in_folder(path) if os.path.isdir(path) else [path]
    return list(dict.fromkeys(found))


def _in_folder(folder: str) -> list[str]:
    """Returns the image files in a folder, without those in its subfolders and without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            is_folder = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(".")}
    except OSError as error:
        raise ImageError(f"{folder:.200}: cannot be read ({error.strerror}); expected a folder of images") from None
    pictures = [name for name in is_folder if not is_folder[name] and name.lower().endswith(IMAGE_SUFFIXES)]
    n_folders = sum(is_folder.values())
    if not pictures:
        raise ImageError(
            f"{folder:.200}: contains no image files (*{', *'.join(IMAGE_SUFFIXES)}) besides those in its "
            f"{counted(n_folders, 'subfolder')}; give the folders in which the images are"
        )
    if n_others := len(is_folder) - len(pictures):
        others = f"{counted(n_folders, 'subfolder')} and {counted(n_others - n_folders, 'file')} of other types"
        log.warning("%s: %s are left out", folder, others)
    return [os.path.join(folder, name) for name in sorted(pictures)]


def _state(picture: str) -> State:
    try:
        status = os.stat(picture)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


class Journal:
    """The answers of a run that has not written its table yet, in OUT.partial: JSON lines, the settings first."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """settings: what the answers depend on, by the names that an error shows."""
        self.path = path
        self._header = json.dumps({"settings": dict(settings)}) + "\n"

    def add(self, answer: Answer, state: State) -> None:
        """Appends an answer about an image file in some state, so that it outlives this process. Raises OSError."""
        line = json.dumps({"state": state, "row": asdict(answer)}) + "\n"
        if self.path.exists():
            with self.path.open("a", encoding="ascii") as file:
                file.write(line)
        else:  # appears with its first answer, so that a run without answers leaves nothing
            with replacing(self.path) as new:
                new.write_text(self._header + line, encoding="ascii")

    def read(self) -> dict[str, tuple[State, Answer]]:
        """Returns the last answer about each image, with the state of its file.

        Removes a line that was not completed. Raises ConfigError if the file is no journal or has other settings.
        """
        if not os.path.lexists(self.path):
            return {}
        try:
            data = self.path.read_bytes()
            *lines, torn = data.split(b"\n")
            found = [self._parsed(line, number) for number, line in enumerate(lines or [b""])]
            self._check(found[0]["settings"])
            os.truncate(self.path, len(data) - len(torn))
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be read ({error.strerror}); remove it, or choose another name for the table"
            ) from None
        return {values["row"].picture: (values["state"], values["row"]) for values in found[1:]}

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        """Returns {"settings": …} of the first line, and {"state": …, "row": Answer} of the others."""
        try:
            values = json.loads(line)
            if number == 0:
                return {"settings": dict(values["settings"])}
            return {"state": list(values["state"]), "row": Answer(**values["row"])}
        except (ValueError, TypeError, KeyError):
            raise ConfigError(
                f"{self.path}: its line {number + 1} is not from an interrupted run; remove the file, or choose "
                "another name for the table"
            ) from None

    def _check(self, found: Mapping[str, Any]) -> None:
        """Raises ConfigError if the settings of the journal differ from those of this run."""
        wanted = json.loads(self._header)["settings"]
        changed = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
        if changed:
            then, now = (", ".join(f"{name} {one.get(name)!r:.80}" for name in changed) for one in (found, wanted))
            raise ConfigError(
                f"{self.path}: has the answers of an interrupted run with {then}; this run has {now}; run the other "
                "command again to complete it, remove the file, or choose another name for the table"
            )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One question about many images, while the table does not exist yet."""

    pictures: Sequence[str]
    question: str
    out: Path  # .csv or .jsonl
    journal: Journal
    states: Mapping[str, State]  # of the image files at the start
    answers: dict[str, Answer]  # of the images that need not be asked about any more

    @property
    def missing(self) -> list[str]:
        """The images that still have to be asked about."""
        return [picture for picture in self.pictures if picture not in self.answers]

    def add(self, answer: Answer) -> None:
        """Keeps an answer. Errors are not in the journal, so that the next run tries these images again."""
        self.answers[answer.picture] = answer
        if answer.error is None:
            self.journal.add(answer, self.states[answer.picture])


@contextmanager
def open_run(pictures: Sequence[str], question: str, out: Path, settings: Mapping[str, Any]) -> Iterator[Run]:
    """Yields a run, with the answers of an interrupted one, while no other process can write the same table.

    settings: what the answers depend on besides the question and the images, by the names that errors show. Raises
    ConfigError if the table exists or cannot be written, or if the interrupted run had other settings.
    """
    out = out.expanduser()
    check_new(out)
    partial = out.with_name(f"{out.name}.partial")
    busy = ConfigError(f"{partial}: another process is writing to it; wait for that process or stop it")
    with locked(out, out.with_name(f".{out.name}.lock"), busy):
        journal = Journal(partial, {"question": question, **settings})
        states = {picture: _state(picture) for picture in pictures}
        known = {picture: answer for picture, (state, answer) in journal.read().items() if states.get(picture) == state}
        yield Run(pictures=pictures, question=question, out=out, journal=journal, states=states, answers=known)


def answer_all(
    assistant: Assistant,
    run: Run,
    options: Mapping[str, Any],
    *,
    describe: Callable[[LlavaError], str] = str,
    progress: Progress = no_progress,
) -> list[Answer]:
    """Asks about the images that are missing, writes the table, and returns its rows.

    An image that cannot be read, or with which the prompt does not fit, is a row with an error. Only the images of the
    requests that run at the same time are in memory.

    options: keyword options of `Assistant.generate`. describe: returns the text of an error. Raises LlavaError if the
    question cannot be asked about any image, or a file cannot be written; the answers so far stay in the journal.
    """
    try:
        n = len(run.missing)
        progress(0, n)
        for done, answer in enumerate(_ask(assistant, run, options, describe), start=1):
            run.add(answer)
            progress(done, n)
        rows = [run.answers[picture] for picture in run.pictures]
        _write(rows, run.out)
        run.journal.path.unlink(missing_ok=True)
    except OSError as error:
        raise LlavaError(
            f"{run.out}: cannot be written ({error.strerror or error}); the answers so far are in "
            f"{run.journal.path.name}; fix the cause and run the same command again"
        ) from None
    except KeyboardInterrupt:
        if run.journal.path.exists():
            log.warning("%s: has the answers so far; run the same command again to continue", run.journal.path)
        raise
    return rows


def _ask(
    assistant: Assistant, run: Run, options: Mapping[str, Any], describe: Callable[[LlavaError], str]
) -> Iterator[Answer]:
    """Yields the answers about the missing images, in the order in which the engine gives them."""
    pictures = run.missing
    requests = [question_about(picture, run.question) for picture in pictures]
    params = SamplingParams.from_options(**options)
    known = any(answer.error is None for answer in run.answers.values())
    with closing(assistant.engine.generate_each(requests, params, adapter=assistant.active)) as results:
        for ended, (i, result) in enumerate(results):
            if isinstance(result, PromptError) and not (isinstance(result, ContextError) or known or ended < i):
                raise result  # no earlier image has an answer, or waits for one: it is about the question or the model
            known = known or isinstance(result, Reply)
            yield _row(pictures[i], run.question, result, describe)


def _row(picture: str, question: str, result: Reply | LlavaError, describe: Callable[[LlavaError], str]) -> Answer:
    if isinstance(result, LlavaError):
        return Answer(picture=picture, question=question, finish_reason="error", error=describe(result))
    spent = result.timings
    return Answer(
        picture=picture,
        question=question,
        answer=result.text,
        tokens=result.usage.completion_tokens,
        finish_reason=result.finish_reason,
        seconds=round(spent.prepare_s + spent.first_token_s + spent.decode_s, 3),
    )


def _write(rows: Sequence[Answer], out: Path) -> None:
    """Writes the table as UTF-8. Bytes of a file name that are not UTF-8 are written as in \\udcff, as JSON does."""
    check_new(out)  # it may have been created since the start
    with replacing(out) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        if out.suffix.lower() == ".csv":
            write_csv(rows, file)
            if warning := formulas(rows):
                log.warning("%s: %s", out, warning)
        else:
            file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def write_csv(rows: Iterable[Answer], file: TextIO) -> None:
    """Writes rows below a header, with lines that end in \\r\\n (RFC 4180)."""
    table = csv.DictWriter(file, [field.name for field in fields(Answer)])
    table.writeheader()
    table.writerows(map(asdict, rows))


def formulas(rows: Iterable[Answer]) -> str:
    """Says whether spreadsheets compute cells of a table, which has the exact text; "" if they do not."""
    n = sum(text.startswith(_FORMULA) for row in rows for text in (row.picture, row.question, row.answer or ""))
    if not n:
        return ""
    begin = "1 cell begins" if n == 1 else f"{n} cells begin"
    return f"{begin} with =, +, - or @, which spreadsheets take for formulas; import the columns as text there"
