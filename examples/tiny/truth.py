"""The ground truth of a scene: unambiguous names, positions, and spatial relations."""

from collections import Counter
from functools import cached_property

from examples.tiny.things import confusable, count
from examples.tiny.world import Placed, Scene


class Truth:
    """The ground truth of a scene."""

    def __init__(self, scene: Scene):
        self.scene = scene
        self.objects = sorted(scene.objects, key=lambda thing: thing.box[0] + thing.box[2])  # from left to right
        self.counts = Counter(thing.entry for thing in self.objects)

    @cached_property
    def clear(self) -> list[Placed]:
        """The things that can be identified by name alone."""
        return [
            thing
            for thing in self.objects
            if self.counts[thing.entry] == 1 and not any(confusable(thing.entry, other) for other in self.counts)
        ]

    def center(self, box: tuple[int, int, int, int]) -> tuple[float, float]:
        width, height = self.scene.size
        return (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height

    def place(self, box: tuple[int, int, int, int]) -> str | None:
        """The position as a phrase, such as "at the top left"; None near the boundary of two regions."""
        x, y = self.center(box)
        column, row = _third(x, ("left", "", "right")), _third(y, ("top", "", "bottom"))
        return None if column is None or row is None else PLACES[row, column]

    def maybe(self, place: str) -> list[Placed]:
        """All things that somebody might describe as being there."""
        row, column = next(key for key, words in PLACES.items() if words == place)
        return [
            thing
            for thing in self.objects
            if _near(self.center(thing.box)[0], ("left", "", "right").index(column))
            and _near(self.center(thing.box)[1], ("top", "", "bottom").index(row))
        ]

    def relation(self, one: Placed, other: Placed) -> str | None:
        """The direction of `one` from `other`; None unless one direction dominates and separates their boxes."""
        (left, top, right, bottom), (left2, top2, right2, bottom2) = one.box, other.box
        dx, dy = (left + right - left2 - right2) / 2, (top + bottom - top2 - bottom2) / 2
        if abs(dx) > 1.6 * abs(dy):
            return "left" if right <= left2 else "right" if left >= right2 else None
        if abs(dy) > 1.6 * abs(dx):
            return "above" if bottom <= top2 else "below" if top >= bottom2 else None
        return None

    def sole(self, x: Placed, side: str) -> Placed | None:
        """The only thing on this side of x, if all others are clearly not on it."""
        there = [thing for thing in self.objects if thing is not x and self.relation(thing, x) == side]
        rest = [thing for thing in self.objects if thing is not x and thing not in there]
        if len(there) == 1 and all(not _partly(thing, x, side) for thing in rest):
            return there[0]
        return None

    @property
    def phrases(self) -> list[str]:
        """ "a cat", "two dogs", from left to right."""
        return [count(entry.name, n) for entry, n in self.counts.items()]


# (row, column) -> phrase
PLACES = {
    ("top", "left"): "at the top left",
    ("top", ""): "at the top",
    ("top", "right"): "at the top right",
    ("", "left"): "on the left",
    ("", ""): "in the middle",
    ("", "right"): "on the right",
    ("bottom", "left"): "at the bottom left",
    ("bottom", ""): "at the bottom",
    ("bottom", "right"): "at the bottom right",
}
SIDES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def _third(x: float, words: tuple[str, str, str]) -> str | None:
    if x < 0.35:
        return words[0]
    if x > 0.65:
        return words[2]
    return words[1] if 0.42 <= x <= 0.58 else None


def _near(x: float, third: int) -> bool:
    return (x < 0.45, 0.3 < x < 0.7, x > 0.55)[third]


def _partly(thing: Placed, x: Placed, side: str) -> bool:
    """Whether any part of `thing` is on this side of the middle of x."""
    left, top, right, bottom = thing.box
    middle_x, middle_y = (x.box[0] + x.box[2]) / 2, (x.box[1] + x.box[3]) / 2
    return {"left": left < middle_x, "right": right > middle_x, "above": top < middle_y, "below": bottom > middle_y}[
        side
    ]
