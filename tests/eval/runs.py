"""Writes folders as `llava eval run` does, with the scores that a test wants."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Figures = Mapping[str, float | None]


def write_run(folder: Path, zoo: list[str], *, name: str = "mine", **model: Any) -> Path:
    """Writes the record of a run without scores."""
    folder.mkdir(parents=True)
    record = {"schema": "llava-eval-run/1", "model": {"name": name, "path": "/m", "base": None, "zoo": zoo} | model}
    others: dict[str, Any] = {"settings": {}, "versions": {"llava": "1"}, "machine": {}}
    (folder / "run.json").write_text(json.dumps(record | others))
    return folder


def write_scores(
    run: Path, task: str, value: float | None, figures: Figures | None = None, *, split: str | None = None, n: int = 10
) -> Path:
    """Writes the scores of a task. Returns the file."""
    folder = run / task
    folder.mkdir()
    scores = {"task": task, "metric": "share (%)", "value": value, "n": n, "unanswered": 2, "items": {}}
    (folder / "scores.json").write_text(json.dumps(scores | {"figures": dict(figures or {})}))
    if split:
        (folder / "settings.json").write_text(json.dumps({"--split": split}))
    return folder / "scores.json"
