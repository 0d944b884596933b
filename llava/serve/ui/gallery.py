"""The tab Gallery: one question about many pictures, with the answers in a table."""

import asyncio
import io
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from llava.answers import Answer, formulas, write_csv
from llava.config import IMAGE_SUFFIXES
from llava.errors import counted
from llava.serve.settings import Settings
from llava.serve.ui.client import ApiClient, ApiFailure, Visitor, visitor_of
from llava.serve.ui.conversation import Conversation, Turn
from llava.serve.ui.parts import alert, question_box, record
from llava.serve.ui.paths import FILE_OF_VISITOR

_AT_ONCE = 16  # requests of a table; the engine computes them together, and leaves room for other visitors
_MAX_PICTURES = 500
_MAX_TOKENS = 128
_SHOW_S = 0.5  # seconds between two views of a table

View = dict[Any, Any]  # new values of components


@dataclass(kw_only=True, eq=False)
class Table:
    """The pictures of one visitor, and what has been answered about them so far."""

    pictures: list[Path] = field(default_factory=list)
    rows: dict[int, Answer] = field(default_factory=dict)  # by the index of the picture
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def answers(self) -> list[Answer]:
        """The answers so far, in the order of the pictures."""
        return [self.rows[i] for i in sorted(self.rows)]


class GalleryTab:
    """The components of the tab, and what happens when a visitor uses them."""

    def __init__(self, settings: Settings, models: Sequence[str]):
        """models: their names, that of the model without adapters first."""
        self._client, self._limits = ApiClient(settings), settings.limits
        self._table = gr.State(Table())
        self._question = question_box(
            "Question about each picture, and the pictures",
            "Ask about each of many pictures: drop them here, or add them with the button",
            "gallery-question",
        )
        with gr.Accordion("Options", open=False):
            self._model = gr.Dropdown(list(models), value=models[0], label="Model or adapter")
            self._max_tokens = gr.Slider(1, 2048, value=_MAX_TOKENS, step=1, label="Maximum tokens of an answer")
        with gr.Row():
            self._folder = gr.UploadButton("Add a folder", file_count="directory", elem_id="gallery-folder", size="sm")
            self._csv = gr.Button("Download CSV", elem_id="gallery-csv", size="sm")
            self._json = gr.Button("Download JSON", elem_id="gallery-json", size="sm")
        self._problem = gr.HTML(elem_id="gallery-problem", js_on_load=None)
        self._shown = gr.HTML(elem_id="gallery-table", js_on_load=None)
        self._record = gr.HTML(elem_id="gallery-record", js_on_load=None, visible="hidden")
        self._connect()

    def _connect(self) -> None:
        quick: dict[str, Any] = {"queue": True, "show_progress": "hidden", "api_visibility": "private"}
        self._folder.upload(self.add, [self._question, self._folder], [self._question, self._problem], **quick)
        self._question.submit(
            self.ask,
            [self._question, self._table, self._model, self._max_tokens],
            [self._question, self._table, self._shown, self._problem],
            concurrency_limit=self._limits.requests,
            show_progress="hidden",
            api_visibility="private",
        )
        self._question.stop(self.stop, [self._table], None, **quick)
        self._csv.click(self.save_csv, [self._table], [self._record, self._problem], **quick)
        self._json.click(self.save_json, [self._table], [self._record, self._problem], **quick)

    def add(self, question: dict[str, Any], folder: list[str]) -> View:
        """Adds the pictures of a folder, by name, to those that are there."""
        pictures = sorted(
            (one for one in folder if one.lower().endswith(IMAGE_SUFFIXES)), key=lambda one: Path(one).name
        )
        n_others = len(folder) - len(pictures)
        left_out = f"{counted(n_others, 'file')} of other types left out" if n_others else ""
        if not pictures:
            return {self._problem: alert(f"the folder has no pictures (*{', *'.join(IMAGE_SUFFIXES)})")}
        value = {**question, "files": [*question["files"], *pictures]}
        return {self._question: gr.MultimodalTextbox(value=value), self._problem: _note(left_out)}

    async def ask(
        self, request: gr.Request, question: dict[str, Any], table: Table, model: str, max_tokens: float
    ) -> AsyncIterator[View]:
        """Asks about each picture, and shows the answers as they come."""
        text, pictures = question["text"].strip(), list(map(Path, question["files"]))
        if problem := _what_is_missing(len(pictures), text):
            yield {self._problem: alert(problem)}
            return
        table.stop.set()  # an earlier run
        table.pictures, table.rows, table.stop = pictures, {}, asyncio.Event()
        body = {"model": model, "temperature": 0, "max_tokens": int(max_tokens)}
        asking = gr.MultimodalTextbox(submit_btn=False, stop_btn=True)
        yield {self._question: asking, self._table: table, self._shown: _html(table), self._problem: ""}
        shown = time.monotonic()
        async with aclosing(self._answers(visitor_of(request), table, text, body)) as answers:
            async for i, answer in answers:
                table.rows[i] = answer
                if time.monotonic() - shown > _SHOW_S * (1 + len(table.pictures) // 100):
                    shown = time.monotonic()
                    yield {self._shown: _html(table)}
        done = gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
        yield {self._question: done, self._shown: _html(table), self._problem: _note(formulas(table.answers()))}

    async def _answers(
        self, visitor: Visitor, table: Table, question: str, body: dict[str, Any]
    ) -> AsyncGenerator[tuple[int, Answer], None]:
        """Yields the index of each picture with its answer, as they come, until the table is stopped."""
        waiting = list(enumerate(table.pictures))[::-1]
        stopping = asyncio.ensure_future(table.stop.wait())
        asked: set[asyncio.Task[tuple[int, Answer]]] = set()
        try:
            while (waiting or asked) and not stopping.done():
                while waiting and len(asked) < min(_AT_ONCE, self._limits.requests):
                    i, path = waiting.pop()
                    asked.add(asyncio.create_task(self._answer(visitor, i, path, question, body)))
                await asyncio.wait({*asked, stopping}, return_when=asyncio.FIRST_COMPLETED)
                for ended in [one for one in asked if one.done()]:
                    asked.discard(ended)
                    yield ended.result()
        finally:
            for task in (*asked, stopping):
                task.cancel()
            await asyncio.gather(*asked, stopping, return_exceptions=True)

    async def _answer(
        self, visitor: Visitor, i: int, path: Path, question: str, body: dict[str, Any]
    ) -> tuple[int, Answer]:
        started = time.perf_counter()
        try:
            asked = Conversation(turns=[Turn(text=question, pictures=(path,))])
            messages = await asyncio.to_thread(asked.messages, 0)
            found = await self._client.answer(visitor, body | {"messages": messages})
        except ApiFailure as error:
            return i, Answer(picture=path.name, question=question, finish_reason="error", error=str(error))
        (choice,) = found["choices"]
        return i, Answer(
            picture=path.name,
            question=question,
            answer=choice["message"]["content"],
            tokens=found["usage"]["completion_tokens"],
            finish_reason=choice["finish_reason"],
            seconds=round(time.perf_counter() - started, 3),
        )

    async def stop(self, table: Table) -> None:
        """Ends the run; the answers so far stay."""
        table.stop.set()

    def save_csv(self, table: Table) -> View:
        """Gives the table to page.js as CSV, which saves it as a file."""
        text = io.StringIO(newline="")
        write_csv(table.answers(), text)
        return self._saved(table, text.getvalue(), "csv")

    def save_json(self, table: Table) -> View:
        """The same as JSON."""
        return self._saved(table, json.dumps([*map(asdict, table.answers())], ensure_ascii=False, indent=1), "json")

    def _saved(self, table: Table, text: str, kind: str) -> View:
        if not table.rows:
            return {self._problem: alert("there are no answers yet")}
        return {self._record: record(text, "llava-gallery", kind), self._problem: _note(formulas(table.answers()))}


def _what_is_missing(n_pictures: int, question: str) -> str:
    if not n_pictures:
        return "add pictures first"
    if n_pictures > _MAX_PICTURES:
        return f"found {n_pictures:,} pictures, at most {_MAX_PICTURES} fit; use llava ask FOLDER QUESTION --csv FILE"
    return "" if question else "write a question first"


def _html(table: Table) -> str:
    """The table, with a line that says how far it is."""
    n, done = len(table.pictures), len(table.rows)
    failed = sum(row.error is not None for row in table.rows.values())
    state = f"{done} of {n} done" + (f", {failed} of them with an error" if failed else "")
    rows = "".join(_row(i, path, table.rows.get(i)) for i, path in enumerate(table.pictures))
    head = '<tr><th scope="col">Picture</th><th scope="col">Name</th><th scope="col">Answer</th></tr>'
    return f'<p role="status">{state}</p><table><thead>{head}</thead><tbody>{rows}</tbody></table>'


def _row(i: int, path: Path, answer: Answer | None) -> str:
    name = escape(path.name)
    picture = f'<img src="{FILE_OF_VISITOR + quote(str(path))}" alt="" loading="lazy" decoding="async">'
    if answer is None:
        text = "…"
    elif answer.error is not None:
        text = f'<span class="error">{escape(answer.error)}</span>'
    else:
        cut = " <em>(cut off)</em>" if answer.finish_reason == "length" else ""
        text = escape(answer.answer or "") + cut
    return f'<tr data-row="{i}"><td>{picture}</td><th scope="row">{name}</th><td>{text}</td></tr>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""
