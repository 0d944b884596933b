"""What each case of `gpu.py` has to reach, and the rows of its table.

The figures are for an H200 with 4.35 TB/s and 680 TFLOP/s. On another card, decoding scales with the bandwidth that is
measured there, and pictures and first tokens with the matrix product.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gpu_setup import Measured, Work
from result import OURS, PEER

BANDWIDTH, PRODUCT = 4.35e12, 680e12  # of an H200: bytes and operations per second
Bound = Literal["bandwidth", "product"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """The speed of the GPU that is measured: bytes and operations per second, None if that failed."""

    name: str
    bandwidth: float | None
    product: float | None

    def scale(self, bound: Bound | None) -> float:
        """How many times as fast as an H200 the card may be expected to be."""
        speed = {"bandwidth": self.bandwidth, "product": self.product}.get(bound or "")
        if "H200" in self.name or not speed:
            return 1.0
        return speed / {"bandwidth": BANDWIDTH, "product": PRODUCT}[bound or "product"]

    def limit(self, work: Work | None, unit: str) -> float | None:
        """The best value in `unit` that the card can reach for this work."""
        if work is None or not self.bandwidth or not self.product:
            return None
        seconds = work.seconds(self.bandwidth, self.product)
        return 1e3 * seconds if unit == "ms" else work.amount / seconds


@dataclass(frozen=True, kw_only=True)
class Aim:
    """The figures that one case has to reach."""

    title: str
    unit: str
    required: float | None = None
    stretch: float | None = None
    scale: Bound | None = None  # what the figures scale with on other cards; None: they hold as they stand
    of_limit: tuple[float | None, float | None] | None = None  # the same as shares of the limit, instead of figures
    elsewhere: tuple[float | None, float | None] | None = None  # shares of the limit on cards other than an H200
    below_peer: bool = False  # it must also be less than the peer's figure

    @property
    def lower_is_better(self) -> bool:
        return self.unit in ("ms", "s")

    def figures(self, card: Card, limit: float | None) -> tuple[float | None, float | None]:
        """The required figure and that of the stretch goal on a card."""
        shares = self.of_limit or (self.elsewhere if "H200" not in card.name else None)
        if shares:
            return _times(shares[0], limit), _times(shares[1], limit)
        scale = card.scale(self.scale)
        if self.lower_is_better:
            scale = 1 / scale
        return _times(self.required, scale), _times(self.stretch, scale)


def _times(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b


_ROWS = (0.80, 0.88)
AIMS = {
    "decode-1": Aim(title="decode, batch 1", unit="tok/s", required=290, stretch=300, scale="bandwidth"),
    "decode-4000": Aim(title="decode, 4,000 cached", unit="tok/s", required=242, elsewhere=(0.85, None)),
    "decode-8": Aim(title="decode, batch 8", unit="tok/s", of_limit=_ROWS),
    "decode-32": Aim(title="decode, batch 32", unit="tok/s", of_limit=_ROWS),
    "decode-128": Aim(title="decode, batch 128", unit="tok/s", of_limit=_ROWS),
    "invariant-1": Aim(title="decode, batch 1, batch_invariant", unit="tok/s"),
    "invariant-8": Aim(title="decode, batch 8, batch_invariant", unit="tok/s"),
    "first-token": Aim(title="first token, pixels", unit="ms", required=19, stretch=16, scale="product"),
    "first-token-jpeg": Aim(title="first token, JPEG, simplejpeg", unit="ms", required=60),
    "first-token-jpeg-pillow": Aim(title="first token, JPEG, Pillow", unit="ms", required=80),
    "clip-1": Aim(title="CLIP, batch 1", unit="images/s", required=400, scale="product"),
    "clip-64": Aim(title="CLIP, batch 64", unit="images/s", required=1400, stretch=1600, scale="product"),
    "requests-128": Aim(
        title="128 requests at once", unit="requests/s", required=31, stretch=34, elsewhere=(31 / 37, 34 / 37)
    ),
    "prefix": Aim(title="512 questions, one picture", unit="times", required=4, stretch=7),
    "mpt": Aim(title="MPT-7B, decode, batch 1", unit="tok/s"),
    "mpt-share": Aim(title="its share of bandwidth to Llama's", unit="times", required=0.95),
    "start": Aim(title="second start to first token", unit="s", required=10, stretch=6, below_peer=True),
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A case that a contestant did not measure."""

    case: str
    contestant: str
    reason: str
    skipped: bool  # it could not run here; otherwise, it failed


def rows(measured: Sequence[Measured], failures: Sequence[Failure], card: Card) -> list[dict[str, Any]]:
    """One row for each case that was measured or has failed, in the order of `AIMS`; then those without aims."""
    derived = [*measured, *mpt_share(measured)]
    by_case: dict[str, dict[str, Measured]] = {}
    for one in derived:
        by_case.setdefault(one.case, {})[one.contestant] = one
    failed: dict[str, dict[str, Failure]] = {}
    for failure in failures:
        failed.setdefault(failure.case, {})[failure.contestant] = failure
    cases = [case for case in AIMS if case in by_case or case in failed]
    others = [case for case in dict.fromkeys([*by_case, *failed]) if case not in AIMS]
    return [row(case, by_case.get(case, {}), failed.get(case, {}), card) for case in [*cases, *others]]


def row(case: str, found: Mapping[str, Measured], failed: Mapping[str, Failure], card: Card) -> dict[str, Any]:
    ours = found.get(OURS)
    names = dict.fromkeys([*found, *failed])
    peers = {name: _peer(found.get(name), failed.get(name)) for name in names if name != OURS}
    unit = next((one.unit for one in found.values()), AIMS[case].unit if case in AIMS else "")
    filled: dict[str, Any] = {"case": case, "title": case, "unit": unit, "peers": peers}
    if case in AIMS:
        filled["title"] = AIMS[case].title
    if OURS in failed:
        filled["skipped" if failed[OURS].skipped else "error"] = failed[OURS].reason
    if ours is None:
        return filled
    limit = card.limit(ours.work, unit)
    filled |= _spread(ours) | {"limit": limit, "share": _share(ours.value, limit, unit), "figures": ours.figures}
    return filled | (_verdict(AIMS[case], ours.value, limit, peers, card) if case in AIMS else {})


def _spread(one: Measured) -> dict[str, Any]:
    return {"value": one.value, "min": min(one.values), "max": max(one.values), "runs": len(one.values)}


def _peer(one: Measured | None, failure: Failure | None) -> dict[str, Any]:
    if one:
        return _spread(one) | {"figures": one.figures}
    assert failure
    return {"skipped" if failure.skipped else "error": failure.reason}


def _share(value: float, limit: float | None, unit: str) -> float | None:
    if limit is None:
        return None
    return limit / value if unit == "ms" else value / limit


def _verdict(
    aim: Aim, value: float, limit: float | None, peers: Mapping[str, Mapping[str, Any]], card: Card
) -> dict[str, Any]:
    required, stretch = aim.figures(card, limit)

    def reaches(figure: float | None) -> bool | None:
        if figure is None:
            return None
        return value <= figure if aim.lower_is_better else value >= figure

    reached = reaches(required)
    theirs = peers.get(PEER, {}).get("value")
    if aim.below_peer and theirs is not None:
        reached = bool(reached) and value < theirs
    return {"required": required, "stretch": stretch, "reached": reached, "stretch_reached": reaches(stretch)}


def mpt_share(measured: Iterable[Measured]) -> list[Measured]:
    """How large MPT's share of the bandwidth is, compared with Llama's in the same run."""
    rates = {
        one.case: [value * one.work.n_bytes / one.work.amount for value in one.values]
        for one in measured
        if one.contestant == OURS and one.case in ("mpt", "decode-1") and one.work
    }
    if len(rates) < 2:
        return []
    llama = sorted(rates["decode-1"])[len(rates["decode-1"]) // 2]
    return [Measured(case="mpt-share", contestant=OURS, values=[rate / llama for rate in rates["mpt"]], unit="times")]
