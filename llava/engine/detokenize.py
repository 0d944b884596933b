"""Incremental detokenization: the text of a reply while its tokens arrive."""

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # what the bytes of a character decode to before the last one has arrived
_STRIDE = 32  # tokens after which decoded text is not decoded again


class Detokenizer:
    """Turns ids into text, holds back text that may still change, and searches for stop strings.

    The pieces returned by `append` and `finish` join to the reply, without white space at its ends. Stop strings are
    searched in the decoded text, so it does not matter how tokens split them. They are never returned.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self._decode = decode
        self._stops = stops
        self._settled = ""  # text of the ids up to and including the anchor
        self._anchor = -1  # index of the id after which decoding restarts; -1: start of the reply
        self.ids: list[int] = []
        self.text = ""  # the part of the reply that can no longer change
        self.stopped = False  # a stop string was found; no more ids are accepted

    def append(self, id: int) -> str:
        """Adds the next id and returns the text that became final, "" if none did."""
        self.ids.append(id)
        text = self._decoded(len(self.ids))
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._truncate(text, min(found))
        self._move_anchor(text)
        return self._send(text[: len(text) - self._n_held(text)])

    def finish(self) -> str:
        """Returns the remaining text; called once no more ids follow."""
        return "" if self.stopped else self._send(self._decode(self.ids))

    def _decoded(self, n: int) -> str:
        """Text of the first n ids. Ids after the anchor are decoded together with it, so that spaces come out right."""
        if self._anchor < 0 or n <= self._anchor:
            return self._decode(self.ids[:n])
        tail = self._decode(self.ids[self._anchor : n])
        return self._settled + tail[len(self._decode([self.ids[self._anchor]])) :]

    def _move_anchor(self, text: str) -> None:
        """Moves the anchor to the newest id if that id has text of its own and completes a character."""
        last = len(self.ids) - 1
        if last - self._anchor >= _STRIDE and not text.endswith(INCOMPLETE):
            newest = self._decode(self.ids[last:])
            if newest and text.endswith(newest):
                self._settled, self._anchor = text, last

    def _send(self, text: str) -> str:
        text = text.strip()
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _truncate(self, text: str, end: int) -> str:
        """Removes the stop string at `end` from the text, and all tokens that overlap it from the ids."""
        piece = self._send(text[:end])
        while self.ids and len(self._decoded(len(self.ids))) > end:
            self.ids.pop()
        return piece

    def _n_held(self, text: str) -> int:
        """Number of characters at the end to hold back: an incomplete character and the beginning of a stop string."""
        complete = text.rstrip(INCOMPLETE)
        longest = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(complete)), longest, -1):
                if complete.endswith(stop[:n]):
                    longest = n
                    break
        return len(text) - len(complete) + longest
