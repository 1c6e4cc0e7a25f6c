"""Questions have the answer that the scene gives, and words never leak a held-out combination."""

import random

import pytest

from lance_quant.tiny import language, world

CIRCLE = world.Thing(kind="circle", colour="red", size="small", cell=0)
LETTER = world.Thing(kind="A", colour="blue", size="large", cell=5)
SCENE = world.Scene(things=(CIRCLE, LETTER), background="gray")

ANSWERS = {
    "What color is the circle?": "red",
    "What color is the letter A?": "blue",
    "What is the blue object?": "letter A",
    "What is at the top left?": "red circle",
    "What is at the bottom?": "nothing",
    "Where is the red circle?": "top left",
    "What size is the blue letter A?": "large",
    "What letter is shown?": "A",
    "How many objects are there?": "2",
    "How many circles are there?": "1",
    "How many red objects are there?": "1",
    "Is there a red circle?": "yes",
    "Is the red circle left of the blue letter A?": "yes",
    "Is the red circle below the blue letter A?": "no",
    "What color is the background?": "gray",
    "Describe the image.": "a small red circle at the top left, a large blue letter A at the right, gray background",
}


def test_answers():
    rng = random.Random(0)
    asked = {}
    for _ in range(3000):
        question = language.ask(SCENE, rng)
        asked.setdefault(question.question, question.answer)
        assert asked[question.question] == question.answer
    for question, answer in ANSWERS.items():
        if question in asked:
            assert asked[question] == answer
    assert len(ANSWERS.keys() & asked.keys()) >= len(ANSWERS) - 1


@pytest.mark.parametrize("row", language.QUESTIONS)
def test_every_row_asks(row):
    assert language.ask(SCENE, random.Random(1), row).row == row or row == "glyph"


def test_training_words_name_no_held_out_pair():
    lost = [
        f"{colour} {language.noun(kind)}"
        for kind in world.SHAPES
        for colour in world.COLOURS
        if world.held_out(colour, kind)
    ]
    rng = random.Random(2)
    for _ in range(1500):
        scene = world.sample_scene(rng)
        words = " ".join([language.caption(scene, rng), *language.ask(scene, rng)[1:]])
        assert not any(pair in words for pair in lost), words


def test_captions_name_every_thing():
    rng = random.Random(3)
    for _ in range(200):
        caption = language.caption(SCENE, rng)
        assert "red circle" in caption and "blue letter A" in caption
