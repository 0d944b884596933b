"""The service behind the routes: turns requests of clients into engine requests."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llava.assistant import Assistant
from llava.engine.adapters import Variant
from llava.engine.reply import Output
from llava.engine.sampling_params import SamplingParams
from llava.errors import CheckpointError, ConfigError, ContextError, ImageError, LlavaError, PromptError
from llava.preprocess.image import Preprocessed
from llava.preprocess.inputs import ModelInput
from llava.preprocess.tokenizer import Tokenizer
from llava.serve import explain
from llava.serve.engine_thread import EngineThread, use_threads
from llava.serve.errors import ApiError
from llava.serve.fetch import MediaFetcher
from llava.serve.generation import Choice, Generation, Origin
from llava.serve.media import read_picture
from llava.serve.messages import picture_urls, texts, with_pictures
from llava.serve.metrics import Metrics
from llava.serve.pictures import PicturePool, PictureSettings
from llava.serve.responses import check_size
from llava.serve.sampling import sampling_params, with_own_seed
from llava.serve.schema import ChatRequest, CompletionRequest, ExplainRequest, Message, Sampling, TokenizeRequest
from llava.serve.settings import Settings
from llava.serve.structured import Grammars
from llava.serve.text import TextLimit
from llava.serve.waiting import all_of, within

log = logging.getLogger(__name__)

_FETCHES = 16  # pictures that are fetched at the same time
_DEFAULT_COMPLETION = 16  # tokens, as in OpenAI's API


@dataclass(frozen=True, kw_only=True)
class Client:
    """Whose request it is."""

    key: bytes  # API key, or b""
    request_id: str
    arrived: float  # `time.perf_counter` timestamp
    span: Any = None  # see `Origin`

    @property
    def salt(self) -> bytes:
        """Separates the cached prompts of different keys, so that the time to an answer tells nothing about others'."""
        return hashlib.sha256(self.key).digest() if self.key else b""


@contextmanager
def _about_prompt() -> Iterator[None]:
    """Errors are about the parameter prompt."""
    try:
        yield
    except PromptError as error:
        raise client_error(error, "prompt") from None


class Service:
    """Answers the requests for one model and its adapters."""

    def __init__(self, assistant: Assistant, settings: Settings, metrics: Metrics):
        self.assistant, self.settings, self.metrics = assistant, settings, metrics
        self.limits, name = settings.limits, settings.name
        self._fetcher = MediaFetcher(settings.media_hosts, settings.limits) if settings.media_hosts else None
        self._fetching = ThreadPoolExecutor(_FETCHES, "fetch")  # others never wait for a slow host
        if name in assistant.adapters:
            raise ConfigError(f"the model and an adapter are both named {name}; set another --served-model-name")
        self.adapters: dict[str, str | None] = {name: None} | {one: one for one in assistant.adapters}
        self.created = int(time.time())
        self._engine: EngineThread | None = None
        self._n_threads: int | None = None  # before this server changed it
        self._pools: dict[PictureSettings, PicturePool] = {}
        self._n_active = 0  # choices
        self._n_explained = 0  # explanations, until their maps are computed
        variants = {one: self._variant(one) for one in self.adapters.values()}
        self._text_limits = {
            name: TextLimit(one.preprocessor.tokenizer, one.model.config.decoder.max_seq)
            for name, one in variants.items()
        }

    async def start(self) -> None:
        """Starts the engine and the processes that read pictures."""
        self._engine = EngineThread(self.assistant.engine, asyncio.get_running_loop())
        if self.assistant.device.type == "cpu":
            self._n_threads = use_threads(self.settings.threads)
        self._engine.start()
        self.metrics.attach(self.assistant.engine)
        for adapter in self.adapters.values():
            if (settings := self._picture_settings(adapter)) and settings not in self._pools:
                self._pools[settings] = PicturePool(settings, self.limits)
        try:
            await asyncio.gather(*(pool.start() for pool in self._pools.values()))
        except BaseException:  # also if it is cancelled
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stops the processes and the engine."""
        self.stop_pictures()
        self._fetching.shutdown(wait=False, cancel_futures=True)
        if self._engine:
            await asyncio.to_thread(self._engine.stop)
        if self._n_threads:
            use_threads(self._n_threads)

    def stop_pictures(self) -> None:
        """Kills the processes that read pictures, from any thread or signal handler."""
        for pool in self._pools.values():
            pool.stop()

    @property
    def is_alive(self) -> bool:
        """Whether requests are computed."""
        return self._engine is not None and self._engine.is_alive

    def adapter(self, model: str) -> str | None:
        """Returns the adapter behind a model's name. Raises ApiError if there is no such model."""
        if model not in self.adapters:
            message = f"the model {model[:100]!r} does not exist; GET /v1/models lists those that do"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.adapters[model]

    def tokenizer(self, model: str) -> Tokenizer:
        """Returns the tokenizer of a model. Raises ApiError if there is no such model."""
        return self._variant(self.adapter(model)).preprocessor.tokenizer

    def _variant(self, adapter: str | None) -> Variant:
        return self.assistant.engine.inputs.variant(adapter)

    @contextmanager
    def _admitted(self, n: int) -> Iterator[None]:
        """Counts `n` choices as active until they end. Raises ApiError if there are too many."""
        if n > self.limits.requests:
            message = f"the request has {n} choices; expected at most {self.limits.requests}"
            raise ApiError(400, message, param="n")
        if self._n_active + n > self.limits.requests:
            raise _busy()
        self._n_active += n
        try:
            yield
        except BaseException:
            self._n_active -= n
            raise

    def _ended(self, choices: Sequence[Choice]) -> None:
        self._n_active -= len(choices)

    def _left(self, client: Client) -> float:
        """Returns the seconds that a request has left."""
        return client.arrived + self.limits.request_s - time.perf_counter()

    async def chat(self, request: ChatRequest, client: Client) -> Generation:
        """Starts the choices of a chat. Raises LlavaError."""
        request.check(self.limits)
        with self._admitted(request.n or 1):
            choices = await within(self._left(client), self._chat_choices(request))
            return await self._start(choices, self.adapter(request.model), client)

    async def _chat_choices(self, request: ChatRequest) -> list[Choice]:
        adapter = self.adapter(request.model)
        params = self._params(request, adapter, max_new_tokens=request.max_new_tokens)
        if request.logprobs:
            params = replace(params, logprobs=max(1, request.top_logprobs or 0))
        input = await self._conversation(request.messages, adapter)
        grammars = await asyncio.to_thread(self._masks, request, adapter)
        return [
            Choice(input=input, params=replace(with_own_seed(params, i), logits_mask=mask))
            for i, mask in enumerate(grammars)
        ]

    async def complete(self, request: CompletionRequest, client: Client) -> Generation:
        """Starts the choices of completions: those of the first prompt come first. Raises LlavaError."""
        request.check(self.limits)
        with self._admitted((request.n or 1) * len(request.prompts)), _about_prompt():
            choices = await within(self._left(client), self._completion_choices(request))
            return await self._start(choices, self.adapter(request.model), client)

    async def _completion_choices(self, request: CompletionRequest) -> list[Choice]:
        adapter = self.adapter(request.model)
        max_tokens = _DEFAULT_COMPLETION if request.max_tokens is None else request.max_tokens
        params = replace(self._params(request, adapter, max_new_tokens=max_tokens), strip=False)
        if request.logprobs is not None:
            n = max(1, request.logprobs)
            params = replace(params, logprobs=n, prompt_logprobs=n if request.echo else 0)
        inputs = await asyncio.to_thread(self._prompts, request.prompts, adapter)
        n = request.n or 1
        return [Choice(input=input, params=with_own_seed(params, i)) for input in inputs for i in range(n)]

    async def explain(self, request: ExplainRequest, client: Client) -> Generation:
        """Starts a chat whose attention is captured. Raises LlavaError."""
        request.check(self.limits)
        adapter = self.adapter(request.model)
        with self._admitted(1):
            (choice,) = await within(self._left(client), self._chat_choices(request))
            capture = explain.capture(request, choice.input, self._variant(adapter), self.limits)
            return await self._start([replace(choice, capture=capture)], adapter, client)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Counts an explanation until its maps are computed. Raises ApiError if there are too many."""
        if self._n_explained >= self.limits.explanations:
            raise _busy()
        self._n_explained += 1
        try:
            yield
        finally:
            self._n_explained -= 1

    def explanation(self, request: ExplainRequest, choice: Choice, last: Output) -> dict[str, Any]:
        """Returns what is known about a finished reply."""
        return explain.explanation(request, choice.input, self._variant(self.adapter(request.model)), last)

    async def tokenize(self, request: TokenizeRequest, client: Client) -> dict[str, Any]:
        """Returns the ids of a prompt or a conversation, as the model gets them. Raises LlavaError."""
        adapter = self.adapter(request.model) if request.model is not None else None
        if (request.prompt is None) == (request.messages is None):
            raise ApiError(400, "expected either prompt or messages", param="prompt")
        with self._admitted(1):
            if request.messages is not None:
                input = await within(self._left(client), self._conversation(request.messages, adapter))
            else:
                (input,) = await asyncio.to_thread(self._prompts, [request.prompt or ""], adapter)
        self._n_active -= 1
        ids = input.ids.tolist()
        preprocessor = self._variant(adapter).preprocessor
        if request.prompt is not None and not request.add_special_tokens and ids[:1] == [preprocessor.tokenizer.bos_id]:
            ids = ids[1:]
        return {"tokens": ids, "count": len(ids), "max_model_len": preprocessor.config.decoder.max_seq}

    async def _start(self, choices: Sequence[Choice], adapter: str | None, client: Client) -> Generation:
        assert self._engine
        check_size(choices, self._variant(adapter).model.config.decoder.max_seq, self.limits)
        origin = Origin(
            adapter=adapter,
            salt=client.salt,
            arrived=client.arrived,
            prepare_s=time.perf_counter() - client.arrived,
            span=client.span,
        )
        generation = Generation(
            self._engine,
            choices,
            origin,
            self.metrics,
            deadline=client.arrived + self.limits.request_s,
            on_end=lambda: self._ended(choices),
        )
        await generation.start()
        if self.settings.log_prompts:
            prompts = [one.input.prompt for one in choices]
            log.info("prompts", extra={"request_id": client.request_id, "prompts": prompts})
        return generation

    async def _conversation(self, messages: Sequence[Message], adapter: str | None) -> ModelInput:
        """Prepares a conversation with its pictures. The text is literal."""
        if messages[-1].role != "user":
            raise ApiError(400, "messages: the last one has to be from the user", param="messages")
        self._text_limits[adapter].check(texts(messages))
        urls = picture_urls(messages)
        if len(urls) > self.limits.pictures:
            message = f"the messages have {len(urls)} pictures; expected at most {self.limits.pictures}"
            raise ApiError(400, message, param="messages")
        if urls and self._picture_settings(adapter) is None:
            raise ApiError(400, "this model has no vision tower; leave the pictures out", param="messages")
        plain = with_pictures(messages, await all_of(self._read(url, adapter) for url in urls))
        return await asyncio.to_thread(self.assistant.engine.inputs.prepare, plain, adapter=adapter, literal=True)

    async def _read(self, url: str, adapter: str | None) -> Preprocessed:
        settings = self._picture_settings(adapter)
        assert settings
        loop, threads = asyncio.get_running_loop(), None if url.startswith("data:") else self._fetching
        contents = await loop.run_in_executor(threads, read_picture, url, self.limits, self._fetcher)
        started = time.perf_counter()
        read = await self._pools[settings].read(contents)
        self.metrics.picture(time.perf_counter() - started)
        return read

    def _picture_settings(self, adapter: str | None) -> PictureSettings | None:
        preprocessor = self._variant(adapter).preprocessor
        image, vision = preprocessor.config.image, preprocessor.config.vision
        if image is None or vision is None:
            return None
        return PictureSettings(config=image, patches=vision.grid, options=preprocessor.pictures)

    @_about_prompt()
    def _prompts(self, prompts: Sequence[str] | Sequence[Sequence[int]], adapter: str | None) -> list[ModelInput]:
        """Prepares prompts: texts, which are literal, or token ids."""
        preprocessor = self._variant(adapter).preprocessor
        for one in prompts:
            self._text_limits[adapter].check([one] if isinstance(one, str) else ())
        return [
            preprocessor.prepare(one, literal=True) if isinstance(one, str) else preprocessor.prepare_ids(one)
            for one in prompts
        ]

    def _params(self, request: Sampling, adapter: str | None, *, max_new_tokens: int) -> SamplingParams:
        vocab_size = self._variant(adapter).model.config.decoder.vocab_size
        return sampling_params(request, vocab_size=vocab_size, max_new_tokens=max_new_tokens)

    def _masks(self, request: ChatRequest, adapter: str | None) -> list[Any]:
        """Returns a mask for each choice, or None for those without a response format."""
        format, n = request.response_format, request.n or 1
        if format is None or format.type == "text":
            return [None] * n
        return list(self._grammars[adapter].masks(format, self.limits, n))

    @cached_property
    def _grammars(self) -> Mapping[str | None, Grammars]:
        """By adapter. Reading a vocabulary takes a second, so it is done for the first request that needs one."""
        variants = {name: self._variant(name) for name in self.adapters.values()}
        return {
            name: Grammars(one.preprocessor.tokenizer, one.model.config.decoder.vocab_size)
            for name, one in variants.items()
        }


def _busy() -> ApiError:
    return ApiError(429, "the server is busy; try again later", code="queue_full")


def client_error(error: LlavaError, param: str = "messages") -> ApiError:
    """Returns what a client is told about an error. param: where the prompt is."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error.__cause__, ApiError):  # raised by a mask, in a step of the engine
        return error.__cause__
    if isinstance(error, ContextError):
        return ApiError(400, str(error), param=param, code="context_length_exceeded")
    if isinstance(error, PromptError | ImageError | CheckpointError):
        return ApiError(400, str(error), param=param)
    log.error("a request failed", extra={"reason": str(error)})
    return ApiError(500, "the server failed to answer this request")  # the reason may have words of a library
