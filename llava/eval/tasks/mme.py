"""MME: yes-or-no questions in 14 categories, two about each picture. arXiv:2306.13394.

Files and rules are those of LLaVA's scripts/v1_5/eval/mme.sh, convert_answer_to_mme.py and MME's calculation.py.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llava.errors import DataError, counted
from llava.eval.entries import Entry, read_text
from llava.eval.metrics import COGNITION, PERCEPTION, mme_answer
from llava.eval.task import Answered, Data, Item, Question, Task, question

_QUESTIONS, _FOLDER = "llava_mme.jsonl", "MME_Benchmark_release_version"
_TEXTS = "questions_answers_YN"  # subfolder that some categories have
_CATEGORIES = (*PERCEPTION, *COGNITION)
_SUFFIX, _ASKS = "Answer the question using a single word or phrase.", "Please answer yes or no."


class Mme(Task):
    """An item is a picture. Sums: right answers, pictures with two right answers, and pictures, of each category."""

    name = "mme"
    title = "MME"
    metric = "sum over the categories of right answers and pictures with two right answers (%); headline: perception"
    folder = "MME"
    files: Mapping[str, str] = {
        _QUESTIONS: "questions, with question_id (of the picture), image and text",
        f"{_FOLDER}/": f"a folder for each category, with pictures, and with a text file for each in it or in {_TEXTS}",
    }

    def questions(self, data: Data) -> list[Question]:
        """Returns the two questions about each picture, in the order of the pictures. Raises DataError."""
        labels: dict[str, dict[tuple[str, str], str]] = {}
        found: dict[str, list[Question]] = defaultdict(list)
        for entry in data.json(_QUESTIONS, self.files[_QUESTIONS]).entries():
            category, picture = _picture(entry)
            if category not in labels:
                labels[category] = dict(_labels(data.folder / _FOLDER / category))
            both = found[f"{category}/{picture}"]
            one = _question(entry, picture, labels[category], data)
            both.append(replace(one, id=f"{category}/{picture}:{len(both) + 1}", groups=(_kind(category), category)))
        for picture, both in found.items():
            if len(both) != 2:
                raise DataError(f"{data.folder / _QUESTIONS}: has {len(both)} questions about {picture}; expected 2")
        return [one for both in found.values() for one in both]

    def score(self, answered: Sequence[Answered]) -> list[Item]:
        """Returns one item per picture, both of whose questions have an answer."""
        return [_item(picture, *both) for picture, both in _pictures(answered).items() if len(both) == 2]

    def figure(self, sums: Sequence[float]) -> float | None:
        """Returns the sum of the scores of the categories, each up to 200."""
        per_category = [sums[i : i + 3] for i in range(0, len(sums), 3)]
        scores = [100 * right / (2 * n) + 100 * both / n for right, both, n in per_category if n]
        return sum(scores) if scores else None

    def headline(self, figures: Mapping[str, float | None]) -> float | None:
        """Returns the score of perception, up to 2000."""
        return figures.get("perception")

    def submission(self, answered: Sequence[Answered], data: Data) -> Mapping[str, bytes]:
        """Returns the files of MME's eval_tool, one for each category, with picture, question, label and reply."""
        files: dict[str, list[str]] = defaultdict(list)
        for one in answered:
            category, _, name = one.question.id.rpartition(":")[0].partition("/")
            reply = one.text.replace("\t", " ").replace("\r", " ").replace("\n", " ")
            row = (f"{name}.txt", one.question.values["asked"], one.question.answer, reply)
            files[f"eval_tool/{category}.txt"].append("\t".join(row) + "\n")
        return {name: "".join(rows).encode() for name, rows in files.items()}

    def note(self, answered: Sequence[Answered]) -> str:
        """Returns how many pictures are left out."""
        n = sum(len(both) != 2 for both in _pictures(answered).values())
        return f"{counted(n, 'picture')} with an answer to only one of two questions left out" if n else ""


def _picture(entry: Entry) -> tuple[str, str]:
    """Returns the category and the name of the picture, without its suffix."""
    id = entry.id("question_id")
    category, name = id.split("/")[0], id.rpartition("/")[2]
    if category not in _CATEGORIES or category == id or not name:
        raise DataError(
            f"{entry.where}: question_id is {id!r:.60}; expected CATEGORY/PICTURE, where CATEGORY is "
            f"one of {', '.join(_CATEGORIES)}"
        )
    return category, name.split(".")[0]


def _question(entry: Entry, picture: str, labels: Mapping[tuple[str, str], str], data: Data) -> Question:
    asked = _asked(entry.text("text"), picture, labels)
    if (picture, asked) not in labels:
        raise DataError(f"{entry.where}: {picture}.txt has no question {asked!r:.60}; expected its label there")
    return question(entry, data, _FOLDER, answer=labels[picture, asked], values={"asked": asked})


def _kind(category: str) -> str:
    return "perception" if category in PERCEPTION else "cognition"


def _labels(folder: Path) -> Iterator[tuple[tuple[str, str], str]]:
    """Yields the label of each picture and question of a category. Raises DataError."""
    folder = folder / _TEXTS if (folder / _TEXTS).is_dir() else folder
    for file in sorted(folder.glob("*.txt")):
        for number, line in enumerate(read_text(file, "questions and labels").split("\n"), start=1):
            asked, *label = line.strip().split("\t")
            if asked and label not in (["Yes"], ["No"]):
                raise DataError(f"{file}, line {number}: found {line!r:.60}; expected a question, a tab, and Yes or No")
            if asked:
                yield (file.stem, asked), label[0]


def _asked(text: str, picture: str, labels: Mapping[tuple[str, str], str]) -> str:
    """Returns the question as in MME's file, where some have two spaces."""
    asked = text.replace(_SUFFIX, "").strip() if _SUFFIX in text else text
    if _ASKS in asked:
        return asked
    one, two = f"{asked} {_ASKS}", f"{asked}  {_ASKS}"
    return one if (picture, one) in labels else two


def _pictures(answered: Sequence[Answered]) -> dict[str, list[Answered]]:
    found: dict[str, list[Answered]] = defaultdict(list)
    for one in answered:
        found[one.question.id.rpartition(":")[0]].append(one)
    return found


def _item(picture: str, first: Answered, second: Answered) -> Item:
    right = [mme_answer(one.text) == one.question.answer.lower() for one in (first, second)]
    groups = first.question.groups
    sums = {groups[1]: (float(sum(right)), float(all(right)), 1.0)}
    return Item(
        id=picture,
        sums=tuple(value for category in _CATEGORIES for value in sums.get(category, (0.0, 0.0, 0.0))),
        groups=groups,
    )
