"""MMBench: questions with up to four options, each asked several times with rotated options. arXiv:2307.06281.

Files, prompts and the submission are those of LLaVA's scripts/v1_5/eval/mmbench.sh (and mmbench_cn.sh) and
convert_mmbench_for_submission.py. The rule is the benchmark's CircularEval, without its language model: a question is
right if the letters of all its rotations are.
"""

import base64
import binascii
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from llava.errors import DataError, counted
from llava.eval.entries import Entry, by_key
from llava.eval.metrics import option_letter, share
from llava.eval.tables import read_table, workbook
from llava.eval.task import Answered, Data, Item, Question, Task
from llava.eval.tasks.scienceqa import SUFFIX
from llava.eval.tasks.vqav2 import without_labels

_LETTERS = "ABCD"
_EMPTY = frozenset({
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
})  # fmt: skip  # cells that pandas reads as missing values
_CN = "请直接回答选项字母。"
_ROTATION = 1_000_000  # added to the index of a question for each rotation
_LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")  # columns a submission has not
_PREDICTION = 6  # its column in a submission


class MmBench(Task):
    """An item is a question with its rotations. Sums: all right, right rotations, rotations, questions."""

    name = "mmbench"
    title = "MMBench"
    metric = "questions with the right letter in all rotations (%)"
    folder = "mmbench"
    splits = ("dev_20230712", "test_20230712", "dev_cn_20231003", "test_cn_20231003")
    files: Mapping[str, str] = {
        "mmbench_{split}.tsv": "columns index, question, hint, A to D, answer (of dev), category, image in base64"
    }
    max_new_tokens = 1024

    def questions(self, data: Data) -> list[Question]:
        """Returns the rows of the file as questions. Raises DataError."""
        found = [_question(id, row, data) for id, row in _rows(self, data).items()]
        rounds = Counter(_base(one) for one in found)
        return [replace(one, values={**one.values, "rounds": rounds[_base(one)]}) for one in found]

    def prompt(self, question: Question) -> str:
        """Returns hint, question, options and the instruction."""
        options = [f"{letter}. {option}" for letter, option in question.values["options"].items()]
        return "\n".join([*question.values["hint"], question.text, *options, question.values["suffix"]])

    def score(self, answered: Sequence[Answered]) -> list[Item]:
        """Returns one item per question whose rotations all have a reply; none without labels."""
        whole = {id: rounds for id, rounds in _by_base(answered).items() if not _incomplete(rounds)}
        return [_item(id, rounds) for id, rounds in whole.items() if rounds[0].question.answer is not None]

    def item_of(self, question: str) -> str:
        """Returns the question whose rotation this is."""
        return str(int(question) % _ROTATION) if question.isdecimal() else question

    def details(self, sums: Sequence[float]) -> Mapping[str, float | None]:
        """Returns the share of right replies, each rotation counted by itself."""
        return {"each rotation": share(sums[1], sums[2])}

    def submission(self, answered: Sequence[Answered], data: Data) -> Mapping[str, bytes]:
        """Returns submission.xlsx: the columns of the file that the server wants, and the replies."""
        rows = _rows(self, data)
        texts = {one.question.id: one.text for one in answered}
        columns = [name for name in next(iter(rows.values())).value if name not in _LEFT_OUT]
        table: list[list[str | int]] = [[_cell(row.value[name]) for name in columns] for row in rows.values()]
        for cells, id in zip(table, rows, strict=True):
            cells.insert(_PREDICTION, texts.get(id, ""))
            cells[columns.index("index")] = int(id)
        columns.insert(_PREDICTION, "prediction")
        return {"submission.xlsx": workbook([columns, *table])}

    def note(self, answered: Sequence[Answered]) -> str:
        """Returns why there is no figure, or how many questions are left out."""
        n = sum(_incomplete(rounds) for rounds in _by_base(answered).values())
        left_out = f"{counted(n, 'question')} without replies to all rotations left out" if n else ""
        where = "submission.xlsx, for https://mmbench.opencompass.org.cn/mmbench-submission"
        return without_labels(answered, "this split of MMBench", where) or left_out


def _rows(task: Task, data: Data) -> dict[str, Entry]:
    (name,) = task.files
    file = data.file(name.format(split=data.split), task.files[name])
    return by_key(read_table(file, ("index", "question", "A", "B", "image")), lambda one: str(_index(one)))


def _index(row: Entry) -> int:
    try:
        return int(row.value["index"])
    except ValueError:
        raise DataError(f"{row.where}: index is {row.value['index']!r:.40}; expected a whole number") from None


def _question(id: str, row: Entry, data: Data) -> Question:
    options = _options(row)
    answer = row.value.get("answer", "") if data.split.startswith("dev") else None
    if answer is not None and answer not in options:
        raise DataError(f"{row.where}: answer is {answer!r:.40}; expected one of {', '.join(options)}")
    hint = row.value.get("hint", "")
    values = {
        "options": options,
        "hint": [] if _is_none(hint) else [hint],
        "suffix": _CN if "_cn_" in data.split else SUFFIX,
    }
    groups = tuple(dict.fromkeys(row.value[name] for name in ("l2-category", "category") if row.value.get(name)))
    return Question(
        id=id,
        numbered=True,
        text=row.value["question"],
        images=(_picture(row),),
        answer=answer,
        groups=groups,
        values=values,
    )


def _options(row: Entry) -> dict[str, str]:
    """Returns the options by letter, up to the first one that is missing."""
    found = {}
    for letter in _LETTERS:
        if _is_none(text := row.value.get(letter, "")):
            break
        found[letter] = text
    if not found:
        raise DataError(f"{row.where}: has no options; expected texts in the columns A to D")
    return found


def _is_none(text: str) -> bool:
    """Whether model_vqa_mmbench.py treats a cell as empty, because of pandas or by itself."""
    return text in _EMPTY or text.lower() in ("nan", "none")


def _cell(text: str) -> str:
    return "" if text in _EMPTY else text


def _picture(row: Entry) -> bytes:
    try:
        return base64.b64decode(row.value["image"], validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"{row.where}: image is {row.value['image']!r:.40}; expected a picture in base64") from None


def _base(question: Question) -> str:
    return str(int(question.id) % _ROTATION)


def _by_base(answered: Sequence[Answered]) -> dict[str, list[Answered]]:
    found: dict[str, list[Answered]] = defaultdict(list)
    for one in answered:
        found[_base(one.question)].append(one)
    return found


def _incomplete(rounds: Sequence[Answered]) -> bool:
    return len(rounds) != rounds[0].question.values["rounds"]


def _item(id: str, rounds: Sequence[Answered]) -> Item:
    right = [option_letter(one.text, one.question.values["options"]) == one.question.answer for one in rounds]
    sums = (float(all(right)), float(sum(right)), float(len(right)), 1.0)
    return Item(id=id, sums=sums, groups=rounds[0].question.groups)
