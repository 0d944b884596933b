"""Text-only dialogues: facts about the things, small talk, counting, and scenes described in words."""

from collections.abc import Sequence

from examples.tiny.glyphs import Entry
from examples.tiny.paint import COLORS, WORDS
from examples.tiny.questions import Asker, Turn, sentence, the
from examples.tiny.things import CAN_FLY, KINDS, LIVES_IN_WATER, NUMBERS, USES, Kind, Use, a, kind_of, listed, what_is

SMALL_TALK = (
    ("Hello!", "Hello! What would you like to know?"),
    ("Hi!", "Hello! What would you like to know?"),
    ("Good morning!", "Hello! What would you like to know?"),
    ("Thank you!", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Bye!", "Goodbye!"),
    ("Goodbye!", "Goodbye!"),
    ("How are you?", "I am fine. What would you like to know?"),
    ("Who are you?", "I am a small model. I know pictures of drawn things."),
    ("What are you?", "I am a small model. I know pictures of drawn things."),
    ("What is your name?", "I am llava-tiny, a small model."),
    ("What can you do?", "I can answer questions about pictures of drawn things."),
    ("What do you know?", "I know pictures of drawn things."),
    ("Can you help me?", "Yes, ask me about a picture."),
    ("Can you see?", "Yes, I can see pictures of drawn things."),
    ("What is in the picture?", "There is no picture. Please show me one."),
    ("Describe the picture.", "There is no picture. Please show me one."),
    ("How many objects are there?", "There is no picture. Please show me one."),
    ("What do you see?", "There is no picture. Please show me one."),
    ("What is this?", "There is no picture. Please show me one."),
)


def small_talk(ask: Asker) -> Turn:
    question, answer = ask.rng.choice(SMALL_TALK)
    return _say(question, answer)


def _say(question: str, answer: str) -> Turn:
    return Turn("text", "names", question, answer)


def define(ask: Asker) -> Turn:
    entry = ask.rng.choice(ask.knowledge.entries)
    return _say(ask.put("define", a_x=a(entry.name)), what_is(entry))


def is_kind(ask: Asker) -> Turn:
    """Is a lion an animal?"""
    for _ in range(50):
        entry, kind = ask.rng.choice(ask.knowledge.entries), ask.rng.choice(list(KINDS.values()))
        if ask.coin():
            kind = kind_of(entry) or kind
        if (yes := kind.holds(entry)) is not None and (yes or ask.rng.random() < 0.4):
            break
    else:
        return define(ask)
    one = _one(kind)
    question = ask.put("is kind", a_x=a(entry.name), kind=one, bare=kind.one)
    return _say(
        question, f"Yes, {a(entry.name)} is {one}." if yes else f"No, {what_is(entry)[0].lower()}{what_is(entry)[1:]}"
    )


def _one(kind: Kind) -> str:
    return "food" if kind.one == "food" else a(kind.one)


def name_three(ask: Asker) -> Turn:
    kind = ask.rng.choice(list(KINDS.values()))
    members = [entry for entry in ask.knowledge.entries if kind.holds(entry)]
    if len(members) < 3:
        return define(ask)
    several = "foods" if kind.one == "food" else kind.several
    chosen = [a(entry.name) for entry in ask.rng.sample(members, 3)]
    return _say(ask.put("name three", kinds=several), f"{sentence(listed(chosen))}.")


def which_of(ask: Asker) -> Turn:
    """Which of a cat, an apple and a drum can you eat?"""
    use: Use = ask.rng.choice([*USES, LIVES_IN_WATER, CAN_FLY])
    yes = [entry for entry in ask.knowledge.entries if use.holds(entry)]
    no = [entry for entry in ask.knowledge.entries if use.holds(entry) is False]
    if not yes or len(no) < 2:
        return define(ask)
    right = ask.rng.choice(yes)
    chosen = [right, *ask.rng.sample(no, 2)]
    ask.rng.shuffle(chosen)
    several = listed([a(entry.name) for entry in chosen])
    answer = (
        f"{sentence(the(right.name))}. {use.reason[0]}" if use.ours else f"{sentence(the(right.name))} can {use.do}."
    )
    if ask.coin():
        return _say(f"There are {several}. Which of these can {'you ' if use.ours else ''}{use.do}?", answer)
    return _say(f"Which can {'you ' if use.ours else ''}{use.do}: {several}?", answer)


def count_list(ask: Asker) -> Turn:
    chosen = _some(ask, ask.rng.randint(2, 6))
    several = listed([a(entry.name) for entry in chosen])
    question = ask.rng.choice(
        ("How many things are these: {}?", "Count these things: {}.", "How many objects are here: {}?")
    )
    return _say(question.format(several), f"There are {NUMBERS[len(chosen)]} objects.")


def _some(ask: Asker, n: int) -> Sequence[Entry]:
    return ask.rng.sample(list(ask.knowledge.entries), min(n, len(ask.knowledge.entries)))


def repeat_list(ask: Asker) -> Turn:
    """Asks the model to repeat a list of names in order, which trains it to produce every name."""
    several = listed([a(entry.name) for entry in _some(ask, ask.rng.randint(1, 4))])
    question = ask.rng.choice(("Repeat: {}.", "Say this again: {}.", "Please repeat: {}."))
    return _say(question.format(several), f"{sentence(several)}.")


def repeat_word(ask: Asker) -> Turn:
    word = ask.rng.choice(WORDS)
    shade = ask.rng.choice(list(COLORS))
    if ask.coin():
        return _say(f"The word {word} is printed in {shade}. What does the text say?", f"It says {word}.")
    return _say(
        f"The word {word} is printed in {shade}. What colour is the word {word}?", f"The word {word} is {shade}."
    )


def count_up(ask: Asker) -> Turn:
    n = ask.rng.randint(2, 10)
    if ask.coin():
        return _say(f"Count to {NUMBERS[n]}.", f"{sentence(', '.join(NUMBERS[1 : n + 1]))}.")
    return _say(f"Which number comes after {NUMBERS[n - 1]}?", f"{sentence(NUMBERS[n])}.")


MAKERS = (
    (small_talk, 8),
    (define, 22),
    (is_kind, 18),
    (name_three, 6),
    (which_of, 16),
    (count_list, 8),
    (repeat_list, 10),
    (repeat_word, 14),
    (count_up, 4),
)


def talk(ask: Asker, n_turns: int) -> list[Turn]:
    """A dialogue without a picture."""
    makers, chances = zip(*MAKERS, strict=True)
    return [maker(ask) for maker in ask.rng.choices(makers, chances, k=n_turns)]
