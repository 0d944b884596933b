"""The simplest lessons: one thing per scene, and only its name is asked for. `examples.tiny.dataset --lessons names`.

The smoke build of llava-tiny uses them, since a few hundred steps suffice: the language model learns to repeat a name
from its prompt, and the projector learns to supply that name from the picture.
"""

import random
from dataclasses import replace

from examples.tiny.dataset import TRAINING_SEEDS, Writer, brief, conversations, jpeg
from examples.tiny.questions import Asker, Turn, naming
from examples.tiny.truth import Truth
from examples.tiny.world import Scene, draw, imagine

CAPTIONS_ALONE = 0.3  # fraction of the texts that are only a caption


class Namer(Writer):
    """Samples with one thing each. A sample depends only on its index."""

    def sample(self, i: int) -> tuple[dict[str, object], bytes | None]:
        """A sample as in the JSON, and its picture as JPEG."""
        kind, name = self.job.kind, f"{self.job.kind}-{self.job.seed}-{i:06}"
        rng = random.Random(f"one {kind} {self.job.seed} {i}")
        ask, seed = Asker(rng, self.knowledge), rng.randrange(TRAINING_SEEDS)
        if kind == "text":
            return {"id": name, **told(ask, seed)}, None
        scene = draw(seed, self.glyphs, self.glyphs.styles, n_objects=1, words=())
        turn = brief(ask, scene) if kind == "caption" else name_of(ask, scene)
        return {"id": name, "image": f"{name}.jpg", "conversations": conversations([turn], "<image>\n")}, jpeg(scene)


def told(ask: Asker, seed: int) -> dict[str, object]:
    """A caption on its own, or one that replaces the picture before the question of what it shows."""
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
