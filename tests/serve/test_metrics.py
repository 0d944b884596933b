"""Metrics in Prometheus' text format."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llava.serve.metrics import Metrics
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
    "gpu_cache_usage_perc": "gauge",
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
        assert any(re.match(rf"llava_{name}[ {{]", line) for line in lines)
        assert f"# TYPE llava_{name} {kind}" in lines
    assert 0 <= server.metric("llava_gpu_cache_usage_perc") <= 1


def test_a_request_is_counted(server: Server):
    server.waits_until("llava_num_requests_running", 0)
    names = [f"llava_{name}_count" for name in HISTOGRAMS] + [
        "llava_prompt_tokens_total",
        "llava_generation_tokens_total",
        "llava_request_success_total",
        "llava_prefix_cache_hits_total",
        "llava_image_cache_hits_total",
        "llava_image_cache_queries_total",
        "llava_vision_encode_seconds_total",
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
    assert 0 < grown["vision_encode_seconds_total"] < 10
    assert grown["image_cache_queries_total"] - grown["image_cache_hits_total"] == 1  # the picture is encoded once


@pytest.mark.parametrize("path", ["/nothing-such", "/v1/models/none"])
def test_labels_do_not_hold_what_clients_write(server: Server, path: str):
    assert server.http.get(path).status_code == 404
    server.http.request("BREW", "/health")
    found = server.http.get("/metrics").text
    assert path not in found
    assert "BREW" not in found


@pytest.mark.parametrize("groups", [(1, 1, 1, 1, 1), (5,), (3, 2), (1, 4), (2, 1, 2)], ids=str)
def test_every_token_has_one_latency_however_outputs_are_joined(groups: tuple[int, ...]):
    """The time of the whole reply is that until its first token and those between its tokens."""
    metrics, arrived, last = Metrics(), 10.0, None
    for i, n_tokens in enumerate(groups):
        metrics.output(now := 12.0 + i, arrived, last, n_tokens)
        last = now
    found = values(metrics)
    assert found["llava_time_to_first_token_seconds_count"] == 1
    assert found["llava_time_to_first_token_seconds_sum"] == 2.0
    assert found["llava_inter_token_latency_seconds_count"] == sum(groups) - 1
    assert found["llava_inter_token_latency_seconds_sum"] == pytest.approx(len(groups) - 1)
    assert found["llava_generation_tokens_total"] == sum(groups)


@pytest.mark.parametrize("last", [None, 11.0])
def test_an_output_without_tokens_has_no_latency(last: float | None):
    metrics = Metrics()
    metrics.output(12.0, 10.0, last, 0)
    found = values(metrics)
    assert found["llava_time_to_first_token_seconds_count"] == 0
    assert found["llava_inter_token_latency_seconds_count"] == 0


def test_a_reply_without_tokens_has_no_time_to_its_first_token(server: Server):
    server.waits_until("llava_num_requests_running", 0)
    names = ("llava_time_to_first_token_seconds_count", "llava_e2e_request_latency_seconds_count")
    before = [server.metric(name) for name in names]
    server.complete("Hello", max_tokens=0)
    assert [server.metric(name) - value for name, value in zip(names, before, strict=True)] == [0, 1]


def values(metrics: Metrics) -> dict[str, float]:
    """The values that have no labels, by name."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {one.name: one.value for family in families for one in family.samples if not one.labels}
