"""The engine: takes requests at any time, and computes all of them together, step by step.

    request = engine.add_request(messages, SamplingParams(max_new_tokens=64))
    while engine.has_requests:
        for output in engine.step():
            ...

All methods can be called from several threads. A step is computed by whichever thread calls for it.
"""

from collections import deque
from collections.abc import Generator, Iterator
from collections.abc import Sequence as Rest
from dataclasses import dataclass

from llava.engine.capture import Capture
from llava.engine.collection import set_aside
from llava.engine.input_processor import Request
from llava.engine.reply import Output, Reply, Stream
from llava.engine.sampling_params import SamplingParams
from llava.engine.sequence import Sequence
from llava.engine.steps import EngineSteps
from llava.errors import ConfigError, LlavaError

__all__ = ["Engine", "Request", "Stats"]

_AHEAD = 32  # requests that `generate` prepares before a step has room for them


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What the engine is doing, and how often its caches helped since it was made."""

    running: int  # sequences
    waiting: int
    pages_used: int
    pages_free: int  # includes pages in the prefix cache that no request uses
    prefix_hit_tokens: int  # tokens that did not have to be computed
    feature_hits: int  # pictures that did not have to be encoded
    feature_misses: int  # pictures that were encoded
    vision_s: float  # seconds spent on encoding; on a GPU, those of launching its kernels


class Engine(EngineSteps):
    """Generates replies to many requests at once."""

    def add_request(
        self,
        input: Request,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        priority: int = 0,
        capture: Capture | None = None,
        salt: bytes = b"",
        prepare_s: float = 0.0,
    ) -> int:
        """Adds a request and returns its number. Its outputs are returned by `step`.

        input: a conversation, a raw prompt, (raw prompt, pictures), or a prepared input.
        priority: requests with lower numbers are served first, but no request waits forever.
        capture: intermediate results to record; they are in the last output.
        salt: requests share cached keys, values and image features only with those of the same salt.
        prepare_s: seconds that it took to prepare the input, if it is prepared.

        Raises LlavaError if the input cannot be prepared or does not fit.
        """
        params = params or SamplingParams()
        sequence = self.inputs.sequence(input, params, adapter, priority=priority, capture=capture, salt=salt)
        sequence.prepare_s += prepare_s
        self._inbox.append(sequence)
        return sequence.request

    def stream(
        self,
        input: Request,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        priority: int = 0,
        capture: Capture | None = None,
        prepare_s: float | None = None,
    ) -> Stream:
        """Like `add_request`, but returns an iterator over the reply's text, which calls `step` when it has to.

        prepare_s: seconds that it took to prepare the input, if it is prepared.
        """
        sequence = self.inputs.sequence(input, params or SamplingParams(), adapter, priority=priority, capture=capture)
        sequence.prepare_s = sequence.prepare_s if prepare_s is None else prepare_s
        queue = self._submit_private(sequence)
        return Stream(sequence, self._read(queue), self.abort)

    def generate(
        self,
        inputs: Rest[Request],
        params: SamplingParams | Rest[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        at_once: int | None = None,
        template: str | None = None,
    ) -> list[Reply]:
        """Returns the replies to many requests, in order. params: for all of them, or one for each.

        at_once: how many are prepared and run at the same time; default: as many as `max_batch` keeps busy. template:
            conversation template, which does not apply to raw prompts.

        Raises the first error after the other requests have finished.
        """
        replies = []
        results = self.generate_each(inputs, params, adapter=adapter, at_once=at_once, template=template)
        for _, result in sorted(results, key=lambda one: one[0]):
            if isinstance(result, LlavaError):
                raise result
            replies.append(result)
        return replies

    def generate_each(
        self,
        inputs: Rest[Request],
        params: SamplingParams | Rest[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        at_once: int | None = None,
        template: str | None = None,
    ) -> Generator[tuple[int, Reply | LlavaError], None, None]:
        """Yields the index of each request with its reply, or with its error, as soon as it has finished.

        Keeps the prepared inputs of `at_once` requests, so there may be any number. Closing the iterator aborts the
        others. Arguments: see `generate`.
        """
        each = list(params) if isinstance(params, Rest) else [params or SamplingParams()] * len(inputs)
        if len(each) != len(inputs):
            raise ConfigError(f"params: found {len(each)} for {len(inputs)} inputs; expected one, or one per input")
        limit = at_once or 2 * self.options.max_batch
        waiting = deque(enumerate(each))
        unfinished: dict[int, Sequence] = {}
        try:
            prefetching = self.inputs.prefetch(inputs, adapter, template=template, n_ahead=limit)
            with set_aside(), prefetching as prefetch:
                while waiting or unfinished:
                    while waiting and len(unfinished) < limit and (prefetch.is_ready or not unfinished):
                        if len(self._inbox) + len(self.scheduler.waiting) >= _AHEAD:
                            break  # the rest is prepared while the device computes
                        i, own_params = waiting.popleft()
                        try:
                            prepared = prefetch.take()
                            sequence = self.inputs.sequence(prepared.input, own_params, adapter)
                        except LlavaError as error:
                            yield i, error
                            continue
                        sequence.prepare_s += prepared.seconds
                        self._submit_private(sequence)
                        unfinished[i] = sequence
                    with self._stepping:
                        self._advance()
                    for i in [i for i, one in unfinished.items() if one.finish_reason]:
                        ended = unfinished.pop(i)
                        yield i, ended.error or Reply.of(ended)
        finally:
            for one in unfinished.values():
                self.abort(one.request)

    def abort(self, request: int) -> None:
        """Ends a request in the next step. Does nothing if it has finished."""
        self._aborted.append(request)

    @property
    def has_requests(self) -> bool:
        """Whether there are requests that have not finished, or outputs that `step` has not returned."""
        return bool(self._inbox or self._unfinished or self._unread)

    def stats(self) -> Stats:
        """Returns what the engine is doing."""
        scheduler = self.scheduler
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._inbox),
            pages_used=self.blocks.n_used,
            pages_free=self.blocks.n_free,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            feature_hits=self.features.hits,
            feature_misses=self.features.misses,
            vision_s=self._runner.seconds["vision"] if self._runner else 0.0,
        )

    def check(self) -> None:
        """Raises RuntimeError if pages or features have been lost. For tests and for an idle server."""
        with self._stepping:
            self.blocks.check(self.scheduler.tables())
            if not self.scheduler.running and self.features.n_referenced:
                raise RuntimeError(f"{self.features.n_referenced} pictures are referenced, but no request is running")

    def _submit_private(self, sequence: Sequence) -> deque[Output]:
        """Submits a sequence whose outputs do not come from `step`, but from the returned queue."""
        queue: deque[Output] = deque()
        self._streams[sequence.request] = queue
        self._inbox.append(sequence)
        return queue

    def _read(self, queue: deque[Output]) -> Iterator[Output]:
        """Yields the outputs of a private queue, and computes steps until the last one. Raises the request's error."""
        while True:
            while queue:
                output = queue.popleft()
                yield output
                if output.error:
                    raise output.error
                if output.finish_reason:
                    return
            with self._stepping:
                if not queue:
                    self._advance()

    def step(self) -> list[Output]:
        """Computes one step for all requests. Returns what it added to the replies, except for those of streams."""
        outputs: list[Output] = []
        try:
            with self._stepping:
                self._advance()
                outputs, self._unread = self._unread, []
            return outputs
        except BaseException:  # an interrupt: the next call returns them
            self._unread[:0] = outputs
            raise
