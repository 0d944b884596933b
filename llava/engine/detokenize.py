"""Incremental detokenization: turns tokens into text as they arrive."""

from collections.abc import Callable, Sequence
from functools import partial

INCOMPLETE = "\ufffd"  # placeholder for a character whose remaining bytes have not arrived yet
_STRIDE = 8  # minimum distance between anchors, in ids; ids before the latest anchor are not decoded again


class Detokenizer:
    """Turns ids into text, holds back text that may still change, and searches for stop strings.

    The concatenated pieces returned by `append` and `finish` form the reply, without leading or trailing white space
    unless `after` is given. Stop strings are matched against the decoded text, so they may be split across tokens. They
    are never returned.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), *, after: Sequence[int] | None = None
    ):
        """after: ids before the reply, whose text it continues, white space included; None: it is a text of its own."""
        self._decode = decode if after is None else partial(_decode_after, decode, after)
        self._restart = partial(Detokenizer, decode, stops, after=after)
        self._strip = after is None
        self._stops = stops
        self._settled = ""  # text of the ids up to and including the anchor
        self._anchor = -1  # index of the last id in `_settled`; -1: none yet
        self._anchor_length = 0  # characters that the anchor id decodes to by itself
        self.ids: list[int] = []
        self.text = ""  # the part of the reply that can no longer change
        self.n_final = 0  # leading ids whose text can no longer change
        self.stopped = False  # a stop string was found; no more ids are accepted

    def restarted(self, ids: Sequence[int]) -> "Detokenizer":
        """Returns a new detokenizer to which these ids have been added."""
        detokenizer = self._restart()
        for id in ids:
            detokenizer.append(id)
        return detokenizer

    def append(self, id: int) -> str:
        """Adds the next id and returns the newly finalized text, which may be ""."""
        self.ids.append(id)
        text = self._decoded(len(self.ids))
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._truncate(text, min(found))
        self._move_anchor(text)
        n_held = self._n_held(text)
        if not n_held:
            self.n_final = len(self.ids)
        return self._send(text[: len(text) - n_held])

    def finish(self) -> str:
        """Returns the remaining text. Call it after the last id."""
        self.n_final = len(self.ids)
        return "" if self.stopped else self._send(self._decode(self.ids))

    def _decoded(self, n: int) -> str:
        """Returns the text of the first n ids. Decodes from the anchor id on, as decoding drops a leading space."""
        if self._anchor < 0 or n <= self._anchor:
            return self._decode(self.ids[:n])
        tail = self._decode(self.ids[self._anchor : n])
        return self._settled + tail[self._anchor_length :]

    def _move_anchor(self, text: str) -> None:
        """Moves the anchor to the newest id if that id decodes to text on its own and completes a character."""
        last = len(self.ids) - 1
        if last - self._anchor >= _STRIDE and not text.endswith(INCOMPLETE):
            newest = self._decode(self.ids[last:])
            if newest and text.endswith(newest):
                self._settled, self._anchor, self._anchor_length = text, last, len(newest)

    def _send(self, text: str) -> str:
        text = text.strip() if self._strip else text
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _truncate(self, text: str, end: int) -> str:
        """Truncates the text at `end`, the start of a stop string, and drops later ids. Returns the last piece."""
        piece = self._send(text[:end])
        while self.ids and len(self._decoded(len(self.ids))) > end:
            self.ids.pop()
        return piece

    def _n_held(self, text: str) -> int:
        """Number of trailing characters to hold back: incomplete characters and a possible stop-string prefix."""
        complete = text.rstrip(INCOMPLETE)
        longest = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(complete)), longest, -1):
                if complete.endswith(stop[:n]):
                    longest = n
                    break
        return len(text) - len(complete) + longest


def _decode_after(decode: Callable[[Sequence[int]], str], after: Sequence[int], ids: Sequence[int]) -> str:
    """Returns the text that `ids` add to the text of the ids before them."""
    before = decode(after).rstrip(INCOMPLETE)  # a character that `ids` complete belongs to them
    return decode([*after, *ids])[len(before) :]
