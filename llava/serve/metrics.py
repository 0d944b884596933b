"""Metrics in the text format of Prometheus. Names are those of vLLM, with `llava_` in front."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llava.engine.engine import Engine
from llava.engine.reply import Reply

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds
_TOKEN_BUCKETS = (0.001, 0.0025, *_BUCKETS[:12])


class Metrics:
    """Counts what the server does, in a registry of its own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # when each series began
        self._registry = CollectorRegistry()

        def seconds(name: str, text: str, buckets: tuple[float, ...] = _BUCKETS) -> Histogram:
            return Histogram(f"llava_{name}_seconds", text, buckets=buckets, registry=self._registry)

        def count(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"llava_{name}", text, labels, registry=self._registry)

        self._first_token = seconds("time_to_first_token", "From a request's arrival to its first token.")
        self._inter_token = seconds("inter_token_latency", "Between tokens of a reply.", _TOKEN_BUCKETS)
        self._end_to_end = seconds("e2e_request_latency", "From a request's arrival to its last token.")
        self._queue = seconds("request_queue_time", "From the end of a request's preparation to its first step.")
        self._preprocess = seconds("image_preprocess", "Reading and resizing a picture.")
        self._prompt_tokens = count("prompt_tokens", "Tokens of prompts, image tokens included.")
        self._generation_tokens = count("generation_tokens", "Generated tokens.")
        self._cached_tokens = count("prefix_cache_hits", "Tokens of prompts that were in the prefix cache.")
        self._success = count("request_success", "Finished choices.", ("finished_reason",))
        self._responses = count("http_responses", "HTTP responses.", ("path", "status"))

    def attach(self, engine: Engine) -> None:
        """Adds what the engine knows."""
        self._registry.register(_EngineCollector(engine))

    def output(self, now: float, arrived: float, last: float | None, n_tokens: int) -> None:
        """Records an output. last: when the same reply had its last one.

        The tokens of a first output arrive together, so those after the first one take no time. An output without
        tokens, such as that of a reply without any, has no latency.
        """
        if n_tokens and last is None:
            self._first_token.observe(now - arrived)
            self._inter_tokens(0.0, n_tokens - 1)
        elif n_tokens and last is not None:
            self._inter_tokens((now - last) / n_tokens, n_tokens)
        self._generation_tokens.inc(n_tokens)

    def _inter_tokens(self, seconds: float, n: int) -> None:
        for _ in range(n):
            self._inter_token.observe(seconds)

    def finished(self, reply: Reply, seconds: float) -> None:
        """Records a finished reply."""
        self._end_to_end.observe(seconds)
        self._queue.observe(reply.timings.queue_s)
        self._prompt_tokens.inc(reply.usage.prompt_tokens)
        self._cached_tokens.inc(reply.usage.cached_tokens)
        self._success.labels(reply.finish_reason).inc()

    def picture(self, seconds: float) -> None:
        """Records that a picture was read and resized."""
        self._preprocess.observe(seconds)

    def response(self, path: str, status: int) -> None:
        """Records a response. path: that of a route, not what a client wrote."""
        self._responses.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """Returns all metrics as text."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's own counts whenever metrics are asked for."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics."""
        stats = self._engine.stats()
        n_pages = stats.pages_used + stats.pages_free
        for name, text, value in (
            ("num_requests_running", "Sequences that are computed.", stats.running),
            ("num_requests_waiting", "Requests that wait for room.", stats.waiting),
            ("gpu_cache_usage_perc", "Share of the cache's pages in use, from 0 to 1.", stats.pages_used / n_pages),
        ):
            yield GaugeMetricFamily(f"llava_{name}", text, value)
        for name, text, value in (
            ("image_cache_hits", "Pictures that did not have to be encoded.", stats.feature_hits),
            ("image_cache_queries", "Pictures that were looked up.", stats.feature_hits + stats.feature_misses),
            ("vision_encode_seconds", "Spent on encoding pictures; one step encodes those of many.", stats.vision_s),
        ):
            yield CounterMetricFamily(f"llava_{name}", text, value)
