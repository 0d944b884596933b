"""Examines one sample: validates its structure, decodes its pictures, counts its tokens, and repairs it."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llava.data.measure import Measure, Tokens
from llava.data.repair import Fault, drop_last_exchange, find_faults, repair, to_conversations
from llava.data.samples import Sample, Samples
from llava.errors import DataError, ImageError, PromptError
from llava.preprocess.image import Size, read_picture


@dataclass
class Examined:
    """The result of examining one sample."""

    digest: int  # hash of the JSON text
    faults: list[Fault]
    sample: Sample | None = None  # as read from the file; None if malformed
    text: str | None = None  # JSON text for the fixed copy; None if dropped
    tokens: Tokens | None = None  # counts for the repaired sample before shortening; None if not measured


@dataclass
class Examiner:
    """Examines samples. Instances can be sent to worker processes."""

    samples: Samples
    read_pictures: bool
    measure: Measure | None

    def __call__(self, indices: Sequence[int]) -> list[Examined]:
        return [self.examine(i) for i in indices]

    def examine(self, i: int) -> Examined:
        text = self.samples.text(i)
        digest = int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
        try:
            sample = self.samples[i]
        except DataError as error:
            return Examined(digest, [Fault("malformed", str(error))])
        found = Examined(digest, find_faults(sample), sample)
        sizes = list(self._picture_sizes(sample, found.faults))
        repaired = repair(sample) if not self.read_pictures or len(sizes) == len(sample.images) else None
        if repaired and self.measure:
            repaired, found.tokens = self._measure(repaired, sizes, self.measure, found.faults)
        if repaired:
            found.text = text if repaired == sample else self._to_json(i, repaired)
        return found

    def _picture_sizes(self, sample: Sample, found: list[Fault]) -> Iterator[Size]:
        for name in sample.images if self.read_pictures else ():
            try:
                image, losses = read_picture(self.samples.picture(name))
            except DataError as error:
                return found.append(Fault("missing_picture", str(error)))
            except ImageError as error:
                return found.append(Fault("broken_picture", f"{name}: {str(error).removeprefix('picture: ')}"))
            found += [Fault("lossy_picture", f"{name}: {loss.removeprefix('picture: ')}") for loss in losses]
            yield image.size

    def _measure(
        self, sample: Sample, sizes: list[Size], measure: Measure, found: list[Fault]
    ) -> tuple[Sample | None, Tokens | None]:
        """Returns the sample, shortened to the limit (None if unusable), and its token counts before shortening."""
        try:
            tokens = measure(sample, sizes)
        except PromptError as error:
            found.append(Fault("refused", str(error)))
            return None, None
        if not tokens.targets:
            found.append(Fault("nothing_to_learn", f"no answer within {measure.limit} tokens"))
        if tokens.total <= measure.limit:
            return (sample if tokens.targets else None), tokens
        found.append(Fault("too_long", f"{tokens.total} tokens; the limit is {measure.limit}"))
        shorter = drop_last_exchange(sample)
        while shorter and measure(shorter, sizes).total > measure.limit:
            shorter = drop_last_exchange(shorter)
        return shorter, tokens

    def _to_json(self, i: int, sample: Sample) -> str:
        value = self.samples.value(i) | {"conversations": to_conversations(sample.turns)}
        return json.dumps(value)
