"""The text of an answer while its tokens arrive."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what the bytes of a character decode to until the last one is there


class TextStream:
    """Turns ids into text, holds back what may still change, and looks for stop strings.

    The pieces that `push` and `finish` return, joined, are the answer without white space at its ends. A stop string is
    found in the decoded text, however the tokens cut it, and never returned.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self._decode = decode
        self._stops = stops
        self.ids: list[int] = []
        self.text = ""  # the answer so far, as far as it is certain
        self.stopped = False  # a stop string was found: nothing more is taken

    def push(self, id: int) -> str:
        """Takes the next id and returns what has become certain, "" if nothing has."""
        self.ids.append(id)
        text = self._decode(self.ids)
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._cut(text, min(ends))
        return self._send(text[: len(text) - self._held(text)])

    def finish(self) -> str:
        """The rest, once no more ids come."""
        return "" if self.stopped else self._send(self._decode(self.ids))

    def _send(self, text: str) -> str:
        text = text.strip()
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _cut(self, text: str, end: int) -> str:
        """Drops the stop string from the text and from the ids all tokens that reach into it."""
        piece = self._send(text[:end])
        while self.ids and len(self._decode(self.ids)) > end:
            self.ids.pop()
        return piece

    def _held(self, text: str) -> int:
        """Characters at the end that are not certain: an unfinished character, the beginning of a stop string."""
        held = len(text) - len(text.rstrip(UNFINISHED))
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:n]):
                    held = n
                    break
        return held
