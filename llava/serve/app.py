"""The HTTP application: routes, and how errors are answered."""

import asyncio
import logging
import secrets
import time
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

import llava
from llava.assistant import Assistant
from llava.engine.reply import Output, Reply
from llava.errors import LlavaError
from llava.serve.access import AccessMiddleware
from llava.serve.errors import ApiError
from llava.serve.generation import Generation
from llava.serve.responses import Body, ChatBodies, CompletionBodies, Envelope, encoded, events, usage
from llava.serve.schema import ChatRequest, CompletionRequest, ExplainRequest, TokenizeRequest
from llava.serve.service import Client, Service, client_error
from llava.serve.settings import Settings
from llava.serve.state import State, load_model
from llava.serve.traces import TraceMiddleware, provider
from llava.serve.ui.mount import Page
from llava.serve.ui.paths import is_page, is_upload
from llava.serve.validation import to_api_error

log = logging.getLogger(__name__)

T = TypeVar("T")
_STATUSES = {404: "this path does not exist", 405: "this path does not take this method"}


def create(
    load: Callable[[], Assistant],
    settings: Settings,
    *,
    on_ready: Callable[[], None] | None = None,
    on_failure: Callable[[LlavaError], None] | None = None,
) -> FastAPI:
    """Builds the application. It starts to load the model with its first event loop, and answers 503 until then.

    load: returns the model, in a thread. on_ready, on_failure: called after loading.
    """
    state = State(settings=settings)
    tracing = provider(settings.otlp_endpoint) if settings.otlp_endpoint else None
    page = Page(state) if settings.page else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(load_model(state, load, on_ready, on_failure))
        yield
        loading.cancel()
        with suppress(asyncio.CancelledError):
            await loading
        if page:
            await page.close()
        if state.service:
            await state.service.stop()
        if tracing:
            await asyncio.to_thread(tracing.shutdown)  # sends what it still has

    app = FastAPI(
        title="llava",
        version=llava.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,  # FastAPI's own takes one of GET and HEAD by chance
    )
    app.router.redirect_slashes = False  # the address of a redirect would come from the Host header
    app.state.llava = state
    app.openapi = partial(_schema, app, app.openapi)  # type: ignore[method-assign]
    _add_errors(app)
    _add_routes(app, state)
    if page:
        page.add_to(app)
    app.add_middleware(
        AccessMiddleware,
        access=settings.access,
        limits=settings.limits,
        metrics=state.metrics,
        is_page=is_page if page else _never,
        is_upload=is_upload if page else _never,
    )
    if tracing:
        app.add_middleware(TraceMiddleware, provider=tracing)  # the outermost one
    return app


def _never(path: str) -> bool:
    return False


def _schema(app: FastAPI, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the OpenAPI schema without the status 422, which is never answered, and with an id for each operation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GET and HEAD of one route have the same id until the loop below
        schema = build()
    for path in schema["paths"].values():
        for method, operation in path.items():
            operation["responses"].pop("422", None)
            if method == "head":
                operation["operationId"] += "_head"
    return schema


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(LlavaError)
    async def of_ours(request: Request, error: LlavaError) -> Response:
        return respond(client_error(error))

    @app.exception_handler(RequestValidationError)
    async def of_the_body(request: Request, error: RequestValidationError) -> Response:
        return respond(to_api_error(error))

    @app.exception_handler(HTTPException)
    async def of_the_framework(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, ApiError):  # raised while the body was read
            response = respond(error.__cause__)
            response.headers["Connection"] = "close"  # the rest of the body is not read
            return response
        default = "the request is malformed; expected JSON"
        response = respond(ApiError(error.status_code, _STATUSES.get(error.status_code, default)))
        response.headers.update(error.headers or {})  # Allow: the methods of this path
        return response


def respond(error: ApiError) -> Response:
    """Returns the response for an error."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def _add_routes(app: FastAPI, state: State) -> None:
    failed: dict[int | str, dict[str, Any]] = {
        status: {"description": text}
        for status, text in ((400, "Invalid request"), (401, "No valid key"), (404, "No such model"), (429, "Busy"))
    }

    @app.post("/v1/chat/completions", responses=failed)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answers a conversation, which may have pictures."""
        service, n = state.ready, body.n or 1
        generation = await connected(request, service.chat(body, client_of(request)))
        bodies = ChatBodies(
            tokenizer=service.tokenizer(body.model), logprobs=bool(body.logprobs), n_top=body.top_logprobs or 0
        )
        if body.stream:
            head = envelope("chat.completion.chunk", body.model)
            return EventStream(generation, _chat_chunks(generation, bodies, head, n, body.wants_usage))
        replies = [reply_of(last) for last in await connected(request, _last_outputs(generation, n))]
        found = (bodies.whole(i, reply) for i, reply in enumerate(replies))
        return await _whole(envelope("chat.completion", body.model), found, usage(replies, n))

    @app.post("/v1/completions", responses=failed)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continues texts or token ids."""
        service, n = state.ready, body.n or 1
        generation = await connected(request, service.complete(body, client_of(request)))
        choices = generation.choices
        bodies = CompletionBodies(tokenizer=service.tokenizer(body.model), n_top=body.logprobs, echo=bool(body.echo))
        head = envelope("text_completion", body.model)
        if body.stream:
            return EventStream(generation, _completion_chunks(generation, bodies, head, n, body.wants_usage))
        replies = [reply_of(last) for last in await connected(request, _last_outputs(generation, len(choices)))]
        pairs = zip(choices, replies, strict=True)
        found = (bodies.whole(i, choice, reply) for i, (choice, reply) in enumerate(pairs))
        return await _whole(head, found, usage(replies, n))

    @app.post("/v1/explain", responses=failed)
    async def explain(body: ExplainRequest, request: Request) -> Response:
        """Answers a conversation, and shows what each token of the answer looks at in the pictures."""
        service = state.ready
        with service.explaining():
            generation = await connected(request, service.explain(body, client_of(request)))
            last = (await connected(request, _last_outputs(generation, 1)))[0]
            head = {"id": f"explain-{secrets.token_hex(12)}", "object": "explanation", "model": body.model}
            rest = {"usage": usage([reply_of(last)], 1)}

            def content() -> bytes:
                return encoded(head | service.explanation(body, generation.choices[0], last) | rest)

            return Response(await asyncio.to_thread(content), media_type="application/json")

    @app.post("/tokenize", responses=failed)
    async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        """Returns the token ids of a prompt or a conversation."""
        return await connected(request, state.ready.tokenize(body, client_of(request)))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Lists the model and its adapters."""
        service = state.ready
        return {"object": "list", "data": [_model(service, name) for name in service.adapters]}

    @app.get("/v1/models/{model:path}", responses={404: failed[404]})
    async def model(model: str) -> dict[str, Any]:
        """Describes a model."""
        service = state.ready
        service.adapter(model)
        return _model(service, model)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        """200 while the engine lives, or the model is being loaded."""
        alive = state.error is None and (state.service is None or state.service.is_alive)
        return JSONResponse({"status": "ok" if alive else "failed"}, status_code=200 if alive else 503)

    @app.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> dict[str, str]:
        """200 while requests are accepted."""
        _ = state.ready
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Returns the version of this server."""
        return {"version": llava.__version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Returns metrics in the text format of Prometheus."""
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4")


def _model(service: Service, name: str) -> dict[str, Any]:
    config = service.assistant.engine.inputs.variant(service.adapter(name)).model.config
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "llava",
        "max_model_len": config.decoder.max_seq,
    }


def client_of(request: Request) -> Client:
    """Returns whose request it is."""
    state = request.state
    return Client(key=state.key, arrived=state.arrived, request_id=state.id, span=getattr(state, "span", None))


def envelope(object: str, model: str) -> Envelope:
    """Returns the head of a response, with a new id."""
    kind = "cmpl" if object == "text_completion" else "chatcmpl"
    return Envelope(id=f"{kind}-{secrets.token_hex(12)}", model=model, created=int(time.time()), object=object)


class EventStream(StreamingResponse):
    """A stream of a generation's chunks. The generation ends with the response, also if the client never reads it."""

    def __init__(self, generation: Generation, bodies: AsyncIterator[Body]):
        super().__init__(events(bodies), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.abort()


async def connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, which is cancelled if the client disconnects. Raises ApiError then."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client has disconnected")
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _last_outputs(generation: Generation, n: int) -> list[Output]:
    """Returns the last outputs of all choices, in order. Raises LlavaError."""
    last: dict[int, Output] = {}
    async for index, output in generation.outputs():
        if output.reply:
            last[index] = output
    return [last[index] for index in range(n)]


async def _whole(head: Envelope, choices: Iterable[Body], counts: Body) -> Response:
    """Returns a response with finished choices, which a thread builds and encodes: a large one takes seconds."""
    content = await asyncio.to_thread(head.encoded, choices, usage=counts)
    return Response(content, media_type="application/json")


def reply_of(last: Output) -> Reply:
    """Returns the reply in the last output of a choice."""
    assert last.reply
    return last.reply


async def _chat_chunks(
    generation: Generation, bodies: ChatBodies, head: Envelope, n: int, with_usage: bool
) -> AsyncIterator[Body]:
    for index in range(n):
        yield head.body([bodies.first(index)])
    replies: dict[int, Reply] = {}
    try:
        async for index, output in generation.outputs():
            if output.text or output.token_ids:
                yield head.body([bodies.chunk(index, output)])
            if output.reply:
                yield head.body([bodies.last(index, output)])
                replies[index] = output.reply
    except LlavaError as error:
        yield client_error(error).body()
        return
    if with_usage:
        yield head.body([], usage=usage(_in_order(replies), n))


async def _completion_chunks(
    generation: Generation, bodies: CompletionBodies, head: Envelope, n: int, with_usage: bool
) -> AsyncIterator[Body]:
    for index, choice in enumerate(generation.choices):
        if first := bodies.first(index, choice):
            yield head.body([first])
    replies: dict[int, Reply] = {}
    try:
        async for index, output in generation.outputs():
            yield head.body([bodies.chunk(index, generation.choices[index], output)])
            if output.reply:
                replies[index] = output.reply
    except LlavaError as error:
        yield client_error(error).body()
        return
    if with_usage:
        yield head.body([], usage=usage(_in_order(replies), n))


def _in_order(replies: Mapping[int, Reply]) -> list[Reply]:
    """Returns the replies of all choices by their index, as they have finished in another order."""
    return [replies[index] for index in sorted(replies)]
