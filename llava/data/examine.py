"""One sample of training data, examined: its form, its pictures by decoding them, its tokens; and mended."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llava.data.measure import Measure, Tokens
from llava.data.repair import Fault, as_conversations, faults, mended, shortened
from llava.data.samples import Sample, Samples
from llava.errors import DataError, ImageError, PromptError
from llava.preprocess.image import Size, open_picture

_BUFFER = re.compile(r" <_io\.BytesIO object at \w+>")  # Pillow's name for what was read from a file


@dataclass
class Examined:
    """What is known of a sample."""

    digest: int  # of its JSON
    faults: list[Fault]
    sample: Sample | None = None  # as the file has it; None: malformed
    text: str | None = None  # its JSON as a cleaned copy has it; None: dropped
    tokens: Tokens | None = None  # of the sample as mended


@dataclass
class Examiner:
    """Looks at samples one by one, in whatever process."""

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
        found = Examined(digest, faults(sample), sample)
        sizes = list(self._sizes(sample, found.faults))
        sound = mended(sample) if not self.read_pictures or len(sizes) == len(sample.images) else None
        if sound and self.measure:
            sound, found.tokens = self._measured(sound, sizes, self.measure, found.faults)
        if sound:
            found.text = text if sound == sample else self._rewritten(i, sound)
        return found

    def _sizes(self, sample: Sample, found: list[Fault]) -> Iterator[Size]:
        for name in sample.images if self.read_pictures else ():
            try:
                yield open_picture(self.samples.picture(name)).size
            except DataError as error:
                return found.append(Fault("missing_picture", str(error)))
            except ImageError as error:
                text = _BUFFER.sub("", str(error)).removeprefix("picture: ")
                return found.append(Fault("broken_picture", f"{name}: {text}"))

    def _measured(
        self, sample: Sample, sizes: list[Size], measure: Measure, found: list[Fault]
    ) -> tuple[Sample | None, Tokens | None]:
        """The sample as far as it fits, and its tokens before it was cut."""
        try:
            whole = measure(sample, sizes)
        except PromptError as error:
            found.append(Fault("refused", str(error)))
            return None, None
        if not whole.learnt:
            found.append(Fault("nothing_to_learn", f"no answer within {measure.limit} tokens"))
        if whole.total <= measure.limit:
            return (sample if whole.learnt else None), whole
        found.append(Fault("too_long", f"{whole.total} tokens, the limit is {measure.limit}"))
        rest = shortened(sample)
        while rest and measure(rest, sizes).total > measure.limit:
            rest = shortened(rest)
        return rest, whole

    def _rewritten(self, i: int, sample: Sample) -> str:
        value = self.samples.value(i) | {"conversations": as_conversations(sample.turns)}
        return json.dumps(value)
