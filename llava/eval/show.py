"""The answers of a run as one HTML file that loads nothing: questions, pictures, answers and verdicts."""

import base64
import hashlib
import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

from llava.config import PictureOptions
from llava.errors import ImageError
from llava.eval.markdown import figure
from llava.eval.questions import DIGEST
from llava.eval.report import plain
from llava.eval.runs import Asked, Run, read_asked
from llava.eval.task import Task
from llava.eval.tasks import TASKS
from llava.preprocess.image import read_picture

_LONGEST_SIDE = 512  # pixels
_QUALITY = 80  # of JPEG
_NO_ANSWER = "no answer"
_PART = "The picture is part of the benchmark's file, and not of this run."
_LEFT_OUT = "The picture is left out, as this file has as many megabytes of pictures as it was made with."
# nothing is loaded, and only this style and this script apply
_POLICY = (
    "default-src 'none'; img-src data:; style-src '{style}'; script-src '{script}'; base-uri 'none'; form-action 'none'"
)


class Album:
    """Pictures as data URLs, each once, until they have so many bytes in all. The first ones that are added count."""

    def __init__(self, max_bytes: int, options: PictureOptions):
        self.max_bytes, self.options = max_bytes, options
        self.urls: list[str] = []
        self.n_bytes = 0  # of all of them
        self.n_left_out = 0
        self._known: dict[str, int | str] = {}

    def add(self, image: str) -> int | str:
        """Returns the number of a picture, or why it is not shown. image: its path."""
        if image not in self._known:
            self._known[image] = self._read(image)
        return self._known[image]

    def _read(self, image: str) -> int | str:
        if image.startswith(DIGEST):
            return _PART
        if self.n_left_out:  # no later picture takes the room that is left, so that the shown ones are the first
            self.n_left_out += 1
            return _LEFT_OUT
        try:
            url = self._url(image)
        except ImageError as error:
            return f"The picture cannot be shown: {error}"
        if self.n_bytes + len(url) > self.max_bytes:
            self.n_left_out += 1
            return _LEFT_OUT
        self.n_bytes += len(url)
        self.urls.append(url)
        return len(self.urls) - 1

    def _url(self, image: str) -> str:
        small, file = read_picture(Path(image), self.options).image, io.BytesIO()
        small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        small.save(file, "JPEG", quality=_QUALITY)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def page(run: Run, *, max_bytes: int) -> tuple[str, int]:
    """Returns the page, and how many pictures are left out of it, because it has so many bytes of pictures already.

    Raises DataError if the run is damaged.
    """
    album = Album(max_bytes, PictureOptions(exif=run.settings.get("--exif") is True))
    tasks = [_task(run, TASKS[name], album) for name in run.scores]
    data = {"name": run.name, "tasks": tasks, "pictures": album.urls}
    style, script = _file("page.css"), _file("page.js")
    policy = _POLICY.format(style=_digest(style), script=_digest(script))
    text = _file("page.html")
    for mark, part in {"POLICY": policy, "STYLE": style, "SCRIPT": script, "DATA": _embedded(data)}.items():
        text = text.replace(mark, part, 1)  # the data come last, as they may contain a mark
    return text, album.n_left_out


def _task(run: Run, task: Task, album: Album) -> dict[str, Any]:
    scores = run.scores[task.name]
    items = {item.id: task.item_score(item.sums) for item in scores.items}
    return {
        "name": task.name,
        "metric": scores.metric,
        "score": figure(scores.value),
        "questions": [_question(one, task, items, album) for one in read_asked(run, task.name)],
    }


def _question(one: Asked, task: Task, items: dict[str, float | None], album: Album) -> dict[str, Any]:
    score = items.get(task.item_of(one.id))
    verdict = _NO_ANSWER if one.text is None else task.verdict(score)
    return {
        "id": one.id,
        "prompt": one.prompt,
        "images": [album.add(image) for image in one.images],
        "answer": "" if one.answer is None else plain(one.answer),
        "text": one.text,
        "groups": list(one.groups),
        "verdict": verdict,
        "score": figure(score) if verdict in ("scored", "partly right") else None,
        "reviews": list(one.reviews),
    }


def _file(name: str) -> str:
    return (resources.files("llava.eval") / "page" / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    """Returns the digest by which a policy allows an element with this content."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _embedded(data: Any) -> str:
    """Returns JSON that cannot end the script element which it is in. Lone surrogates stay escaped."""
    return json.dumps(data).replace("<", "\\u003c")
