"""Metrics in the text format of Prometheus. Names are those of vLLM, with `llava_` in front."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llava.engine.engine import Engine, Stats
from llava.engine.reply import Reply

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds
_TOKEN_BUCKETS = (0.001, 0.0025, *_BUCKETS[:12])


class Metrics:
    """Counts what the server does, in a registry of its own."""

    def __init__(self) -> None:
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
        """Adds what the engine knows. vision_encode_seconds is a sum, as one step encodes pictures of many requests."""

        def gauge(name: str, text: str, value: Callable[[Stats], float]) -> None:
            one = Gauge(f"llava_{name}", text, registry=self._registry)
            one.set_function(lambda: value(engine.stats()))

        gauge("num_requests_running", "Sequences that are computed.", lambda stats: stats.running)
        gauge("num_requests_waiting", "Requests that wait for room.", lambda stats: stats.waiting)
        gauge("gpu_cache_usage_perc", "Share of the cache's pages in use.", _usage)
        gauge("image_cache_hits", "Pictures that did not have to be encoded.", lambda stats: stats.feature_hits)

    def output(self, now: float, arrived: float, last: float | None, n_tokens: int) -> None:
        """Records an output. last: when the same reply had its last one."""
        if last is None:
            self._first_token.observe(now - arrived)
        elif n_tokens:
            for _ in range(n_tokens):
                self._inter_token.observe((now - last) / n_tokens)
        self._generation_tokens.inc(n_tokens)

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


def _usage(stats: Stats) -> float:
    return stats.pages_used / max(1, stats.pages_used + stats.pages_free)
