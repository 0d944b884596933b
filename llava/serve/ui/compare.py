"""The tab Compare: the same pictures and question to two models, their answers side by side."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from llava.serve.settings import Settings
from llava.serve.ui.answers import figures, words
from llava.serve.ui.client import ApiClient, ApiFailure, Visitor, visitor_of
from llava.serve.ui.conversation import Answer, Conversation, Options, Turn
from llava.serve.ui.generate import generate
from llava.serve.ui.parts import alert, question_box

_MAX_TOKENS = 512
_SHOW_S = 0.1  # seconds between two views
_SEEDS = 2**31

View = dict[Any, Any]  # new values of components


class CompareTab:
    """The components of the tab, and what happens when a visitor uses them."""

    def __init__(self, settings: Settings, models: Sequence[str]):
        """models: their names, that of the model without adapters first."""
        self._client = ApiClient(settings)
        if len(models) == 1:
            gr.Markdown(
                "The server has one model. Started with `--adapter NAME=PATH`, it has the model and its adapters to "
                "compare."
            )
        self._running = gr.State([])  # the answers that grow
        self._question = question_box(
            "Question and pictures for both",
            "Ask both about a picture: drop it here, paste it, or add it with the button",
            "compare-question",
        )
        with gr.Accordion("Options", open=False):
            self._temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature (0: always the likeliest token)")
            self._max_tokens = gr.Slider(1, 2048, value=_MAX_TOKENS, step=1, label="Maximum tokens of an answer")
        self._problem = gr.HTML(elem_id="compare-problem", js_on_load=None)
        with gr.Row():
            sides = [self._side(models, i) for i in range(2)]
        self._models, self._answers = [side[0] for side in sides], [side[1] for side in sides]
        self._connect(settings.limits.requests)

    def _side(self, models: Sequence[str], i: int) -> tuple[Any, Any]:
        with gr.Column(min_width=280):
            name = models[min(i, len(models) - 1)]
            model = gr.Dropdown(list(models), value=name, label=("First", "Second")[i], elem_id=f"compare-model-{i}")
            return model, gr.HTML(elem_id=f"compare-answer-{i}", elem_classes="compared", js_on_load=None)

    def _connect(self, n_requests: int) -> None:
        self._question.submit(
            self.ask,
            [self._question, self._running, self._temperature, self._max_tokens, *self._models],
            [self._question, self._running, self._problem, *self._answers],
            concurrency_limit=n_requests,
            show_progress="hidden",
            api_visibility="private",
        )
        self._question.stop(self.stop, [self._running], None, show_progress="hidden", api_visibility="private")

    async def ask(
        self,
        request: gr.Request,
        question: dict[str, Any],
        running: list[Answer],
        temperature: float,
        max_tokens: float,
        *models: str,
    ) -> AsyncIterator[View]:
        """Asks both models, and shows both answers as they grow."""
        turn = Turn(text=question["text"].strip(), pictures=tuple(map(Path, question["files"])))
        if not turn.text:
            yield {self._problem: alert("write a question first")}
            return
        seed = random.randrange(_SEEDS)  # the same for both
        running[:] = [
            Answer(
                options=Options(model=model, temperature=temperature, top_p=1, max_tokens=int(max_tokens), seed=seed)
            )
            for model in models
        ]
        try:
            messages = await asyncio.to_thread(Conversation(turns=[turn]).messages, 0)
        except ApiFailure as error:
            yield {self._problem: alert(error)}
            return
        yield {
            self._running: running,
            self._problem: "",
            self._question: gr.MultimodalTextbox(submit_btn=False, stop_btn=True),
        }
        growing = [asyncio.create_task(_grown(self._client, visitor_of(request), messages, one)) for one in running]
        try:
            while not all(task.done() for task in growing):
                await asyncio.wait(growing, timeout=_SHOW_S)
                yield self._view(running, growing)
        finally:
            for task in growing:
                task.cancel()
        yield self._view(running, growing) | {self._question: gr.MultimodalTextbox(submit_btn=True, stop_btn=False)}

    def _view(self, answers: Sequence[Answer], growing: Sequence[asyncio.Task[str]]) -> View:
        states = [task.result() if task.done() else "" for task in growing]
        shown = [_shown(answer, problem, i) for i, (answer, problem) in enumerate(zip(answers, states, strict=True))]
        return dict(zip(self._answers, shown, strict=True))

    async def stop(self, running: list[Answer]) -> None:
        """Ends both answers."""
        for answer in running:
            answer.stop.set()


async def _grown(client: ApiClient, visitor: Visitor, messages: list[dict[str, Any]], answer: Answer) -> str:
    """Lets an answer grow. Returns what went wrong, or ""."""
    try:
        async for _ in generate(client, visitor, messages, answer):
            pass
    except ApiFailure as error:
        return str(error)
    return ""


def _shown(answer: Answer, problem: str, side: int) -> str:
    if problem:
        return alert(problem)
    if answer.is_finished:
        return words(answer, f"compare:{side}") + figures(answer)
    return f'<p class="growing">{escape(answer.text)}</p>'
