"""Questions about a scene with their answers, derived from its ground truth. Ambiguous questions are not asked."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from examples.tiny.glyphs import Entry
from examples.tiny.paint import COLORS
from examples.tiny.phrases import PICTURE, Phrasing, phrasings
from examples.tiny.things import (
    CAN_FLY,
    KINDS,
    LIVES_IN_WATER,
    NUMBERS,
    PLURAL,
    USES,
    Kind,
    Use,
    a,
    be,
    confusable,
    count,
    kind_of,
    listed,
    many,
    what_is,
)
from examples.tiny.truth import OPPOSITE, SIDES, Truth
from examples.tiny.world import Placed, Scene
from llava.eval.marks import Measure


@dataclass(frozen=True)
class Turn:
    """A question, its answer, the ability it tests, and what a reply must have in common with the answer."""

    kind: str
    measure: Measure
    question: str
    answer: str


@dataclass(frozen=True)
class Knowledge:
    """Facts beyond the scene: all things in the world, and the colours of those that have one."""

    entries: Sequence[Entry]
    colors: Mapping[Entry, str]


class Asker:
    """Chooses phrasings at random."""

    def __init__(self, rng: random.Random, knowledge: Knowledge, which: Phrasing = "training"):
        self.rng, self.knowledge, self.which = rng, knowledge, which

    def put(self, topic: str, **slots: str) -> str:
        phrase = self.rng.choice(_lines(topic, self.which))
        question = phrase.format(pic=self.rng.choice(PICTURE), **slots)
        return question[0].upper() + question[1:]

    def coin(self) -> bool:
        return self.rng.random() < 0.5


@lru_cache(maxsize=256)
def _lines(topic: str, which: Phrasing) -> list[str]:
    return phrasings(topic, which)


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def the(name: str) -> str:
    return name if name in BARE_PROPER else f"the {name}"


BARE_PROPER = ("mount fuji", "foggy", "locked", "unlocked", "locked with key", "locked with pen", "camping", "cooking")


def there_is(phrases: list[str]) -> str:
    """ "There is a cat and two dogs." """
    several = phrases[0].split()[0] in NUMBERS[2:] or _bare(phrases[0]) in PLURAL
    return f"There {'are' if several else 'is'} {listed(phrases)}."


def _bare(phrase: str) -> str:
    """A phrase without its position."""
    return re.sub(r" (at the (top|bottom)( left| right)?|on the (left|right)|in the middle)$", "", phrase)


def absent(ask: Asker, truth: Truth) -> Entry:
    """Something that is not in the scene and cannot be confused with anything there; often of a similar kind."""
    subgroup = ask.rng.choice(truth.objects).entry.subgroup if truth.objects and ask.rng.random() < 0.35 else None
    for _ in range(200):
        entry = ask.rng.choice(ask.knowledge.entries)
        if subgroup and entry.subgroup != subgroup and ask.rng.random() < 0.95:
            continue
        if entry not in truth.counts and not any(confusable(entry, other) for other in truth.counts):
            return entry
    return next(entry for entry in ask.knowledge.entries if entry not in truth.counts)


# ---------------------------------------------------------------- conversation


def naming(ask: Asker, truth: Truth) -> Turn | None:
    if len(truth.objects) != 1:
        return None
    name = truth.objects[0].entry.name
    those = "These" if name in PLURAL else "This"
    subject = those if ask.coin() else {"These": "They", "This": "It"}[those]
    return Turn("naming", "names", ask.put("one"), f"{subject} {be(name)} {a(name)}.")


def listing(ask: Asker, truth: Truth) -> Turn | None:
    if len(truth.objects) < 2:
        return None
    return Turn("listing", "names", ask.put("all"), there_is(truth.phrases))


def naming_at(ask: Asker, truth: Truth) -> Turn | None:
    if len(truth.objects) < 2:
        return None
    thing = ask.rng.choice(truth.objects)
    place = truth.place(thing.box)
    if place is None or truth.maybe(place) != [thing]:
        return None
    name = thing.entry.name
    return Turn("naming", "names", ask.put("at", place=place), f"{sentence(place)} there {be(name)} {a(name)}.")


def where(ask: Asker, truth: Truth) -> Turn | None:
    if not truth.clear:
        return None
    thing = ask.rng.choice(truth.clear)
    name, place = thing.entry.name, truth.place(thing.box)
    if place is None:
        return None
    return Turn(
        "position",
        "place",
        ask.put("where", the_x=the(name), **{"is": be(name)}),
        f"{sentence(the(name))} {be(name)} {place}.",
    )


def relation(ask: Asker, truth: Truth) -> Turn | None:
    pair = _related(ask, truth)
    if pair is None:
        return None
    one, other, side = pair
    x, y = the(one.entry.name), the(other.entry.name)
    question = ask.put("relation", the_x=x, the_y=y, **{"is": be(one.entry.name)})
    return Turn("position", "place", question, f"{sentence(x)} {be(one.entry.name)} {SIDES[side]} {y}.")


def _related(ask: Asker, truth: Truth) -> tuple[Placed, Placed, str] | None:
    if len(truth.clear) < 2:
        return None
    one, other = ask.rng.sample(truth.clear, 2)
    side = truth.relation(one, other)
    return (one, other, side) if side else None


def beside(ask: Asker, truth: Truth) -> Turn | None:
    if len(truth.objects) < 2 or not truth.clear:
        return None
    x, side = ask.rng.choice(truth.clear), ask.rng.choice(list(SIDES))
    thing = truth.sole(x, side)
    if thing is None:
        return None
    name, the_x = thing.entry.name, the(x.entry.name)
    question = ask.put("beside", side=SIDES[side], the_x=the_x)
    return Turn("position", "names", question, f"{sentence(a(name))} {be(name)} {SIDES[side]} {the_x}.")


def counting(ask: Asker, truth: Truth) -> Turn | None:
    lot = ask.rng.random()
    if lot < 0.3:
        return _count_all(ask, truth)
    if lot < 0.75:
        return _count_name(ask, truth)
    return _count_kind(ask, truth)


def _count_all(ask: Asker, truth: Truth) -> Turn | None:
    if truth.scene.words:  # somebody might count the words too
        return None
    n = len(truth.objects)
    return Turn(
        "counting",
        "number",
        ask.put("count"),
        "There is one object." if n == 1 else f"There are {NUMBERS[n]} objects.",
    )


def _count_name(ask: Asker, truth: Truth) -> Turn | None:
    if ask.rng.random() < 0.22:
        entry, n = absent(ask, truth), 0
    else:  # prefer things that occur several times
        entry = ask.rng.choice(truth.objects).entry
        n = truth.counts[entry]
        if n == 1 and ask.rng.random() < 0.6:
            return None
    plural = many(entry.name)
    if plural is None or any(confusable(entry, other) for other in truth.counts):
        return None
    return Turn("counting", "number", ask.put("count name", xs=plural), _so_many(n, entry.name, plural))


def _so_many(n: int, one: str, several: str) -> str:
    return f"There is one {one}." if n == 1 else f"There are {NUMBERS[n]} {several}."


def _count_kind(ask: Asker, truth: Truth) -> Turn | None:
    kind = _some_kind(ask, truth, 0.85)
    if kind.one == "food" or (members := _members(truth, kind)) is None:
        return None
    n = sum(truth.counts[entry] for entry in members)
    return Turn("counting", "number", ask.put("count name", xs=kind.several), _so_many(n, kind.one, kind.several))


def _some_kind(ask: Asker, truth: Truth, present: float) -> Kind:
    """A random kind; with probability `present` one that is in the scene, if there is any."""
    there = [kind for kind in KINDS.values() if any(kind.holds(entry) for entry in truth.counts)]
    return ask.rng.choice(there if there and ask.rng.random() < present else list(KINDS.values()))


def _members(truth: Truth, kind: Kind | Use) -> list[Entry] | None:
    """The things in the scene that belong to a kind; None if that is unclear for any of them."""
    held = {entry: kind.holds(entry) for entry in truth.counts}
    return None if None in held.values() else [entry for entry, yes in held.items() if yes]


def color(ask: Asker, truth: Truth) -> Turn | None:
    words, background = truth.scene.words, truth.scene.background.color
    known = [thing for thing in truth.clear if thing.entry in ask.knowledge.colors and not thing.stylised]
    lot = ask.rng.random()
    if known and lot < 0.45:
        name, shade = (thing := ask.rng.choice(known)).entry.name, ask.knowledge.colors[thing.entry]
        question = ask.put("color", the_x=the(name), **{"is": be(name)})
        return Turn("colour", "color", question, f"{sentence(the(name))} {be(name)} {shade}.")
    if words and lot < 0.75:
        word = ask.rng.choice(words)
        question = ask.put("word color", word=word.text)
        return Turn("colour", "color", question, f"The word {word.text} is {word.color_name}.")
    if background is None:
        return None
    return Turn("colour", "color", ask.put("background"), f"The background is {background}.")


def reading(ask: Asker, truth: Truth) -> Turn | None:
    words = [word.text for word in truth.scene.words]
    if not words and ask.rng.random() < 0.75:
        return None
    answer = f"It says {listed(words)}." if words else "There is no text in the picture."
    return Turn("reading", "words", ask.put("read"), answer)


# ---------------------------------------------------------------- yes or no


def presence(ask: Asker, truth: Truth) -> Turn:
    if ask.coin():
        name = ask.rng.choice(list(truth.counts)).name
        return _yes_no(ask.put("is there", a_x=a(name)), f"Yes, there {be(name)} {a(name)} in the picture.")
    name = absent(ask, truth).name
    return _yes_no(ask.put("is there", a_x=a(name)), f"No, there {be(name)} no {name} in the picture.")


def _yes_no(question: str, answer: str) -> Turn:
    return Turn("yes or no", "yes or no", question, answer)


def presence_of_kind(ask: Asker, truth: Truth) -> Turn | None:
    kind = _some_kind(ask, truth, 0.5)
    members = _members(truth, kind)
    if members is None:
        return None
    question = ask.put("is there", a_x="food" if kind.one == "food" else a(kind.one))
    if not members:
        return _yes_no(question, f"No, there is no {kind.one} in the picture.")
    return _yes_no(question, f"Yes, there {be(members[0].name)} {a(members[0].name)}.")


def is_it(ask: Asker, truth: Truth) -> Turn | None:
    if len(truth.objects) != 1:
        return None
    name = truth.objects[0].entry.name
    if ask.coin():
        return _yes_no(ask.put("is it", a_x=a(name)), f"Yes, it is {a(name)}.")
    return _yes_no(ask.put("is it", a_x=a(absent(ask, truth).name)), f"No, it is {a(name)}.")


def is_background(ask: Asker, truth: Truth) -> Turn | None:
    shade = truth.scene.background.color
    if shade is None:
        return None
    if ask.coin():
        return _yes_no(ask.put("is background", color=shade, a_color=a(shade)), f"Yes, the background is {shade}.")
    other = ask.rng.choice([name for name in COLORS if name != shade])
    return _yes_no(ask.put("is background", color=other, a_color=a(other)), f"No, the background is {shade}.")


def is_beside(ask: Asker, truth: Truth) -> Turn | None:
    pair = _related(ask, truth)
    if pair is None:
        return None
    one, other, side = pair
    x, y, right = the(one.entry.name), the(other.entry.name), ask.coin()
    asked = side if right else OPPOSITE[side]
    question = ask.put("is beside", the_x=x, the_y=y, side=SIDES[asked], **{"is": be(one.entry.name)})
    return _yes_no(question, f"{'Yes' if right else 'No'}, {x} {be(one.entry.name)} {SIDES[side]} {y}.")


def is_number(ask: Asker, truth: Truth) -> Turn | None:
    several = [entry for entry, n in truth.counts.items() if n > 1]
    if several:
        entry = ask.rng.choice(several)
        n, things = truth.counts[entry], many(entry.name) or ""
        if any(confusable(entry, other) for other in truth.counts):
            return None
    else:
        n, things = len(truth.objects), "objects"
        if n < 2 or truth.scene.words:
            return None
    right = ask.coin()
    asked = n if right else ask.rng.choice([k for k in range(2, 7) if k != n])
    question = ask.put("is number", n=NUMBERS[asked], things=things)
    return _yes_no(question, f"{'Yes' if right else 'No'}, there are {NUMBERS[n]} {things}.")


def is_text(ask: Asker, truth: Truth) -> Turn | None:
    words = [word.text for word in truth.scene.words]
    if words:
        return _yes_no(ask.put("is text"), f"Yes, it says {listed(words)}.")
    if ask.rng.random() < 0.5:  # most scenes have no words
        return None
    return _yes_no(ask.put("is text"), "No, there is no text in the picture.")


def yes_or_no(ask: Asker, truth: Truth) -> Turn | None:
    makers = (presence, presence_of_kind, is_it, is_background, is_beside, is_number, is_text)
    return ask.rng.choices(makers, (34, 14, 10, 12, 16, 10, 4))[0](ask, truth)


def not_there(ask: Asker, truth: Truth) -> Turn:
    """A question about something that is not in the scene, as if it were."""
    name = absent(ask, truth).name
    if ask.rng.random() < 0.7:
        question = ask.put("where", the_x=the(name), **{"is": be(name)})
    else:
        question = ask.put("color", the_x=the(name), **{"is": be(name)})
    return Turn("absent", "none", question, f"There {be(name)} no {name} in the picture.")


# ---------------------------------------------------------------- detail


def caption(truth: Truth) -> str:
    return sentence(listed(truth.phrases)) + "."


def detail(ask: Asker, truth: Truth) -> Turn:
    return Turn("detail", "detail", ask.put("detail"), description(truth))


def description(truth: Truth) -> str:
    """Everything in the scene: things from left to right (with positions if there are few), words, background."""
    few = len(truth.objects) <= 4
    parts = []
    for entry, n in truth.counts.items():
        place = truth.place(next(o for o in truth.objects if o.entry == entry).box) if few and n == 1 else None
        parts.append(count(entry.name, n) + (f" {place}" if place else ""))
    sentences = [there_is(parts)]
    sentences += [f"The word {word.text} is printed in {word.color_name}." for word in truth.scene.words]
    if truth.scene.background.color:
        sentences.append(f"The background is {truth.scene.background.color}.")
    return " ".join(sentences)


# ---------------------------------------------------------------- complex


MOSTLY = 0.6  # probability of dropping a question that is answered with "none", since most scenes lack any given kind


def which_are(ask: Asker, truth: Truth) -> Turn | None:
    kind = _some_kind(ask, truth, 0.9)
    members = _members(truth, kind)
    if members is None or (not members and ask.rng.random() < MOSTLY):
        return None
    one = "food" if kind.one == "food" else a(kind.one)
    question = ask.put("which are", kinds="foods" if kind.one == "food" else kind.several, kind=one)
    if not members:
        return Turn("complex", "names", question, f"None of these is {one}.")
    subject = _subject(truth, members)
    predicate = f"is {one}" if _is_one(truth, members) else f"are {kind.several}"
    return Turn("complex", "names", question, f"{sentence(subject)} {predicate}.")


def _subject(truth: Truth, members: list[Entry]) -> str:
    """ "the cat and the dogs" """
    return listed([the(entry.name) if truth.counts[entry] == 1 else f"the {many(entry.name)}" for entry in members])


def _is_one(truth: Truth, members: list[Entry]) -> bool:
    return len(members) == 1 and truth.counts[members[0]] == 1 and members[0].name not in PLURAL


def which_can(ask: Asker, truth: Truth) -> Turn | None:
    uses = [*USES, LIVES_IN_WATER, CAN_FLY]
    there = [use for use in uses if any(use.holds(entry) for entry in truth.counts)]
    use = ask.rng.choice(there if there and ask.rng.random() < 0.9 else uses)
    members = _members(truth, use)
    if members is None or (not members and ask.rng.random() < MOSTLY):
        return None
    question = ask.put("which can you" if use.ours else "which can", do=use.do)
    if not members:
        return Turn("complex", "names", question, "None of these.")
    subject, reason = _subject(truth, members), use.reason[0 if _is_one(truth, members) else 1]
    answer = f"{sentence(subject)}. {reason}" if use.ours else f"{sentence(subject)} can {use.do}."
    return Turn("complex", "names", question, answer)


def odd_one(ask: Asker, truth: Truth) -> Turn | None:
    if len(truth.counts) < 3:
        return None
    found = {}
    for kind in KINDS.values():
        held = {entry: kind.holds(entry) for entry in truth.counts}
        outside = [entry for entry, yes in held.items() if yes is False]
        if None not in held.values() and len(outside) == 1 and truth.counts[outside[0]] == 1:
            found[outside[0]] = kind
    if len(found) != 1:  # nothing fits, or several things do
        return None
    ((entry, kind),) = found.items()
    answer = f"{sentence(the(entry.name))} {be(entry.name)} the odd one out. The others are {kind.several}."
    return Turn("complex", "names", ask.put("odd one"), answer)


def what_kind(ask: Asker, truth: Truth) -> Turn | None:
    clear = [thing.entry for thing in truth.clear if kind_of(thing.entry)]
    if not clear:
        return None
    entry = ask.rng.choice(clear)
    answer = what_is(entry).replace(sentence(a(entry.name)), sentence(the(entry.name)), 1)
    return Turn("complex", "names", ask.put("what kind", the_x=the(entry.name), **{"is": be(entry.name)}), answer)


def complex_(ask: Asker, truth: Truth) -> Turn | None:
    if (turn := odd_one(ask, truth)) and ask.rng.random() < 0.6:
        return turn
    return ask.rng.choices((which_are, which_can, what_kind), (40, 45, 15))[0](ask, truth)


# ---------------------------------------------------------------- dialogues

Maker = Callable[[Asker, Truth], Turn | None]
MAKERS: dict[str, tuple[Maker, int]] = {  # question makers and their weights
    "naming": (naming, 8),
    "listing": (listing, 10),
    "naming at": (naming_at, 12),
    "where": (where, 10),
    "relation": (relation, 8),
    "beside": (beside, 10),
    "counting": (counting, 17),
    "color": (color, 14),
    "reading": (reading, 14),
    "yes or no": (yes_or_no, 20),
    "absent": (not_there, 7),
    "detail": (detail, 9),
    "complex": (complex_, 20),
}
NAMES, CHANCES = list(MAKERS), [chance for _, chance in MAKERS.values()]


def dialogue(ask: Asker, scene: Scene, n_turns: int) -> list[Turn]:
    """Up to `n_turns` different questions about a scene."""
    truth = Truth(scene)
    turns: dict[str, Turn] = {}
    for _ in range(8 * n_turns):
        if len(turns) == n_turns or not scene.objects:
            break
        turn = MAKERS[ask.rng.choices(NAMES, CHANCES)[0]][0](ask, truth)
        if turn and turn.answer not in {other.answer for other in turns.values()}:
            turns[turn.question] = turn
    return list(turns.values())
