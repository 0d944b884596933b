"""Examines one sample: validates its structure, decodes its pictures, counts its tokens, and repairs it."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llava.config import PictureOptions
from llava.data.layouts import Sample, UnsupportedError, to_llava
from llava.data.measure import Measure, Tokens
from llava.data.pictures import is_data_url
from llava.data.repair import Fault, drop_last_exchange, find_faults, repair
from llava.data.samples import Samples
from llava.errors import DataError, ImageError, PromptError
from llava.preprocess.image import read_picture
from llava.preprocess.raster import Size


@dataclass
class Examined:
    """The result of examining one sample."""

    digest: int  # hash of the JSON text
    faults: list[Fault]
    id: str = ""  # empty if malformed
    sample: Sample | None = None  # as read from the file; None if malformed or unsupported
    text: str | None = None  # JSON text for the fixed copy, unchanged if left as it is; None if dropped
    tokens: Tokens | None = None  # counts for the repaired sample before shortening; None if not measured


@dataclass
class Examiner:
    """Examines samples. Instances can be sent to worker processes."""

    samples: Samples
    read_pictures: bool
    measure: Measure | None
    pictures: PictureOptions = field(default_factory=PictureOptions)

    def __call__(self, indices: Sequence[int]) -> list[Examined]:
        return [self.examine(i) for i in indices]

    def examine(self, i: int) -> Examined:
        text = self.samples.text(i)
        digest = int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
        try:
            sample = self.samples[i]
        except UnsupportedError as error:
            return self._unsupported(i, text, digest, error)
        except DataError as error:
            return Examined(digest, [Fault("malformed", str(error))])
        found = Examined(digest, find_faults(sample), sample.id, sample)
        sizes = list(self._picture_sizes(sample, found.faults))
        unreadable = any(fault.kind in ("missing_picture", "broken_picture") for fault in found.faults)
        repaired = None if unreadable else repair(sample)
        if repaired and self.measure:
            repaired, found.tokens = self._measure(repaired, sizes, self.measure, found.faults)
        if repaired:
            found.text = text if repaired == sample else self._to_json(i, repaired) or text
        return found

    def _unsupported(self, i: int, text: str, digest: int, error: UnsupportedError) -> Examined:
        given = self.samples.value(i).get("id")
        id = str(i if given is None else given)
        found = str(error).removeprefix(f"{self.samples.where(i)} (id {id:.60})").removeprefix(": ")
        return Examined(digest, [Fault("unsupported", found)], id, text=text)

    def _picture_sizes(self, sample: Sample, found: list[Fault]) -> Iterator[Size]:
        for name in sample.images:
            if not self.read_pictures and not is_data_url(name):
                continue
            try:
                image, losses = read_picture(self.samples.picture(name), self.pictures)
            except DataError as error:
                return found.append(Fault("missing_picture", str(error)))
            except ImageError as error:
                text = str(error).removeprefix("picture: ")
                return found.append(Fault("broken_picture", f"{name:.200}: {text}"))
            found += [Fault("lossy_picture", f"{name:.200}: {loss.removeprefix('picture: ')}") for loss in losses]
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
        found.append(Fault("too_long", f"{tokens.total} tokens; {measure.limit_text(tokens.total)}"))
        shorter = drop_last_exchange(sample)
        while shorter and measure(shorter, sizes).total > measure.limit:
            shorter = drop_last_exchange(shorter)
        return shorter, tokens

    def _to_json(self, i: int, sample: Sample) -> str | None:
        """Returns the JSON text of a repaired sample, or None if keys of its turns would be lost."""
        value = to_llava(self.samples.value(i), sample)
        return None if value is None else json.dumps(value)
