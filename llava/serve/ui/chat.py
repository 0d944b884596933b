"""The tab Chat: pictures and questions, streamed answers, and what the answers look at."""

import asyncio
import json
import random
import re
import shutil
from collections.abc import AsyncIterator, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import gradio as gr

from llava.serve.settings import Settings
from llava.serve.ui.answers import finished
from llava.serve.ui.client import ApiClient, ApiFailure, visitor_of
from llava.serve.ui.conversation import Answer, Conversation, Options, Turn
from llava.serve.ui.explaining import Wanted, explanation
from llava.serve.ui.generate import generate
from llava.serve.ui.parts import alert, question_box, record

_EXAMPLES = {
    "kitchen.png": "Describe this image in detail.",
    "beach.png": "How many boats are there?",
    "zoo.png": "What is on the left?",
}
_MAX_TOKENS = 512
_HTML = re.compile(r"<(?=[A-Za-z/!?])|&(?=[#A-Za-z])")
_SEEDS = 2**31

View = dict[Any, Any]  # new values of components


class ChatTab:
    """The components of the tab, and what happens when a visitor uses them."""

    def __init__(self, settings: Settings, models: Sequence[str], folder: Path):
        """models: their names, that of the model without adapters first. folder: for the example pictures."""
        self._client, self._limits = ApiClient(settings), settings.limits
        self._html: WeakKeyDictionary[Answer, gr.HTML] = WeakKeyDictionary()
        self._conversation = gr.State(Conversation())
        self._show_answers()
        self._show_question(folder)
        self._show_options(models)
        self._show_tools()
        self._connect()

    def _show_answers(self) -> None:
        self._answers = gr.Chatbot(
            label="Conversation",
            elem_id="answers",
            height="55vh",
            editable="user",
            buttons=[],  # gradio's cannot copy answers that are components
            render_markdown=False,
            latex_delimiters=[],
            feedback_options=None,
            group_consecutive_messages=False,  # in a group with pictures, gradio's editor fails
            layout="bubble",
        )
        self._problem = gr.HTML(elem_id="problem", js_on_load=None)

    def _show_question(self, folder: Path) -> None:
        self._question = question_box(
            "Question and pictures",
            "Ask about a picture: drop it here, paste it, or add it with the button",
            "question",
            show_label=False,
            autofocus=True,
        )
        self._look = gr.HTML(elem_id="look", js_on_load=None)
        self._samples = [{"text": text, "files": [_example(folder, name)]} for name, text in _EXAMPLES.items()]
        self._examples = gr.Dataset(
            components=[self._question],
            samples=[[one] for one in self._samples],
            type="index",
            label="Examples",
            elem_id="examples",
        )

    def _show_options(self, models: Sequence[str]) -> None:
        with gr.Accordion("Options", open=False):
            self._model = gr.Dropdown(list(models), value=models[0], label="Model or adapter", elem_id="model")
            self._temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature (0: always the likeliest token)")
            self._top_p = gr.Slider(0, 1, value=1, step=0.05, label="Top p")
            self._max_tokens = gr.Slider(1, 2048, value=_MAX_TOKENS, step=1, label="Maximum tokens of an answer")

    def _show_tools(self) -> None:
        """Adds buttons. page.js does what those without an event are for."""
        with gr.Row():
            gr.Button("Photograph", elem_id="photograph", size="sm")
            gr.Button("Copy the conversation", elem_id="copy", size="sm")
            self._download = gr.Button("Download the conversation", elem_id="download", size="sm")
            gr.Button("Dark or light", elem_id="dark", size="sm")
        self._record = gr.HTML(elem_id="record", js_on_load=None, visible="hidden")
        # page.js writes into the first and presses the second: HTML below an answer has no events of gradio
        self._wanted = gr.Textbox(elem_id="wanted", visible="hidden", show_label=False)
        self._explain = gr.Button("Explain", elem_id="explain", visible="hidden")

    def _connect(self) -> None:
        options = [self._model, self._temperature, self._top_p, self._max_tokens]
        asked = [self._conversation, *options]
        shown = [self._answers, self._question, self._conversation, self._problem, self._look]
        asking: dict[str, Any] = {
            "outputs": shown,
            "concurrency_limit": self._limits.requests,
            "api_visibility": "private",
        }
        quick: dict[str, Any] = {"queue": True, "show_progress": "hidden", "api_visibility": "private"}
        self._question.submit(self.ask, [self._question, *asked], show_progress="hidden", **asking)
        self._answers.retry(self.retry, asked, show_progress="hidden", **asking)
        self._answers.edit(self.edit, asked, show_progress="hidden", **asking)
        self._question.stop(self.stop, [self._conversation], None, **quick)  # gradio's `cancels` can end in an error
        self._examples.click(self.take_example, [self._examples], [self._question], **quick)
        self._answers.undo(self.undo, [self._conversation], shown, **quick)
        self._answers.clear(self.clear, [self._conversation], shown, **quick)
        self._download.click(self.download, [self._conversation], [self._record, self._problem], **quick)
        self._explain.click(
            self.explain,
            [self._wanted, self._conversation],
            [self._look, self._problem],
            concurrency_limit=self._limits.explanations,
            show_progress="minimal",
            api_visibility="private",
        )

    def take_example(self, number: int) -> Any:
        """Writes an example where questions are written."""
        value: Any = self._samples[number]
        return gr.MultimodalTextbox(value=value)

    async def ask(
        self, request: gr.Request, question: dict[str, Any], conversation: Conversation, *options: Any
    ) -> AsyncIterator[View]:
        """Answers a new question."""
        text, pictures = question["text"].strip(), tuple(map(Path, question["files"]))
        if not text:
            yield {self._problem: alert("write a question first")}
            return
        conversation.stop()
        conversation.turns.append(Turn(text=text, pictures=pictures))
        yield {self._question: gr.MultimodalTextbox(value=None)}
        async for view in self._answered(conversation, options, request):
            yield view

    async def retry(
        self, event: gr.RetryData, request: gr.Request, conversation: Conversation, *options: Any
    ) -> AsyncIterator[View]:
        """Answers a question again, without what came after it."""
        conversation.stop()
        del conversation.turns[_turn(event.index, conversation) + 1 :]
        async for view in self._answered(conversation, options, request):
            yield view

    async def edit(
        self, event: gr.EditData, request: gr.Request, conversation: Conversation, *options: Any
    ) -> AsyncIterator[View]:
        """Answers a question that has been changed, without what came after it."""
        text = str(event.value).strip()
        if not text:
            yield self._view(conversation) | {self._problem: alert("write a question first")}
            return
        conversation.stop()
        number = _turn(event.index, conversation)
        del conversation.turns[number + 1 :]
        conversation.turns[number].text = text
        async for view in self._answered(conversation, options, request):
            yield view

    async def _answered(
        self, conversation: Conversation, options: tuple[Any, ...], request: gr.Request
    ) -> AsyncIterator[View]:
        """Answers the last turn. If that fails, its question goes back to where it was written."""
        turn = conversation.turns[-1]
        turn.answer = Answer(options=_options(*options))
        yield self._view(conversation) | {
            self._question: gr.MultimodalTextbox(submit_btn=False, stop_btn=True),
            self._problem: "",
            self._look: "",
        }
        try:
            messages = await asyncio.to_thread(conversation.messages, len(conversation.turns) - 1)
            async for _ in generate(self._client, visitor_of(request), messages, turn.answer):
                if turn in conversation.turns:  # not taken back or cleared meanwhile
                    yield self._view(conversation)
        except ApiFailure as error:
            conversation.forget(turn)
            yield self._view(conversation) | {self._question: _to_write(turn), self._problem: alert(error)}
            return
        if turn not in conversation.turns:
            return
        if turn.answer.text or not turn.answer.stop.is_set():
            yield {self._question: gr.MultimodalTextbox(submit_btn=True, stop_btn=False)}
        else:  # stopped before there was anything of it
            conversation.forget(turn)
            yield self._view(conversation) | {self._question: _to_write(turn)}

    async def stop(self, conversation: Conversation) -> None:
        """Ends the answer that grows; `_answered` then shows what there is of it."""
        conversation.stop()

    async def undo(self, conversation: Conversation) -> View:
        """Takes the last turn back, to write it anew."""
        if not conversation.turns:
            return {self._problem: ""}
        conversation.stop()
        turn = conversation.turns.pop()
        return self._view(conversation) | {self._question: _to_write(turn), self._problem: "", self._look: ""}

    async def clear(self, conversation: Conversation) -> View:
        """Begins a new conversation."""
        conversation.stop()
        conversation.turns.clear()
        ready = gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
        return self._view(Conversation()) | {self._question: ready, self._problem: "", self._look: ""}

    def download(self, conversation: Conversation) -> View:
        """Gives the conversation to page.js, which saves it as a file."""
        try:
            text = json.dumps({"messages": conversation.record()}, ensure_ascii=False, indent=1)
        except ApiFailure as error:
            return {self._problem: alert(error)}
        return {self._record: record(text, "llava-chat", "json"), self._problem: ""}

    async def explain(self, request: gr.Request, wanted: str, conversation: Conversation) -> View:
        """Shows what the words of an answer look at. wanted: see `Wanted`."""
        try:
            place = Wanted.read(wanted)
            turn = place.turn(conversation)
            assert turn.answer
            messages = await asyncio.to_thread(conversation.messages, place.number)
            body = turn.answer.options.body() | {"max_tokens": max(1, len(turn.answer.tokens)), "messages": messages}
            found = await self._client.explain(visitor_of(request), body)
        except ApiFailure as error:
            return {self._problem: alert(error)}
        pictures = [path for one in conversation.turns[: place.number + 1] for path in one.pictures]
        return {self._look: explanation(found, turn, pictures, place), self._problem: ""}

    def _view(self, conversation: Conversation) -> View:
        """Shows a conversation."""
        shown: list[Any] = []
        for number, turn in enumerate(conversation.turns):
            for i, path in enumerate(turn.pictures):
                shown.append({"role": "user", "content": {"path": str(path), "alt_text": f"Picture {i + 1}"}})
            shown.append({"role": "user", "content": [_text(turn.text)]})
            if turn.answer:
                shown.append({"role": "assistant", "content": [self._shown(turn.answer, number)]})
        return {self._answers: shown, self._conversation: conversation}

    def _shown(self, answer: Answer, number: int) -> Any:
        if not answer.is_finished:
            return _text(answer.text)
        if answer not in self._html:  # once, and not with each token of the next answer
            self._html[answer] = gr.HTML(finished(answer, number), js_on_load=None, render=False)
        return self._html[answer]


def _text(text: str) -> dict[str, str]:
    """Text as text: gradio shows what looks like a tag or an entity as HTML. page.js undoes it for whoever edits it."""
    return {"type": "text", "text": _HTML.sub(lambda found: escape(found[0]), text)}


def _example(folder: Path, name: str) -> str:
    target = folder / "examples" / name
    target.parent.mkdir(exist_ok=True)
    with resources.as_file(resources.files("llava.serve.ui") / "pictures" / name) as source:
        shutil.copyfile(source, target)
    return str(target)


def _options(model: str, temperature: float, top_p: float, max_tokens: float) -> Options:
    return Options(
        model=model,
        temperature=temperature,
        top_p=top_p,
        max_tokens=int(max_tokens),
        seed=random.randrange(_SEEDS),
    )


def _turn(index: Any, conversation: Conversation) -> int:
    """Returns the number of the turn to which a message belongs. Each picture is a message, as `_view` shows them."""
    left = int(index[0] if isinstance(index, list | tuple) else index)
    for number, turn in enumerate(conversation.turns):
        left -= len(turn.pictures) + 1 + bool(turn.answer)
        if left < 0:
            return number
    raise gr.Error("this message is no longer there; load the page again")


def _to_write(turn: Turn) -> Any:
    value: dict[str, Any] = {"text": turn.text, "files": [str(path) for path in turn.pictures]}
    return gr.MultimodalTextbox(value=value, submit_btn=True, stop_btn=False)
