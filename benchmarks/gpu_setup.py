"""What the processes of `gpu.py` share: the cases, their lengths, and what a process measures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from timing import Target

DECODE_ROWS = {"decode-8": 8, "decode-32": 32, "decode-128": 128}  # requests that decode together
INVARIANT_ROWS = {"invariant-1": 1, "invariant-8": 8}  # the same with `batch_invariant`
CLIP_BATCHES = {"clip-1": 1, "clip-64": 64}  # pictures per batch


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths in tokens, and numbers of runs."""

    cached: int = 704  # tokens in the cache of each row, on average over the timed steps
    long: int = 4000  # the same for `decode-4000`
    steps: int = 256  # timed steps of one row
    row_steps: int = 128  # timed steps of several rows
    text: int = 64  # text tokens of a prompt with a picture
    new: int = 128  # tokens of each reply of `requests-128`
    requests: int = 128
    questions: int = 512
    question_new: int = 32
    first_tokens: int = 20  # timed first tokens
    clip_batches: int = 20  # batches per timed run
    runs: int = 3
    starts: int = 2  # timed starts, after a first one
    jpeg: tuple[int, int] = (4000, 3000)  # pixels


FEW = Lengths(
    cached=48, long=200, steps=16, row_steps=16, text=16, new=6, requests=8, questions=16, question_new=4,
    first_tokens=2, clip_batches=2, runs=1, starts=1, jpeg=(400, 300),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured, and where."""

    size: str  # of `shapes.SIZES`
    layers: int | None
    device: str
    dtype: str
    folder: str  # for checkpoints
    gpt_fast: str | None  # folder with its source
    graphs: bool = True  # for our engine
    batch_invariant: bool = False  # the same
    profile: bool = False

    @property
    def target(self) -> Target:
        return Target.from_options(self.device, self.dtype, None)

    @property
    def lengths(self) -> Lengths:
        return FEW if self.size == "tiny" else Lengths()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Skipped(Exception):
    """A case that cannot be measured here, for the given reason."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The least that a GPU has to do for `amount` tokens, images or requests."""

    n_bytes: float = 0  # read
    flops: float = 0
    amount: float = 1
    in_turn: bool = False  # first all operations, then all reads; otherwise both at once

    def seconds(self, bandwidth: float, flop_rate: float) -> float:
        """bandwidth: bytes per second."""
        parts = self.n_bytes / bandwidth, self.flops / flop_rate
        return sum(parts) if self.in_turn else max(parts)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The runs of one contestant in one case."""

    case: str
    contestant: str
    values: Sequence[float]  # of every run, in `unit`
    unit: str
    work: Work | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"values": list(self.values)}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Measured":
        return cls(**found | {"work": Work(**found["work"]) if found["work"] else None})

    @property
    def value(self) -> float:
        return median(self.values)
