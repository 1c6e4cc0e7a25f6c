"""Questions have the answer that the scene gives, and words never leak a held-out combination."""

import random
from dataclasses import replace

import pytest

from lance_quant.model.request import CLIP_TASKS
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
        asked.setdefault(question.prompt, question.answer)
        assert asked[question.prompt] == question.answer
    for question, answer in ANSWERS.items():
        if question in asked:
            assert asked[question] == answer
    assert len(ANSWERS.keys() & asked.keys()) >= len(ANSWERS) - 1


MOVING = replace(SCENE, things=(CIRCLE, replace(LETTER, goal=8)))
MOVING_ANSWERS = {
    "What moves?": "blue letter A",
    "Where does the blue letter A move?": "down",
    "Where does the red circle move?": "nowhere",
    "What color is the moving object?": "blue",
    "Describe the video.": ANSWERS["Describe the image."] + ", the blue letter A moves down",
}


def test_clip_answers():
    rng = random.Random(0)
    asked = [language.SAYINGS["x2t_video"](MOVING, rng) for _ in range(500)]
    answers = {each.prompt: each.answer for each in asked}
    assert {question: answers[question] for question in MOVING_ANSWERS} == MOVING_ANSWERS
    still = {each.prompt: each.answer for each in (language.SAYINGS["x2t_video"](SCENE, rng) for _ in range(500))}
    assert still["What moves?"] == "nothing" and still["Where does the red circle move?"] == "nowhere"


def test_motions_are_told():
    rng = random.Random(0)
    assert language.SAYINGS["i2v"](MOVING, rng).prompt == "The blue letter A moves down."
    assert language.SAYINGS["t2v"](MOVING, rng).prompt.endswith(", the blue letter A moves down")
    alone = world.Scene(things=(replace(CIRCLE, goal=1),), background="white")
    assert any(language.SAYINGS["t2v"](alone, rng).prompt == "a red circle moves right" for _ in range(50))
    assert any(
        language.SAYINGS["t2v"](replace(alone, things=(CIRCLE,)), rng).prompt == "a red circle" for _ in range(50)
    )


def test_edits_keep_the_motion():
    rng = random.Random(0)
    for _ in range(50):
        said = language.SAYINGS["video_edit"](MOVING, rng)
        assert said.row in language.CLIP_EDITS and said.target.things
        if said.row != "remove":
            assert said.target.mover.goal == 8
    twins = world.Scene(things=(CIRCLE, replace(CIRCLE, cell=3)), background="gray")
    assert language.edit(twins, rng) is None


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
    for _ in range(1000):
        for task, say in language.SAYINGS.items():
            said = say((world.sample_clip if task in CLIP_TASKS else world.sample_scene)(rng), rng)
            words = f"{said.prompt} {said.answer}" if said else ""
            assert not any(pair in words for pair in lost), words
            assert said is None or not said.target.is_held_out


def test_captions_name_every_thing():
    rng = random.Random(3)
    for _ in range(200):
        caption = language.caption(SCENE, rng)
        assert "red circle" in caption and "blue letter A" in caption
