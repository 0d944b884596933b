"""The drawn world: scenes, questions about them, data sets, and the grading of replies."""

import io
import json
import random
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from examples.tiny import dataset, phrases, questions, score, things, world
from examples.tiny.glyphs import Entry, Glyphs, read_names
from examples.tiny.paint import COLORS, TEXTURES, WORDS, lost_on, stylise
from examples.tiny.questions import Asker, Turn
from examples.tiny.talk import talk
from examples.tiny.truth import SIDES, Truth
from examples.tiny.vocabulary import vocabulary
from llava.errors import ConfigError, ImageError
from llava.eval.marks import correct, number, tokens, without_printed

FOLDER = Path(__file__).parent / "glyphs"
GLYPHS = Glyphs.load(FOLDER)
KNOWLEDGE = dataset.know(GLYPHS)
BY_NAME = {entry.name: entry for entry in GLYPHS.entries}


def scenes(n: int, **options) -> list[world.Scene]:
    return [world.draw(seed, GLYPHS, GLYPHS.styles, **options) for seed in range(n)]


def everything() -> list[Entry]:
    """All things in the world if Unicode's list is on this machine; otherwise those of the tests."""
    file = Path("/usr/share/unicode/emoji/emoji-test.txt")
    return read_names(file) if file.is_file() else GLYPHS.entries


def turns_of(n: int, which: phrases.Phrasing = "training") -> list[tuple[world.Scene, Turn]]:
    found = []
    for seed in range(n):
        scene = world.imagine(seed, GLYPHS.entries)
        found += [(scene, turn) for turn in questions.dialogue(Asker(random.Random(seed), KNOWLEDGE, which), scene, 6)]
    return found


# ---------------------------------------------------------------- glyphs


def test_committed_glyphs_are_few_small_and_of_both_training_styles() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 300_000
    assert (len(GLYPHS.entries), GLYPHS.styles) == (24, ["noto", "twemoji"])
    assert all(GLYPHS.image(entry, style).mode == "RGBA" for entry in GLYPHS.entries for style in GLYPHS.styles)
    assert max(max(GLYPHS.image(entry, "noto").size) for entry in GLYPHS.entries) == 112


def test_names_are_read_from_the_unicode_list(tmp_path) -> None:
    lines = """\
        # group: Animals & Nature
        # subgroup: animal-mammal
        1F415 ; fully-qualified # x E0.7 dog
        1F415 200D 1F9BA ; fully-qualified # x E12.0 service dog
        # group: Travel & Places
        # subgroup: sky & weather
        2600 FE0F ; fully-qualified # x E0.6 sun
        2600 ; unqualified # x E0.6 sun
        1F550 ; fully-qualified # x E0.6 one o’clock
        # group: Flags
        1F6A9 ; fully-qualified # x E0.6 triangular flag"""
    file = tmp_path / "emoji-test.txt"
    file.write_text("\n".join(line.strip() for line in lines.splitlines()), encoding="utf-8")
    assert read_names(file) == [
        Entry("1f415", "dog", "Animals & Nature", "animal-mammal"),
        Entry("2600", "sun", "Travel & Places", "sky & weather"),
    ]


def test_an_invalid_pack_and_a_missing_style_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"index\.json is missing"):
        Glyphs.load(tmp_path)
    with pytest.raises(ImageError, match="no picture of dog in style openmoji; available styles: noto, twemoji"):
        GLYPHS.image(BY_NAME["dog"], "openmoji")


# ---------------------------------------------------------------- scenes


def test_a_scene_depends_only_on_its_seed() -> None:
    for seed in range(20):
        first, again = (world.draw(seed, GLYPHS, GLYPHS.styles, stylise_p=0.5) for _ in range(2))
        assert first == again
        assert first.image.tobytes() == again.image.tobytes()
    assert len({scene.image.tobytes() for scene in scenes(20)}) == 20


def test_things_are_at_their_stated_positions() -> None:
    """Compared with an empty background, each box is filled to its edges, and nothing is drawn outside the boxes."""
    for scene in scenes(60, words=()):
        if scene.background.kind != "plain":
            continue
        ground = Image.new("RGB", scene.size, scene.image.getpixel((0, 0)))
        drawn = np.asarray(ImageChops.difference(scene.image, ground)).max(axis=2) > 12
        for thing in scene.objects:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= scene.size[0]
            assert 0 <= top < bottom <= scene.size[1]
            assert drawn[top:bottom, left:right].mean() > 0.04  # some things are thin
            drawn[top:bottom, left:right] = False
        assert not drawn.any()


def test_things_barely_overlap_and_words_never() -> None:
    for scene in scenes(150):
        boxes = [thing.box for thing in scene.objects]
        assert all(world.overlap(a, b) <= 0.1 for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(world.overlap(word.box, box) == 0 for word in scene.words for box in boxes)


def test_scenes_vary() -> None:
    drawn = scenes(300)
    assert {len(scene.objects) for scene in drawn} == {1, 2, 3, 4, 5, 6}
    assert {len(scene.words) for scene in drawn} == {0, 1, 2}
    assert {"plain", "gradient", *TEXTURES} == {scene.background.kind for scene in drawn}
    assert {scene.background.color for scene in drawn} == {*COLORS, None}
    # with and without repeated things
    assert {len(Truth(scene).counts) == len(scene.objects) for scene in drawn} == {
        True,
        False,
    }
    sizes = np.array([scene.size for scene in drawn])
    assert (sizes.min(), sizes.max()) >= (120, 240)
    assert sizes.max() <= 256
    assert all(word.text in WORDS for scene in drawn for word in scene.words)


def test_no_thing_has_the_colour_of_its_background() -> None:
    """At most a third of a thing may be invisible on its background."""
    for scene in scenes(80, n_objects=2):
        color = scene.background.color
        for thing in scene.objects if color else []:
            assert lost_on(GLYPHS.image(thing.entry, thing.style))[list(COLORS).index(color)] < 0.34


def test_held_back_pairs_occur_together_only_on_request() -> None:
    def holds(scene: world.Scene) -> bool:
        entries = {thing.entry for thing in scene.objects}
        return any(world.held_back(a, b) for a in entries for b in entries)

    assert not any(holds(scene) for scene in scenes(200))
    assert not any(holds(world.imagine(seed, GLYPHS.entries)) for seed in range(200))
    # a crowded scene may drop a thing
    assert sum(holds(scene) for scene in scenes(40, n_objects=4, pairs="held back")) >= 38
    every = everything()
    share = np.mean([world.held_back(a, b) for a in every[:60] for b in every if a != b])
    assert 0.05 < share < 0.15


def test_another_style_keeps_the_shape() -> None:
    rng = random.Random(0)
    for entry in GLYPHS.entries:
        glyph = GLYPHS.image(entry, "noto")
        for _ in range(5):
            other = stylise(rng, glyph)
            assert 0.6 < other.width / other.height / (glyph.width / glyph.height) < 1.7
            assert other.getchannel("A").getextrema()[1] > 100


# ---------------------------------------------------------------- things


def test_all_lists_name_existing_things() -> None:
    every = {entry.name for entry in everything()}
    if len(every) < 100:
        pytest.skip("Unicode's list is not on this machine (Debian: unicode-data)")
    listed = things.PLURAL | things.BARE | things.LOOSE
    for kind in things.KINDS.values():
        listed |= kind.named | kind.never | kind.unclear
    for use in (*things.USES, things.LIVES_IN_WATER, things.CAN_FLY):
        listed |= use.named | use.unclear
    assert listed - every == set()
    subgroups = {entry.subgroup for entry in everything()}
    for kind in things.KINDS.values():
        assert kind.subgroups | kind.unclear_subgroups <= subgroups


def test_articles_and_plurals() -> None:
    assert [things.a(name) for name in ("owl", "unicorn", "hourglass done", "scissors", "bread", "red apple")] == [
        "an owl", "a unicorn", "an hourglass done", "scissors", "bread", "a red apple"
    ]  # fmt: skip
    plurals = {"bus": "buses", "hot dog": "hot dogs", "fish": "fish", "potato": "potatoes", "box": "boxes"}
    assert {name: things.many(name) for name in plurals} == plurals
    assert [things.many(name) for name in ("wolf", "scissors", "glass of milk", "butterfly", "bow and arrow")] == [
        None
    ] * 5
    assert all(many.startswith(entry.name) for entry in everything() if (many := things.many(entry.name)))


def test_kinds() -> None:
    holds = {
        (name, kind): things.KINDS[kind].holds(BY_NAME[name])
        for name, kind in [
            ("dog", "animal"),
            ("hot dog", "animal"),
            ("penguin", "bird"),
            ("red apple", "food"),
            ("tropical fish", "food"),
        ]
    }
    assert list(holds.values()) == [True, False, True, True, None]
    assert things.what_is(BY_NAME["scissors"]) == "Scissors are a thing for work."
    assert things.what_is(BY_NAME["owl"]) == "An owl is a bird."


# ---------------------------------------------------------------- questions


def test_every_topic_holds_back_phrasings_that_data_never_uses() -> None:
    for topic in phrases.TOPICS:
        kept, used = phrases.phrasings(topic, "held back"), phrases.phrasings(topic, "training")
        assert kept
        assert len(kept) <= max(2, 0.2 * len(used))
        assert not set(kept) & set(used)
    # questions have their slots filled, so only phrasings without slots other than {pic} can be compared
    kept = {line.format(pic=name) for topic in phrases.TOPICS for line in phrases.phrasings(topic, "held back")
            if "{" not in line.replace("{pic}", "") for name in phrases.PICTURE}  # fmt: skip
    used = {line.format(pic=name) for topic in phrases.TOPICS for line in phrases.phrasings(topic, "training")
            if "{" not in line.replace("{pic}", "") for name in phrases.PICTURE}  # fmt: skip
    asked = {turn.question for _, turn in turns_of(300)}
    assert not asked & (kept - used)
    assert {turn.question for _, turn in turns_of(300, "held back")} & (kept - used)


def test_all_kinds_are_asked_about_and_yes_is_as_frequent_as_no() -> None:
    turns = [turn for _, turn in turns_of(700)]
    shares = {kind: n / len(turns) for kind, n in Counter(turn.kind for turn in turns).items()}
    assert set(shares) == {*score.CONVERSATION, "detail", "complex"}
    assert min(shares.values()) > 0.03
    answers = Counter(turn.answer.split(",")[0] for turn in turns if turn.kind == "yes or no")
    assert set(answers) == {"Yes", "No"}
    assert 0.4 < answers["Yes"] / answers.total() < 0.6


def test_answers_contain_names_and_counts_are_numbers() -> None:
    words = vocabulary(GLYPHS.entries)
    for scene, turn in turns_of(300):
        there = {thing.entry.name for thing in scene.objects}
        said = words.split(without_printed(turn.answer))[0]
        match turn.kind:
            case "naming":
                assert len(said & there) == 1
            case "listing" | "detail":
                assert said == there
            case "absent":
                assert said
                assert not said & there
            case "counting":
                assert number(tokens(turn.answer)) in range(7)


def test_counts_match_the_scene() -> None:
    for scene, turn in turns_of(400):
        if turn.kind == "counting" and "objects." in turn.answer:
            assert number(tokens(turn.answer)) == len(scene.objects)
            assert not scene.words
        for entry, n in Truth(scene).counts.items():
            if turn.kind == "counting" and turn.answer == f"There are {things.NUMBERS[n]} {things.many(entry.name)}.":
                assert n == sum(thing.entry == entry for thing in scene.objects) > 1


def test_relations_are_unambiguous() -> None:
    """A thing to the left of another ends before the other begins, and is further to the left than above or below."""
    words = vocabulary(GLYPHS.entries)
    seen = 0
    for scene, turn in turns_of(500):
        match = [side for side, words in SIDES.items() if f" {words} the " in turn.answer]
        if turn.kind != "position" or not match or turn.measure != "place":
            continue
        one, other = (next(iter(words.split(part)[0])) for part in turn.answer.split(SIDES[match[0]]))
        boxes = {thing.entry.name: thing.box for thing in scene.objects}
        (l1, t1, r1, b1), (l2, t2, r2, b2) = boxes[one], boxes[other]
        apart = {"left": r1 <= l2, "right": l1 >= r2, "above": b1 <= t2, "below": t1 >= b2}
        across, down = abs(l1 + r1 - l2 - r2), abs(t1 + b1 - t2 - b2)
        assert apart[match[0]]
        assert across > 1.5 * down if match[0] in ("left", "right") else down > 1.5 * across
        seen += 1
    assert seen > 20


def test_no_question_uses_an_ambiguous_name() -> None:
    dog, poodle, bird, owl = (
        Entry("1", "dog", "", "animal-mammal"), Entry("2", "guide dog", "", "animal-mammal"),
        Entry("3", "bird", "", "animal-bird"), Entry("4", "owl", "", "animal-bird"),
    )  # fmt: skip
    assert things.confusable(dog, poodle)
    assert things.confusable(bird, owl)
    assert not things.confusable(owl, Entry("5", "penguin", "", "animal-bird"))
    boxes = [(10 + 60 * i, 10, 50 + 60 * i, 50) for i in range(2)]
    placed = [world.Placed(entry, "noto", box) for entry, box in zip((dog, poodle), boxes, strict=True)]
    scene = world.Scene(Image.new("RGB", (1, 1)), placed, [], world.Background("plain", "red"), (200, 120))
    assert Truth(scene).clear == []


def test_odd_one_out_is_the_only_one() -> None:
    def scene_of(*names: str) -> Truth:
        placed = [world.Placed(BY_NAME[name], "noto", (40 * i, 0, 40 * i + 30, 30)) for i, name in enumerate(names)]
        return Truth(world.Scene(Image.new("RGB", (1, 1)), placed, [], world.Background("plain", "red"), (200, 120)))

    ask = Asker(random.Random(0), KNOWLEDGE)
    turn = questions.odd_one(ask, scene_of("dog", "cat", "lion", "guitar"))
    assert turn is not None
    assert turn.answer == "The guitar is the odd one out. The others are animals."
    assert questions.odd_one(ask, scene_of("dog", "cat", "red apple", "banana")) is None
    assert questions.odd_one(ask, scene_of("dog", "guitar")) is None
    # three animals, one of them a bird, so the banana is the only odd one out
    assert questions.odd_one(ask, scene_of("dog", "guitar", "banana")) is None


def test_colour_is_asked_only_where_all_styles_agree() -> None:
    colors = {entry.name: shade for entry, shade in KNOWLEDGE.colors.items()}
    assert colors["cactus"] == "green"
    assert not {"soccer ball", "tropical fish", "guitar", "lion"} & set(colors)


# ---------------------------------------------------------------- marks


def test_correct_answers_get_full_marks_and_others_do_not() -> None:
    words, rng = vocabulary(GLYPHS.entries), random.Random(0)
    turns = [turn for _, turn in turns_of(500)]
    assert all(correct(turn.measure, turn.answer, turn.answer, words) for turn in turns)
    assert not any(correct(turn.measure, turn.answer, "", words) for turn in turns)
    chance = {}
    for kind in ("naming", "counting", "position", "colour", "yes or no", "listing"):
        own = [turn for turn in turns if turn.kind == kind]
        chance[kind] = np.mean([correct(turn.measure, turn.answer, rng.choice(own).answer, words) for turn in own])
    assert 0.35 < chance.pop("yes or no") < 0.65
    assert chance.pop("counting") < 0.5
    assert max(chance.values()) < 0.25


def test_every_name_is_found_in_an_answer() -> None:
    """Even if one name contains another: a hot dog is not a dog."""
    every = everything()
    words = vocabulary(every)
    for entry in every:
        for text in (f"This is {things.a(entry.name)}.", f"There is no {entry.name} in the picture."):
            assert words.split(text)[0] == {entry.name}
        if many := things.many(entry.name):
            assert words.split(f"There are three {many}.")[0] == {entry.name}


def test_a_perfect_model_gets_full_scores_on_unseen_scenes() -> None:
    asked = list(score.items(GLYPHS, GLYPHS.styles, 60, 0))
    scores = score.tally(asked, [item.turn.answer for item in asked], vocabulary(GLYPHS.entries))
    assert list(scores) == ["noto", "twemoji"]
    for style in scores.values():
        assert all(share["right"] == 1 for share in style["kinds"].values())
        assert style["detail"]["objects invented"] == 0
        assert style["detail"]["objects named"] == 1
        assert all(share["questions"] > 10 for share in style["conversation by subset"].values())
    assert min(item.seed for item in asked) >= dataset.TRAINING_SEEDS


# ---------------------------------------------------------------- data


def test_text_only_dialogues_need_no_picture() -> None:
    said = [turn for seed in range(300) for turn in talk(Asker(random.Random(seed), KNOWLEDGE), 3)]
    assert all(turn.question and turn.answer and "{" not in turn.question + turn.answer for turn in said)
    assert len({turn.answer for turn in said}) > 200


@pytest.mark.parametrize("kind", ["caption", "instruct"])
def test_data_is_in_the_llava_format(tmp_path, kind) -> None:
    dataset.write(dataset.Job((FOLDER,), kind, 3, None, 0.3), tmp_path / "data", 120)
    samples = json.loads((tmp_path / "data" / "data.json").read_text(encoding="utf-8"))
    with tarfile.open(tmp_path / "data" / "images.tar") as tar:
        pictures = {member.name: Image.open(io.BytesIO(tar.extractfile(member).read())).size for member in tar}
    assert len(samples) == 120
    assert {sample["image"] for sample in samples if "image" in sample} == set(pictures)
    assert any(width != height for width, height in pictures.values())
    for sample in samples:
        said = sample["conversations"]
        assert [turn["from"] for turn in said] == ["human", "gpt"] * (len(said) // 2)
        assert said[0]["value"].startswith("<image>\n") == ("image" in sample)
        assert sum(turn["value"].count("<image>") for turn in said) == ("image" in sample)
        assert 1 <= len(said) // 2 <= (6 if kind == "instruct" else 1)
    without = sum("image" not in sample for sample in samples)
    assert 2 <= without <= 20 if kind == "instruct" else without == 0


def test_data_does_not_depend_on_the_number_of_workers(tmp_path) -> None:
    for workers in ("1", "2"):
        command = [
            sys.executable,
            "-m",
            "examples.tiny.dataset",
            "--glyphs",
            str(FOLDER),
            "--kind",
            "instruct",
            "--n",
            "230",
        ]
        command += ["--seed", "5", "--stylise", "0.2", "--entries", "8", "--workers", workers]
        subprocess.run([*command, "--out", str(tmp_path / workers)], check=True, cwd=FOLDER.parent.parent, timeout=120)
    for file in ("data.json", "images.tar"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_an_existing_folder_is_not_overwritten(tmp_path) -> None:
    with pytest.raises(ConfigError, match="already exists"):
        dataset.write(dataset.Job((FOLDER,), "text", 0, None, 0.0), tmp_path, 5)


def test_text_covers_all_names_and_printed_words(tmp_path) -> None:
    dataset.write(dataset.Job((FOLDER,), "text", 0, None, 0.0), tmp_path / "text", 3000)
    assert [path.name for path in (tmp_path / "text").iterdir()] == ["data.json"]
    said = json.loads((tmp_path / "text" / "data.json").read_text(encoding="utf-8"))
    answers = " ".join(turn["value"] for sample in said for turn in sample["conversations"][1::2])
    assert all(name in answers for name in BY_NAME)
    assert np.mean([f" {word}" in answers for word in WORDS]) > 0.9
