"""Knowledge about the things by name: article, plural, kind and use, from Unicode's subgroups and hand-written lists.

A thing that is not on a list counts as "no". Things that people would disagree on are listed as unclear, and are never
asked about.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from examples.tiny.glyphs import Entry
from llava.eval.marks import NUMBERS as NUMBERS  # exported for code that writes about things


def names(text: str) -> frozenset[str]:
    """Parses a hand-written list of names separated by commas."""
    return frozenset(name for name in (part.strip() for part in re.sub(r"\s+", " ", text).split(",")) if name)


PLURAL = names(
    """paw prints, grapes, cherries, blueberries, peanuts, beans, pancakes, french fries, clinking beer mugs,
    clinking glasses, chopsticks, houses, hot springs, fireworks, sparkles, Japanese dolls, admission tickets,
    performing arts, skis, nesting dolls, flower playing cards, glasses, sunglasses, goggles, jeans, gloves,
    socks, briefs, shorts, shopping bags, ballet shoes, prayer beads, woman’s clothes, musical notes, control
    knobs, maracas, film frames, books, card index dividers, linked paperclips, bookmark tabs, scissors, crossed
    swords, chains, bubbles"""
)
BARE = names(
    """coral, broccoli, garlic, bread, baguette bread, meat on bone, bacon, falafel, cooking, popcorn, butter,
    salt, canned food, cooked rice, curry rice, spaghetti, oden, sushi, fried shrimp, soft ice cream, shaved
    ice, ice cream, custard, sake, pouring liquid, mate, ice, camping, mount fuji, building construction, wood,
    Tokyo tower, Statue of Liberty, foggy, construction, light rail, high voltage, fog, fire, milky way, tennis,
    bowling, field hockey, ice hockey, lacrosse, ping pong, badminton, yarn, thread, money with wings, locked,
    unlocked, locked with pen, locked with key, dna, soap"""
)
SAME_IN_PLURAL = ("fish", "blowfish", "jellyfish", "deer", "moose", "bison", "buffalo", "squid", "shrimp", "moai")
ES = ("potato", "tomato", "mosquito", "mango", "volcano", "tornado")
NO_SIMPLE_PLURAL = re.compile(
    r" (with|without|of|on|in|at|over|behind|and|showing|tilted|facing|increasing|decreasing|not|done) "
    r"| (done|departure|arrival)$|^(speaker|chart) "
    r"|(mouse|goose|die|leaf|wolf|scarf|knife|sheaf|\box|[^aeiou]y|woman|man|^house|^musical note)$"
)


@lru_cache(maxsize=4096)
def many(name: str) -> str | None:
    """The plural if it is the name plus an ending, so that it contains the name; otherwise None."""
    if name in PLURAL or name in BARE or NO_SIMPLE_PLURAL.search(f"{name}"):
        return None
    if name.endswith(SAME_IN_PLURAL):
        return name
    return name + ("es" if name.endswith(("s", "x", "z", "ch", "sh", *ES)) else "s")


def a(name: str) -> str:
    """The name with its article, if it takes one."""
    if name in PLURAL or name in BARE:
        return name
    vowel = name[0].lower() in "aeiou" and not name.startswith(("uni", "ewe", "euro", "one"))
    return f"{'an' if vowel or name.startswith(('hour', 'x-')) else 'a'} {name}"


def be(name: str) -> str:
    return "are" if name in PLURAL else "is"


def count(name: str, n: int) -> str:
    """ "two cats". The name must have a plural if n is above one."""
    return a(name) if n == 1 else f"{NUMBERS[n]} {many(name)}"


def listed(parts: list[str]) -> str:
    """ "a, b and c" """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


@dataclass(frozen=True)
class Kind:
    """A class of things: those of its subgroups and those named, except those excluded or unclear."""

    one: str
    several: str
    subgroups: frozenset[str] = frozenset()
    named: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()  # in one of the subgroups, but clearly not of this kind
    unclear: frozenset[str] = frozenset()
    unclear_subgroups: frozenset[str] = frozenset()

    def holds(self, entry: Entry) -> bool | None:
        """Whether a thing is of this kind; None if people would disagree."""
        if entry.name in self.unclear:
            return None
        if entry.name in self.named:
            return True
        if entry.name in self.never:
            return False
        if entry.subgroup in self.subgroups:
            return True
        return None if entry.subgroup in self.unclear_subgroups else False


FOOD = names("food-fruit, food-vegetable, food-prepared, food-asian, food-marine, food-sweet")
MEAT = names(
    """chicken, rooster, turkey, duck, goose, hatching chick, baby chick, front-facing baby chick, dove, bird,
    fish, tropical fish, blowfish, octopus, shark, pig, boar, pig face, pig nose, cow, cow face, ox, water
    buffalo, bison, ram, ewe, goat, rabbit, rabbit face, deer, moose, snail, frog, crocodile, horse, kangaroo,
    whale, jellyfish"""
)
KINDS: dict[str, Kind] = {
    kind.one: kind
    for kind in (
        Kind(
            "animal",
            "animals",
            names("animal-mammal, animal-bird, animal-amphibian, animal-reptile, animal-marine, animal-bug"),
            never=names("paw prints, pig nose, feather, wing, spider web, spiral shell"),
            unclear=names(
                """coral, microbe, dragon, dragon face, unicorn, crab, lobster, shrimp, squid, oyster, teddy bear,
                carousel horse, carp streamer, fried shrimp, nesting dolls, nest with eggs, paw prints, pig
                nose, feather, wing, spiral shell, spider web, piñata, wind face"""
            ),
        ),
        Kind(
            "bird",
            "birds",
            names("animal-bird"),
            unclear=names("feather, wing, nest with eggs, empty nest, poultry leg"),
        ),
        Kind(
            "insect",
            "insects",
            named=names("ant, honeybee, beetle, lady beetle, cricket, cockroach, mosquito, fly, butterfly"),
            unclear=names("bug, spider, scorpion, worm, snail, microbe, spider web"),
        ),
        Kind(
            "fruit",
            "fruits",
            names("food-fruit"),
            unclear=names(
                """tomato, olive, coconut, avocado, chestnut, eggplant, cucumber, bell pepper, hot pepper, peanuts,
                beans, pea pod, jack-o-lantern, pie, shortcake, tropical drink, ear of corn"""
            ),
        ),
        Kind(
            "vegetable",
            "vegetables",
            named=names("eggplant, potato, carrot, bell pepper, cucumber, leafy green, broccoli, garlic, onion"),
            unclear=names(
                """ear of corn, avocado, hot pepper, peanuts, beans, chestnut, ginger root, pea pod, tomato, olive,
                green salad, mushroom, roasted sweet potato, herb, jack-o-lantern, french fries"""
            ),
        ),
        Kind(
            "flower",
            "flowers",
            names("plant-flower"),
            unclear=names("rosette, bouquet, potted plant, flower playing cards, cactus, seedling"),
        ),
        Kind(
            "tree",
            "trees",
            named=names("evergreen tree, deciduous tree, palm tree"),
            unclear=names(
                """Christmas tree, tanabata tree, pine decoration, potted plant, seedling, desert island, national
                park"""
            ),
        ),
        Kind(
            "plant",
            "plants",
            names("plant-flower, plant-other"),
            never=names("empty nest, nest with eggs"),
            unclear=names(
                """bouquet, rosette, mushroom, maple leaf, fallen leaf, leaf fluttering in wind, empty nest, nest
                with eggs, Christmas tree, tanabata tree, pine decoration, coral, jack-o-lantern, wood, desert
                island, house with garden"""
            ),
            unclear_subgroups=names("food-fruit, food-vegetable"),
        ),
        Kind(
            "food",
            "food",
            FOOD,
            unclear=MEAT
            | names(
                """cooking, honey pot, ice, mushroom, herb, nest with eggs, jack-o-lantern, sheaf of rice,
                hibiscus, rose, baby bottle, bubble tea, beverage box, mate, teapot, fork and knife with plate,
                jar, amphora"""
            ),
        ),
        Kind(
            "drink",
            "drinks",
            names("drink"),
            unclear=names(
                """baby bottle, teapot, teacup without handle, pouring liquid, ice, bottle with popping cork,
                coconut, jar, honey pot, amphora, droplet, steaming bowl, beverage box, clinking beer mugs,
                clinking glasses, pot of food"""
            ),
        ),
        Kind(
            "vehicle",
            "vehicles",
            names("transport-ground, transport-water, transport-air"),
            never=names(
                """bus stop, motorway, railway track, oil drum, fuel pump, police car light, horizontal traffic
                light, vertical traffic light, stop sign, construction, anchor, ring buoy, seat"""
            ),
            unclear=names(
                """wheel, skateboard, roller skate, kick scooter, manual wheelchair, motorized wheelchair, railway
                car, station, light rail, parachute, satellite, flying saucer, suspension railway, mountain
                cableway, aerial tramway, mountain railway, airplane departure, airplane arrival, sled, shopping
                cart, ferris wheel, roller coaster, carousel horse, elevator, canoe"""
            ),
        ),
        Kind(
            "building",
            "buildings",
            names("place-building, place-religious"),
            never=names("brick, rock, wood"),
            unclear=names(
                """building construction, stadium, wedding, Tokyo tower, Statue of Liberty, kaaba, shinto shrine,
                cityscape, cityscape at dusk, tent, circus tent, station, fountain, bridge at night, night with
                stars, camping, sunset, houses, coffin, moai"""
            ),
        ),
        Kind(
            "musical instrument",
            "musical instruments",
            names("musical-instrument"),
            unclear=names(
                """bell, postal horn, megaphone, wind chime, bellhop bell, musical score, musical note, musical
                notes"""
            ),
        ),
        Kind(
            "tool",
            "tools",
            named=names(
                """hammer, axe, pick, hammer and pick, hammer and wrench, carpentry saw, wrench, screwdriver, clamp"""
            ),
            unclear_subgroups=names(
                """tool, office, science, medical, household, writing, dishware, light & video, computer, phone,
                time, sound, music, arts & crafts, lock, clothing, sport"""
            ),
        ),
        Kind(
            "piece of clothing",
            "pieces of clothing",
            names("clothing"),
            unclear=names(
                """glasses, sunglasses, goggles, folding hand fan, purse, handbag, clutch bag, shopping bags,
                backpack, hair pick, crown, prayer beads, lipstick, ring, gem stone, military helmet, rescue
                worker’s helmet, martial arts uniform, running shirt, boxing glove, ice skate, roller skate,
                diving mask, watch, graduation cap, bikini, ribbon, reminder ribbon, safety pin, thread, yarn"""
            ),
        ),
    )
}

# a plain description of each thing outside all KINDS, to follow "is"
BY_SUBGROUP = {
    "animal-mammal": "a thing of animals",
    "animal-bird": "a part of a bird",
    "animal-marine": "a thing of the sea",
    "animal-reptile": "an animal of stories",
    "animal-bug": "a very small thing",
    "plant-flower": "a thing of flowers",
    "plant-other": "a thing of nature",
    "food-vegetable": "a thing to eat",
    "food-prepared": "a thing of the kitchen",
    "food-marine": "a thing of the sea",
    "food-sweet": "a sweet thing",
    "drink": "a thing for drinks",
    "dishware": "a thing for the table",
    "place-map": "a thing to find the way",
    "place-geographic": "a place",
    "place-building": "a place in town",
    "place-religious": "a place",
    "place-other": "a place",
    "transport-ground": "a thing of the road",
    "transport-water": "a thing of the water",
    "transport-air": "a thing of the air",
    "hotel": "a thing for a trip",
    "time": "a thing to tell the time",
    "sky & weather": "a thing of the sky",
    "event": "a thing for a party",
    "award-medal": "a prize",
    "sport": "a thing for sport",
    "game": "a thing for play",
    "arts & crafts": "a thing for art",
    "clothing": "a thing to wear",
    "sound": "a thing for sound",
    "music": "a thing for music",
    "phone": "a thing for calls",
    "computer": "a thing for work with numbers",
    "light & video": "a thing for light or film",
    "book-paper": "a thing of paper",
    "money": "a thing of money",
    "mail": "a thing for the mail",
    "writing": "a thing to write with",
    "office": "a thing for work",
    "lock": "a thing for a lock",
    "tool": "a thing for work",
    "science": "a thing for science",
    "medical": "a thing for a doctor",
    "household": "a thing for the home",
}


@lru_cache(maxsize=4096)
def kind_of(entry: Entry) -> Kind | None:
    """Returns the most specific kind of the thing; KINDS lists specific kinds before general ones."""
    order = ("bird", "insect", "animal", "fruit", "vegetable", "flower", "tree", "plant", "food", *KINDS)
    return next((KINDS[one] for one in order if KINDS[one].holds(entry)), None)


def what_is(entry: Entry) -> str:
    """ "A lion is an animal." """
    kind, name = kind_of(entry), a(entry.name)
    subject = name[0].upper() + name[1:]
    if kind is None:
        what = BY_SUBGROUP.get(entry.subgroup, "an object")
    elif entry.name in PLURAL:
        what = kind.several
    else:
        what = "food" if kind.one == "food" else a(kind.one)
    return f"{subject} {be(entry.name)} {what}."


@dataclass(frozen=True)
class Use:
    """A use that some things have. All others lack it, except unclear ones."""

    do: str  # after "Which of these can you …?"
    reason: tuple[str, str]  # a full sentence, about one thing and about several
    named: frozenset[str] = frozenset()
    unclear: frozenset[str] = frozenset()
    kind: str | None = None  # all things of this kind, instead of a list
    ours: bool = True  # True: what a person does with it; False: what it does itself

    def holds(self, entry: Entry) -> bool | None:
        if self.kind:
            return KINDS[self.kind].holds(entry)
        return True if entry.name in self.named else None if entry.name in self.unclear else False


USES = (
    Use("eat", ("It is food.", "They are food."), kind="food"),
    Use("drink", ("It is a drink.", "They are drinks."), kind="drink"),
    Use("make music with", ("It is a musical instrument.", "They are musical instruments."), kind="musical instrument"),
    Use("wear", ("It is a piece of clothing.", "They are pieces of clothing."), kind="piece of clothing"),
    Use(
        "take to the beach",
        ("It is good for sun and water.", "They are good for sun and water."),
        names("one-piece swimsuit, bikini, sunglasses, thong sandal, ring buoy, diving mask, umbrella on ground"),
        names(
            """goggles, lotion bottle, shorts, umbrella, closed umbrella, umbrella with rain drops, woman’s hat,
            volleyball, ice cream, soft ice cream, backpack, bucket, folding hand fan, beach with umbrella,
            flying disc, kite, closed book, open book, woman’s sandal, briefs, t-shirt, billed cap, coconut,
            tropical drink, yarn, camera, glasses, basket, motor boat, canoe, watermelon, basketball, soccer
            ball, balloon, handbag, fishing pole, water pistol, dress, running shirt, sailboat"""
        ),
    ),
    Use(
        "use in the rain",
        ("It keeps you dry.", "They keep you dry."),
        names("umbrella, closed umbrella, umbrella with rain drops"),
        names(
            """umbrella on ground, coat, hiking boot, woman’s boot, tent, beach with umbrella, woman’s hat, billed
            cap, gloves"""
        ),
    ),
    Use(
        "write with",
        ("It makes lines on paper.", "They make lines on paper."),
        names("pencil, fountain pen, pen, crayon, black nib"),
        names(
            """paintbrush, keyboard, lipstick, laptop, memo, locked with pen, computer mouse, mobile phone, artist
            palette"""
        ),
    ),
    Use(
        "cut with",
        ("It is sharp.", "They are sharp."),
        names("scissors, kitchen knife, axe, carpentry saw, dagger"),
        names(
            """crossed swords, razor, fork and knife, fork and knife with plate, hammer and pick, pick, ice skate,
            lacrosse"""
        ),
    ),
    Use(
        "tell the time with",
        ("It shows the time.", "They show the time."),
        names("watch, alarm clock, stopwatch, timer clock, mantelpiece clock"),
        names(
            """hourglass done, hourglass not done, mobile phone, mobile phone with arrow, laptop, desktop computer,
            sun, calendar, pager, television, sunrise, compass"""
        ),
    ),
    Use(
        "call a friend with",
        ("It is a phone.", "They are phones."),
        names("mobile phone, telephone, telephone receiver"),
        names("mobile phone with arrow, pager, laptop, fax machine, desktop computer, megaphone, e-mail, radio"),
    ),
    Use(
        "open a lock with",
        ("It is a key.", "They are keys."),
        names("key, old key"),
        names(
            """locked with key, unlocked, locked, locked with pen, hammer, safety pin, axe, hair pick, screwdriver,
            paperclip"""
        ),
    ),
    Use(
        "sit on",
        ("It is a seat.", "They are seats."),
        names("chair, seat"),
        names(
            """couch and lamp, toilet, bed, manual wheelchair, motorized wheelchair, horse, camel, two-hump camel,
            elephant, carousel horse, bicycle, motorcycle, motor scooter, sled, donkey, rock, wood, carousel
            horse"""
        ),
    ),
    Use(
        "use to make light",
        ("It gives light.", "They give light."),
        names("light bulb, flashlight, candle, diya lamp, red paper lantern"),
        names(
            """sun, fire, couch and lamp, police car light, jack-o-lantern, fireworks, sparkler, mobile phone,
            horizontal traffic light, vertical traffic light, star, full moon, glowing star, sun with face,
            camera with flash, birthday cake, battery, high voltage, television, film projector, mirror ball,
            crescent moon, Christmas tree, firecracker, magic wand"""
        ),
    ),
)
LIVES_IN_WATER = Use(
    "live in water",
    ("It lives in water.", "They live in water."),
    names("whale, spouting whale, dolphin, fish, tropical fish, blowfish, shark, octopus, jellyfish, squid"),
    names(
        """seal, crab, lobster, shrimp, oyster, coral, spiral shell, turtle, frog, otter, hippopotamus, penguin,
        duck, swan, crocodile, beaver, lotus, goose, flamingo, microbe, sauropod, worm, fishing pole, carp
        streamer, sushi, fried shrimp, fish cake with swirl, snail, water buffalo, mosquito"""
    ),
    ours=False,
)
CAN_FLY = Use(
    "fly",
    ("It can fly.", "They can fly."),
    names(
        """airplane, small airplane, helicopter, eagle, owl, parrot, dove, bird, bat, honeybee, butterfly,
        mosquito, fly, swan, flamingo"""
    ),
    names(
        """airplane departure, airplane arrival, rocket, parachute, kite, balloon, flying saucer, bug, beetle, lady
        beetle, cricket, cockroach, turkey, chicken, rooster, hatching chick, baby chick, front-facing baby
        chick, penguin, duck, dodo, feather, peacock, wing, goose, satellite, dragon, dragon face, money with
        wings, flying disc, ant, unicorn, comet, shooting star, leaf fluttering in wind, boomerang, mountain
        cableway, aerial tramway, suspension railway, bow and arrow, carp streamer, nest with eggs, soccer ball,
        mosque, badminton, poultry leg, baseball, bubbles, seat, spider"""
    ),
    ours=False,
)

# names that people also use for a whole family: "Is there a bird?" is not asked if there is a duck
LOOSE = names(
    """bird, fish, bug, monkey, chicken, ship, house, train, mouse, bread, automobile, bus, blossom, star, camera,
    hut, castle, mountain, dragon, notebook, closed book, full moon, motor boat, metro, tram, ticket, envelope,
    pen, key, label, dog, cat, memo, railway car, locomotive, cloud, hotel, bank, sandwich, globe with
    meridians, umbrella, calendar, rat, wood, page facing up, page with curl, postbox, musical note, hot
    beverage, candy, coin, bell, sports medal, crescent moon, new moon"""
)


@lru_cache(maxsize=65536)
def confusable(a: Entry, b: Entry) -> bool:
    """Whether a question about one could also be understood as being about the other."""
    if a == b:
        return False
    if a.subgroup == b.subgroup and (a.name in LOOSE or b.name in LOOSE):
        return True
    first, second = (set(re.split(r"[ -]", entry.name.lower())) for entry in (a, b))
    return first <= second or second <= first
