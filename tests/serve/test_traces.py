"""Traces: spans arrive at a collector, in the client's trace, with tokens and times and without texts."""

import http.server
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from llava.errors import ConfigError
from llava.serve.traces import provider
from tests.command import start, wait_for_output
from tests.serving import TIMEOUT_S, user

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.received.append(self.rfile.read(int(self.headers["content-length"])))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None: ...


def test_a_span_of_each_request_reaches_the_collector(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    collector.received = []  # type: ignore[attr-defined]
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_address[1]}/v1/traces"
    process = start("serve", "--port", "0", "--device", "cpu", "--otlp-endpoint", endpoint)
    with process:
        try:
            url = wait_for_output(process, "\n").split()[-1]
            body = {"model": "llava-tiny", "messages": user("A secret"), "max_tokens": 4, "temperature": 0}
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
            usage = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=TIMEOUT_S).json()[
                "usage"
            ]
            assert httpx.get(f"{url}/v1/models/none").status_code == 404
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
    collector.shutdown()
    spans = {}
    for contents in collector.received:  # type: ignore[attr-defined]
        assert b"secret" not in contents
        for resource in ExportTraceServiceRequest.FromString(contents).resource_spans:
            spans |= {span.name: span for scope in resource.scope_spans for span in scope.spans}
    chat = spans["POST /v1/chat/completions"]
    assert (chat.trace_id.hex(), chat.parent_span_id.hex()) == (TRACE, PARENT)
    found = {one.key: one.value for one in chat.attributes}
    assert found["http.response.status_code"].int_value == 200
    assert found["llava.request_id"].string_value == "mine"
    reply = {one.key: one.value for one in chat.events[0].attributes}
    assert reply["gen_ai.usage.output_tokens"].int_value == usage["completion_tokens"]
    assert reply["gen_ai.usage.input_tokens"].int_value == usage["prompt_tokens"]
    assert reply["llava.first_token_s"].double_value > 0
    missing = {one.key: one.value for one in spans["GET /v1/models/{model:path}"].attributes}
    assert missing["http.response.status_code"].int_value == 404


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'llava-native\[otel\]'"):
        provider("http://127.0.0.1:4318/v1/traces")
