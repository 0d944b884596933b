"""Hand-made problems, splits and predictions in ScienceQA's and LLaVA's layouts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SUBJECTS = ("natural science", "social science", "language science")


def problem(n: int, *, n_choices: int = 3, answer: int = 0) -> dict[str, Any]:
    """A problem whose subject, grade and context depend on `n`."""
    return {
        "question": f"Question {n}?",
        "choices": [f"choice {i}" for i in range(n_choices)],
        "answer": answer,
        "hint": ("", "A hint.")[n % 2],
        "image": (None, "image.png")[n // 2 % 2],
        "lecture": "",
        "solution": "",
        "subject": SUBJECTS[n % 3],
        "grade": f"grade{n % 12 + 1}",
    }


def answer(id: str, text: str, *, image: bool = False) -> dict[str, Any]:
    """An answer as model_vqa_science.py writes it."""
    prompt = "Which one?" + "\n<image>" * image
    return {"question_id": id, "prompt": prompt, "text": text, "answer_id": "x", "model_id": "m", "metadata": {}}


def write_problems(folder: Path, problems: Mapping[str, Any], splits: Mapping[str, Sequence[str]]) -> list[Any]:
    """Writes both files and returns the options that name them."""
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return ["--problems", folder / "problems.json", "--splits", folder / "pid_splits.json"]


def lines(*values: Any) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()
