"""The text of an answer while its tokens arrive."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what the bytes of a character decode to until the last one is there
_STRIDE = 32  # tokens after which what has been decoded is not decoded again


class TextStream:
    """Turns ids into text, holds back what may still change, and looks for stop strings.

    The pieces that `push` and `finish` return, joined, are the answer without white space at its ends. A stop string is
    found in the decoded text, however the tokens cut it, and never returned.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self._decode = decode
        self._stops = stops
        self._settled = ""  # text of the ids up to and with the anchor
        self._anchor = -1  # the id behind which decoding starts again; -1: at the beginning
        self.ids: list[int] = []
        self.text = ""  # the answer so far, as far as it is certain
        self.stopped = False  # a stop string was found: nothing more is taken

    def push(self, id: int) -> str:
        """Takes the next id and returns what has become certain, "" if nothing has."""
        self.ids.append(id)
        text = self._decoded(len(self.ids))
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._cut(text, min(ends))
        self._settle(text)
        return self._send(text[: len(text) - self._held(text)])

    def finish(self) -> str:
        """The rest, once no more ids come."""
        return "" if self.stopped else self._send(self._decode(self.ids))

    def _decoded(self, n: int) -> str:
        """Text of the first n ids. From the anchor on it is decoded together with the anchor, which settles spaces."""
        if self._anchor < 0 or n <= self._anchor:
            return self._decode(self.ids[:n])
        tail = self._decode(self.ids[self._anchor : n])
        return self._settled + tail[len(self._decode([self.ids[self._anchor]])) :]

    def _settle(self, text: str) -> None:
        """Moves the anchor to the newest id, if that one has a text of its own and ends a character."""
        last = len(self.ids) - 1
        if last - self._anchor >= _STRIDE and not text.endswith(UNFINISHED):
            alone = self._decode(self.ids[last:])
            if alone and text.endswith(alone):
                self._settled, self._anchor = text, last

    def _send(self, text: str) -> str:
        text = text.strip()
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _cut(self, text: str, end: int) -> str:
        """Drops the stop string from the text and from the ids all tokens that reach into it."""
        piece = self._send(text[:end])
        while self.ids and len(self._decoded(len(self.ids))) > end:
            self.ids.pop()
        return piece

    def _held(self, text: str) -> int:
        """Characters at the end that are not certain: an unfinished character, and in front of it or at the end the
        beginning of a stop string."""
        certain = text.rstrip(UNFINISHED)
        longest = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(certain)), longest, -1):
                if certain.endswith(stop[:n]):
                    longest = n
                    break
        return len(text) - len(certain) + longest
