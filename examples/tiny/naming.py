"""The easiest lessons: one thing a scene, and only its name is asked. `examples.tiny.dataset --lessons names`.

The smoke build of llava-tiny learns from them what a few hundred steps can teach: the language model to repeat a name
that it was told, the projector to say it where the picture stands.
"""

import random
from dataclasses import replace

from examples.tiny.dataset import TRAINING_SEEDS, Writer, brief, conversations, jpeg
from examples.tiny.questions import Asker, Turn, naming
from examples.tiny.truth import Truth
from examples.tiny.world import Scene, draw, imagine

CAPTIONS_ALONE = 0.3  # share of the texts


class Namer(Writer):
    """Samples of one thing each; each depends on its number alone."""

    def sample(self, i: int) -> tuple[dict[str, object], bytes | None]:
        """A sample as the JSON has it, and its picture as JPEG."""
        kind, name = self.job.kind, f"{self.job.kind}-{self.job.seed}-{i:06}"
        rng = random.Random(f"one {kind} {self.job.seed} {i}")
        ask, seed = Asker(rng, self.knowledge), rng.randrange(TRAINING_SEEDS)
        if kind == "text":
            return {"id": name, **told(ask, seed)}, None
        scene = draw(seed, self.glyphs, self.glyphs.styles, n_objects=1, words=())
        turn = brief(ask, scene) if kind == "caption" else name_of(ask, scene)
        return {"id": name, "image": f"{name}.jpg", "conversations": conversations([turn], "<image>\n")}, jpeg(scene)


def told(ask: Asker, seed: int) -> dict[str, object]:
    """A caption alone, or told in place of the picture with the question what it is."""
    scene = imagine(seed, ask.knowledge.entries)
    scene = replace(scene, objects=scene.objects[:1], words=[])
    caption = brief(ask, scene).answer
    if ask.rng.random() < CAPTIONS_ALONE:
        return {"text": caption}
    turn = name_of(ask, scene)
    return {"conversations": conversations([replace(turn, question=f"{caption}\n{turn.question}")], "")}


def name_of(ask: Asker, scene: Scene) -> Turn:
    turn = naming(ask, Truth(scene))
    assert turn is not None  # one thing can always be named
    return turn
