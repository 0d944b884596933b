"""ScienceQA: multiple-choice questions of school subjects, half of them with a picture. arXiv:2209.09513.

Files and rules are those of LLaVA's scripts/v1_5/eval/sqa.sh and of eval_science_qa.py since October 2023.
"""

from collections.abc import Iterator, Mapping, Sequence

from llava.config import IMAGE_PLACEHOLDER
from llava.data.scienceqa import LETTERS, Problem, Problems, read_split, sample
from llava.eval.entries import Entry, by_key
from llava.eval.scienceqa import groups_of, letter
from llava.eval.task import Answered, Data, Item, Question, Task

_QUESTIONS, _PROBLEMS, _SPLITS = "llava_{}_CQM-A.json", "problems.json", "pid_splits.json"
_FOLDERS = {"minitest": "test", "minival": "val"}  # of splits whose pictures are among those of another one
SUFFIX = "Answer with the option's letter from the given choices directly."


class ScienceQa(Task):
    """Sums: right, questions."""

    name = "scienceqa"
    title = "ScienceQA"
    metric = "right answers (%)"
    folder = "scienceqa"
    splits = ("test", "val", "minitest", "minival", "train")
    files: Mapping[str, str] = {
        _QUESTIONS.format("{split}"): "questions as LLaVA's samples; without it, they are made from the next two files",
        _PROBLEMS: "ScienceQA's problems",
        _SPLITS: "ids of each split",
        "images/{split}/": "a folder for each problem with a picture",
    }
    max_new_tokens = 1024

    def questions(self, data: Data) -> list[Question]:
        """Returns the questions in the order of the file. Raises DataError."""
        problems = Problems(data.file(_PROBLEMS, self.files[_PROBLEMS]))
        return [_question(entry, id, problems, data) for id, entry in self._samples(problems, data).items()]

    def _samples(self, problems: Problems, data: Data) -> dict[str, Entry]:
        name = _QUESTIONS.format(data.split)
        if (data.folder / name).exists():
            return by_key(data.json(name, "a sample").entries(), lambda one: one.id("id"))
        ids = read_split(data.file(_SPLITS, self.files[_SPLITS]), data.split)
        made = (Entry(problems[id].where, sample(problems[id], "CQM-A")) for id in ids)
        return by_key(made, lambda one: one.id("id"))

    def prompt(self, question: Question) -> str:
        """Returns the question and the instruction."""
        return f"{question.text}\n{SUFFIX}"

    def score(self, answered: Sequence[Answered]) -> list[Item]:
        """Returns one item per question, by the rule `current`."""
        return [one.item(letter(one.text, "current") == one.question.answer, 1) for one in answered]


def _question(entry: Entry, id: str, problems: Problems, data: Data) -> Question:
    problem = problems[id]
    (turn, *_) = entry.parts("conversations")
    images = (entry.text("image"),) if "image" in entry.value else ()
    folder = f"images/{_FOLDERS.get(data.split, data.split)}"
    return Question(
        id=id,
        text=turn.text("value").replace(IMAGE_PLACEHOLDER, "").strip(),
        images=tuple(data.image(name, folder) for name in images),
        answer=LETTERS[problem.answer],
        groups=tuple(_groups(problem, bool(images))),
    )


def _groups(problem: Problem, has_image: bool) -> Iterator[str]:
    yield from (name for _, name in groups_of(problem))
    if has_image:
        yield "image"  # the original's image accuracy; IMG is by the problem's own field
