"""Traces for OpenTelemetry: a span for each request, sent to a collector over OTLP. Needs the extra `otel`."""

from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import llava
from llava.engine.reply import Reply
from llava.errors import ConfigError


def provider(endpoint: str) -> Any:
    """Returns a tracer provider that sends spans to a collector, such as http://127.0.0.1:4318/v1/traces.

    Raises ConfigError if OpenTelemetry's packages are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"--otlp-endpoint needs {error.name}: pip install 'llava-native[otel]'") from None
    made = TracerProvider(resource=Resource.create({"service.name": "llava", "service.version": llava.__version__}))
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return made


class TraceMiddleware:
    """Makes a span of each request, as part of the client's trace if it names one. It has no texts and no keys."""

    def __init__(self, app: ASGIApp, *, provider: Any):
        self.app = app
        self._tracer = provider.get_tracer("llava")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        context = TraceContextTextMapPropagator().extract(carrier)
        with self._tracer.start_as_current_span("request", context=context, kind=SpanKind.SERVER) as span:

            async def traced(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            scope.setdefault("state", {})["span"] = span
            await self.app(scope, receive, traced)
            route = getattr(scope.get("route"), "path", "other")
            span.update_name(f"{scope['method'] if scope['method'] in ('GET', 'POST') else 'other'} {route}")
            span.set_attributes({"http.route": route, "llava.request_id": scope["state"].get("id", "")})


def describe(span: Any, reply: Reply) -> None:
    """Adds the tokens and times of a finished reply to the span of its request."""
    attributes = {
        "gen_ai.usage.input_tokens": reply.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": reply.usage.completion_tokens,
        "llava.cached_tokens": reply.usage.cached_tokens,
        "llava.prepare_s": reply.timings.prepare_s,
        "llava.queue_s": reply.timings.queue_s,
        "llava.first_token_s": reply.timings.first_token_s,
        "llava.decode_s": reply.timings.decode_s,
    }
    span.add_event("reply", attributes | {"finish_reason": reply.finish_reason})
