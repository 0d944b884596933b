"""A request whose reply is being generated: its tokens, its pages in the cache, and its own options.

D dim
"""

import hashlib
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from llava.config import IMAGE, TileGrid
from llava.engine.beam import BeamSearch
from llava.engine.block_manager import PageKey
from llava.engine.capture import Capture, Captured
from llava.engine.detokenize import Detokenizer
from llava.engine.sampling_params import SamplingParams
from llava.errors import LlavaError
from llava.preprocess.inputs import ModelInput

FinishReason = Literal["stop", "length", "abort", "error"]
PENDING = -1  # stands for the id of a token in flight


@dataclass(frozen=True, eq=False, kw_only=True)
class PlacedImage:
    """A picture with its position in the sequence."""

    start: int  # position of its first token
    end: int  # position after its last token
    digest: bytes  # SHA-256 of the preprocessed pixels and the tile grid: what the tower and the projector depend on
    pixels: Tensor  # [views, 3, size, size]
    grid: TileGrid | None


@dataclass(eq=False, kw_only=True)
class Sequence:
    """A prompt and the tokens generated for it so far.

    There are no phases: `computed` counts the tokens whose keys and values are in the cache, `total` all tokens. Each
    step raises `computed`; when it reaches `total`, a token is sampled. Preemption sets it back to 0.

    A token is in flight from when it is sampled until the host reads its id. It counts as a token, with PENDING in its
    place, so that the next step can be planned and launched; the id is in the token pool of the device.
    """

    id: int  # unique; the members of a beam search have ids of their own
    request: int  # the number that `Engine.add_request` returns
    params: SamplingParams
    adapter: str | None
    order: int  # requests with a lower number are scheduled first and preempted last
    seed: int
    max_new_tokens: int
    stop_ids: frozenset[int]
    detokenizer: Detokenizer
    tokens: list[int]  # prompt ids, with IMAGE for each image token, and generated ids; at the end PENDING
    n_prompt: int
    images: list[PlacedImage]
    capture: Capture | None = None
    beams: "Beams | None" = None

    computed: int = 0
    n_in_flight: int = 0  # newest tokens
    epoch: int = 0  # raised when tokens in flight are dropped; what the device returns for an earlier epoch is void
    pool_slot: int = -1  # slot in the token pool while the sequence is running; -1: none
    block_table: list[int] = field(default_factory=list)
    page_keys: list[PageKey] = field(default_factory=list)  # of the full pages; see `keys`
    distrusts_cache: bool = False  # cached pages are not used, because they may contain another request's NaN
    salt: bytes = b""  # see `Engine.add_request`
    cache_salt: bytes = b""  # what the keys and values depend on besides tokens and pictures
    n_appended: int = 0  # generated tokens that have been added and output; see `rewind`
    n_sent_ids: int = 0  # ids of the reply that have been output
    n_sent: int = 0  # characters of the reply that have been output
    n_reused: int = 0  # leading pages that came from the prefix cache
    n_cached: int = 0  # tokens of the prompt that were in the prefix cache when it was first admitted
    n_registered: int = 0  # leading pages that have been offered to the prefix cache

    finish_reason: FinishReason | None = None
    error: LlavaError | None = None
    logprobs: list[float] = field(default_factory=list)  # one per generated token
    top_logprobs: list[dict[int, float]] = field(default_factory=list)  # per token: {likely id: log-probability}
    end_token: "EndToken | None" = None  # that ended the reply, if log-probabilities are requested
    # of the prompt's tokens after the first, if requested; None: an image token, or not computed yet
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top_logprobs: list[dict[int, float] | None] = field(default_factory=list)
    captured: Captured = field(default_factory=Captured)

    prepare_s: float = 0.0  # seconds spent on the input
    # `time.perf_counter` timestamps in seconds; 0: not reached yet
    started: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0

    @property
    def total(self) -> int:
        """Number of tokens in the prompt and the reply."""
        return len(self.tokens)

    @property
    def n_known(self) -> int:
        """Number of leading tokens whose ids are known on the host."""
        return len(self.tokens) - self.n_in_flight

    @property
    def awaits_token(self) -> bool:
        """Whether the next step of this sequence depends on a token in flight, or there may be none after it."""
        if not self.n_in_flight:
            return False
        return self.params.reads_reply or self.capture is not None or self.n_generated >= self.max_new_tokens

    @property
    def n_pending(self) -> int:
        """Number of tokens that are not in the cache yet."""
        return len(self.tokens) - self.computed

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest generated token is pending."""
        return self.n_pending == 1 and self.n_generated > 0

    @property
    def n_generated(self) -> int:
        """Number of generated tokens, which is the index of the next one in the reply."""
        return len(self.tokens) - self.n_prompt

    @property
    def prompt_ids(self) -> list[int]:
        """Ids of the prompt, with IMAGE for each image token."""
        return self.tokens[: self.n_prompt]

    @property
    def reply_ids(self) -> list[int]:
        """Generated ids, including those of an end token or stop string."""
        return self.tokens[self.n_prompt :]

    @property
    def uses_prefix_cache(self) -> bool:
        """Whether cached pages may stand for tokens of this prompt: not if something is asked about each token."""
        return self.capture is None and not self.params.prompt_logprobs and not self.distrusts_cache

    def keys(self, page_size: int, n_tokens: int) -> list[PageKey]:
        """Returns the keys of the full pages among the first `n_tokens` tokens, whose ids are known."""
        n_pages, salt = n_tokens // page_size, self.cache_salt + self.salt
        for page in range(len(self.page_keys), n_pages):
            start, end = page * page_size, (page + 1) * page_size
            previous = self.page_keys[-1].hash if self.page_keys else hashlib.sha256(salt).digest()
            pictures = [(one.digest, one.start - start) for one in self.images_in(start, end)]
            self.page_keys.append(PageKey.of(previous, array("q", self.tokens[start:end]).tobytes(), pictures))
        return self.page_keys[:n_pages]

    def images_in(self, start: int, end: int) -> Iterator[PlacedImage]:
        """Yields the pictures that have tokens at positions from `start` up to but not including `end`."""
        return (one for one in self.images if one.start < end and start < one.end)

    def forget_computed(self) -> None:
        """Resets the counters, so that all tokens are computed again, and drops what has been captured about them.

        Tokens in flight are dropped. They are drawn again, as draws depend only on the seed and the index of the token.
        """
        self.drop_in_flight()
        self.computed = self.n_reused = self.n_registered = 0
        self.captured.states.clear()
        self.captured.attention.clear()

    def rewind(self) -> None:
        """After an interrupt, undoes what a step may have left half done: its token, and the end of the reply.

        The token is drawn again, as draws depend only on the seed and the index of the token. A beam search starts
        over.
        """
        n = min(self.n_appended, len(self.logprobs)) if self.params.logprobs else self.n_appended
        del self.tokens[self.n_prompt + n :], self.logprobs[n:], self.top_logprobs[n:]
        self.n_in_flight = 0
        self.epoch += 1
        self.page_keys.clear()  # some may contain a token that has just been removed
        self.n_appended = n
        self.finish_reason = self.error = self.beams = self.end_token = None
        self.detokenizer = self.detokenizer.restarted(self.reply_ids)

    def expect_token(self) -> None:
        """Adds a token in flight."""
        self.tokens.append(PENDING)
        self.n_in_flight += 1

    def drop_in_flight(self) -> None:
        """Removes the tokens in flight."""
        del self.tokens[self.n_known :]
        self.n_in_flight = 0
        self.epoch += 1

    def append(self, id: int) -> None:
        """Adds a generated token, or the id of the first one in flight. Sets `finish_reason` after the last one."""
        now = time.perf_counter()
        self.first_token = self.first_token or now
        if self.n_in_flight:
            self.tokens[-self.n_in_flight] = id
            self.n_in_flight -= 1
        else:
            self.tokens.append(id)
        if id in self.stop_ids:
            self.finish_reason = "stop"
            if self.params.logprobs:
                self.end_token = EndToken(id, self.logprobs[-1], self.top_logprobs[-1])
        else:
            self.detokenizer.append(id)
            if self.detokenizer.stopped:
                self.finish_reason = "stop"
            elif self.n_known - self.n_prompt >= self.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason:
            self.end(self.finish_reason)

    def end(self, reason: FinishReason, error: LlavaError | None = None) -> None:
        """Marks the reply as finished. Drops tokens in flight, and log-probabilities of tokens that it lacks."""
        self.drop_in_flight()
        self.detokenizer.finish()
        self.finish_reason, self.error, self.ended = reason, error, time.perf_counter()
        self.first_token = self.first_token or self.ended
        n = len(self.detokenizer.ids)
        del self.logprobs[n:], self.top_logprobs[n:]


class EndToken(NamedTuple):
    """The token that ended a reply and is not part of it."""

    id: int
    logprob: float
    top: dict[int, float]  # {likely id: log-probability}


@dataclass(eq=False, kw_only=True)
class Beams:
    """The sequences of one beam search. They are computed like any others; the search advances when all are."""

    search: BeamSearch
    leader: Sequence  # the request's own sequence, which becomes the first beam
    live: list[Sequence]
    logprobs: dict[int, Tensor] = field(default_factory=dict)  # by sequence id: [V] of the token after it

    @property
    def ready(self) -> bool:
        """Whether the next token's log-probabilities are known for every beam."""
        return all(one.id in self.logprobs for one in self.live)


def placed_images(input: ModelInput, n_features: int) -> list[PlacedImage]:
    """Returns the pictures of an input with their positions and digests. n_features: feature vectors per view."""
    if input.pixels is None:
        return []
    ids: list[int] = input.ids.tolist()
    placed, position = [], 0
    for pixels, grid, digest in zip(input.pixels.split(input.views), input.grids, input.digests, strict=True):
        start = ids.index(IMAGE, position)
        position = start + (n_features + grid.n_tokens if grid else n_features * len(pixels))
        placed.append(PlacedImage(start=start, end=position, digest=digest, pixels=pixels, grid=grid))
    return placed
