"""Metrics in Prometheus' text format."""

import re

import pytest

from tests.serving import Server, drawn, picture, text, user

HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "image_preprocess_seconds",
)
OTHERS = {
    "prompt_tokens_total": "counter",
    "generation_tokens_total": "counter",
    "prefix_cache_hits_total": "counter",
    "request_success_total": "counter",
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "image_cache_hits_total": "counter",
    "image_cache_queries_total": "counter",
    "vision_encode_seconds_total": "counter",
}
LINE = re.compile(r'(# (HELP|TYPE) \w+ .+|[a-z_0-9]+(\{(\w+="[^"\n]*",?)+\})? [-+.\deinfaIN]+)')


def test_metrics_are_text_for_prometheus(server: Server):
    server.chat(user("Hello"), max_tokens=1)
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert all(line.startswith("llava_") for line in lines if not line.startswith("#"))
    for name in HISTOGRAMS:
        assert f"# TYPE llava_{name} histogram" in lines
        assert any(line.startswith(f'llava_{name}_bucket{{le="0.005"}}') for line in lines)
    for name, kind in OTHERS.items():
        assert any(line.startswith(f"llava_{name}") for line in lines)
        if kind:
            assert f"# TYPE llava_{name} {kind}" in lines


def test_a_request_is_counted(server: Server):
    server.waits_until("llava_num_requests_running", 0)
    names = [f"llava_{name}_count" for name in HISTOGRAMS] + [
        "llava_prompt_tokens_total",
        "llava_generation_tokens_total",
        "llava_request_success_total",
        "llava_prefix_cache_hits_total",
        "llava_image_cache_hits_total",
    ]
    before = {name: server.metric(name) for name in names}
    messages = user(picture(drawn("purple")), text("What is in the picture?"))
    usages = [server.chat(messages, max_tokens=5).usage for _ in range(2)]
    grown = {name.removeprefix("llava_"): server.metric(name) - before[name] for name in names}
    generated = sum(one.completion_tokens for one in usages)
    assert grown["prompt_tokens_total"] == sum(one.prompt_tokens for one in usages)
    assert grown["generation_tokens_total"] == generated
    assert grown["prefix_cache_hits_total"] == sum(one.prompt_tokens_details.cached_tokens for one in usages)
    assert grown["request_success_total"] == 2
    assert grown["time_to_first_token_seconds_count"] == 2
    assert grown["inter_token_latency_seconds_count"] == generated - 2
    assert grown["e2e_request_latency_seconds_count"] == 2
    assert grown["request_queue_time_seconds_count"] == 2
    assert grown["image_preprocess_seconds_count"] == 2


@pytest.mark.parametrize("path", ["/nothing-such", "/v1/models/none"])
def test_labels_do_not_hold_what_clients_write(server: Server, path: str):
    assert server.http.get(path).status_code == 404
    server.http.request("BREW", "/health")
    found = server.http.get("/metrics").text
    assert path not in found
    assert "BREW" not in found
