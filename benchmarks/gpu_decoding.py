"""Requests that decode together, step by step."""

import time
from collections import Counter

from gpu_inputs import text_input

from llava.config import LlavaConfig
from llava.engine.engine import Engine
from llava.engine.sampling_params import SamplingParams


class Decoding:
    """Requests that decode together."""

    def __init__(self, engine: Engine, config: LlavaConfig, rows: int, prompt: int, new: int):
        self.engine, self.rows, self.prompt = engine, rows, prompt
        self.params = SamplingParams(max_new_tokens=new)
        inputs = [text_input(config, prompt, seed=i) for i in range(rows)]
        self.requests = [engine.add_request(input, self.params) for input in inputs]
        self.generated: Counter[int] = Counter()

    def step(self) -> None:
        for output in self.engine.step():
            if output.finish_reason:
                raise AssertionError(f"a request ended during the measurement: {output}")
            self.generated[output.request] += len(output.token_ids)

    def warm_up(self) -> None:
        """Computes the prompts, and the first steps in which all rows decode."""
        while len(self.generated) < self.rows:
            self.step()
        for _ in range(8):
            self.step()
        self.counted = self.generated.total()

    def seconds(self, steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        return time.perf_counter() - started

    def tokens_cached(self) -> float:
        """Tokens in the cache of a row, on average."""
        return self.prompt + self.generated.total() / self.rows

    def stop(self, steps: int) -> None:
        """Ends the requests. Raises AssertionError if not every row decoded in each of the `steps` timed steps."""
        new = self.generated.total() - self.counted
        for request in self.requests:
            self.engine.abort(request)
        while self.engine.has_requests:
            self.engine.step()
        # the detokenizer keeps up to a few ids of each row back, until their text is final
        if not self.rows * (steps - 4) <= new <= self.rows * (steps + 4):
            raise AssertionError(f"{steps} steps of {self.rows} rows returned {new} tokens")


def lead_in(rows: int, cached: int, chunk_tokens: int) -> int:
    """About how many tokens the first row decodes while the prompts of the others are computed."""
    return -(-rows * cached // chunk_tokens)
