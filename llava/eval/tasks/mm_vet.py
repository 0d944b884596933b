"""MM-Vet: questions with free answers, which GPT-4 grades. arXiv:2308.02490.

Files are those of LLaVA's scripts/v1_5/eval/mmvet.sh and convert_mmvet_for_eval.py. The grading is that of the authors'
own program; there is no figure here.
"""

import json
from collections.abc import Mapping, Sequence

from llava.eval.entries import by_key
from llava.eval.task import Answered, Data, Item, Question, Task, question

_QUESTIONS = "llava-mm-vet.jsonl"


class MmVet(Task):
    """Has no sums."""

    name = "mm-vet"
    title = "MM-Vet"
    metric = "none: GPT-4 grades the answers elsewhere"
    folder = "mm-vet"
    files: Mapping[str, str] = {
        _QUESTIONS: "questions, with question_id, image and text",
        "images/": "pictures of MM-Vet",
    }
    max_new_tokens = 1024

    def questions(self, data: Data) -> list[Question]:
        """Returns the questions in the order of the file. Raises DataError."""
        entries = by_key(data.json(_QUESTIONS, self.files[_QUESTIONS]).entries(), lambda one: one.id("question_id"))
        return [question(entry, data, "images") for entry in entries.values()]

    def score(self, answered: Sequence[Answered]) -> list[Item]:
        """Returns nothing."""
        return []

    def submission(self, answered: Sequence[Answered], data: Data) -> Mapping[str, bytes]:
        """Returns the answers by question, as MM-Vet's evaluator reads them."""
        found = {f"v1_{one.question.id}": one.text for one in answered}
        return {"submission.json": json.dumps(found, indent=2).encode()}

    def note(self, answered: Sequence[Answered]) -> str:
        """Returns why there is no figure."""
        where = "https://huggingface.co/spaces/whyu/MM-Vet_Evaluator"
        return f"no figure, since GPT-4 grades MM-Vet; the answers are in submission.json, for {where}"
