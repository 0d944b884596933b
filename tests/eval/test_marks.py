"""Replies are marked by what they have in common with the reference answer."""

import pytest

from llava.eval.marks import MEASURES, Measure, Vocabulary, correct, found_and_invented, mark

THINGS = {"dog": ["dog", "dogs"], "hot dog": ["hot dog", "hot dogs"], "cat": ["cat", "cats"], "bus": ["bus", "buses"]}
WORDS = Vocabulary.of(THINGS, ["red", "blue"], ["ZOO", "BUS", "CAT", "26"])
DESCRIPTION = "There is a dog and two cats. The word BUS is printed in red."


@pytest.mark.parametrize(
    ("measure", "answer", "right", "wrong"),
    [
        ("names", "This is a dog.", "It's a dog!", "This is a hot dog."),
        ("names", "There is a dog and two cats.", "Cats. Also, a dog.", "There is a dog."),
        ("names", "There is a dog and two cats.", "A dog, a cat", "There is a dog, a cat and a bus."),
        ("names", "This is a cat.", "A cat, and the word DOG.", "This says CAT."),
        ("names", "None of these.", "You can eat none of them.", "The dog."),
        ("names", "None of these.", "No, none.", "I see."),
        ("number", "There are three dogs.", "I see 3 dogs.", "There are two dogs."),
        ("number", "There are no dogs.", "There are 0.", "There is one dog."),
        ("number", "There are no dogs.", "None.", ""),
        ("place", "The dog is at the top left.", "Top left", "The dog is at the top."),
        ("place", "The dog is above the cat.", "above", "The dog is below the cat."),
        ("color", "The dog is red.", "red", "The dog is blue and red."),
        ("color", "The background is blue.", "It is blue.", "It is grayish."),
        ("yes or no", "Yes, there is a dog.", "yes", "There is a dog, yes."),
        ("yes or no", "No, there is no dog.", "No.", "Not yes"),
        ("words", "It says ZOO and 26.", "26 ZOO", "It says ZOO."),
        ("words", "It says ZOO.", "ZOO", "It says zoo."),
        ("words", "There is no text in the picture.", "There is none.", "It says ZOO."),
        ("words", "There is no text in the picture.", "Nothing.", "It says something."),
        ("none", "There is no dog in the picture.", "No dog is there.", "The dog is on the left."),
        ("none", "There is no dog in the picture.", "There is none.", "There is no dog, but a cat."),
        ("detail", DESCRIPTION, "Two cats and a dog.", "Two cats, a dog and a bus."),
    ],
)
def test_a_reply_is_correct_if_it_agrees_with_the_answer(measure: Measure, answer, right, wrong) -> None:
    assert correct(measure, answer, answer, WORDS)
    assert correct(measure, answer, right, WORDS)
    assert not correct(measure, answer, wrong, WORDS)
    assert mark(measure, answer, right, WORDS) == 1
    assert mark(measure, answer, wrong, WORDS) < 1


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("reply", ["", " ", "\n", "?!", "🐕", "I am a language model."])
def test_a_reply_without_an_answer_gets_nothing(measure: Measure, reply) -> None:
    answer = "No dog at the top is red: 26, and two cats."  # has something of everything
    assert mark(measure, answer, reply, WORDS) == 0


@pytest.mark.parametrize(
    ("reply", "counts", "f1"),
    [
        (DESCRIPTION, (2, 2, 0), 1),
        ("There are three dogs and a bus and a hot dog.", (1, 2, 2), 2 / 5),  # precision 1/3, recall 1/2
        ("There is a dog.", (1, 2, 0), 2 / 3),  # precision 1, recall 1/2
        ("There is a dog, a cat and a bus.", (2, 2, 1), 4 / 5),  # precision 2/3, recall 1
        ("There is a bus.", (0, 2, 1), 0),
        ("It is a nice picture.", (0, 2, 0), 0),
    ],
)
def test_a_description_gets_the_f1_of_the_things_that_it_names(reply, counts, f1) -> None:
    assert found_and_invented(DESCRIPTION, reply, WORDS) == counts
    assert mark("detail", DESCRIPTION, reply, WORDS) == pytest.approx(f1)


def test_a_description_of_nothing_is_right_if_it_names_nothing() -> None:
    assert mark("detail", "The background is red.", "It is red.", WORDS) == 1
    assert mark("detail", "The background is red.", "A dog.", WORDS) == 0


def test_vocabularies_differ_if_any_of_their_words_does() -> None:
    same = Vocabulary.of(dict(reversed(THINGS.items())), ["blue", "red"], ["26", "CAT", "BUS", "ZOO"])
    others = [
        Vocabulary.of(THINGS | {"owl": ["owl"]}, ["red", "blue"], ["ZOO", "BUS", "CAT", "26"]),
        Vocabulary.of(THINGS, ["red"], ["ZOO", "BUS", "CAT", "26"]),
        Vocabulary.of(THINGS, ["red", "blue"], ["ZOO"]),
    ]
    assert same == WORDS
    assert repr(same) == repr(WORDS)  # it is part of the fingerprint of a run
    assert len({one.digest for one in [*others, WORDS]}) == 4
