"""What is right passes its task's rule, and each kind of mistake fails."""

import random
from dataclasses import replace

import pytest
import torch

from lance_quant.tiny import judge, texts, world
from lance_quant.tiny.pools import Painted
from lance_quant.tiny.reader import read


def shown(scene: world.Scene) -> judge.Shown:
    first, last = (read(world.render(world.pack([scene], time))) for time in (0.0, 1.0))
    return judge.seen(first, last, 0)


CIRCLE = world.Thing(kind="circle", colour="red", size="large", cell=0, goal=1)
STAR = world.Thing(kind="star", colour="blue", size="small", cell=8)
SCENE = world.Scene(things=(CIRCLE, STAR), background="gray")
MISTAKES = {  # what is drawn instead -> the tasks that call it wrong
    "another colour": (replace(SCENE, things=(replace(CIRCLE, colour="pink"), STAR)), set(judge.RULES)),
    "another kind": (replace(SCENE, things=(CIRCLE, replace(STAR, kind="cross"))), set(judge.RULES)),
    "one missing": (replace(SCENE, things=(CIRCLE,)), set(judge.RULES)),
    "another size": (replace(SCENE, things=(CIRCLE, replace(STAR, size="large"))), {"image_edit", "video_edit"}),
    "another background": (replace(SCENE, background="black"), {"image_edit", "video_edit"}),
    "another place": (
        replace(SCENE, things=(CIRCLE, replace(STAR, cell=6))),
        {"i2v", "image_edit", "video_edit"},
    ),
    "no motion": (
        replace(SCENE, things=(replace(CIRCLE, goal=None), STAR)),
        {"t2v", "i2v", "image_edit", "video_edit"},
    ),
    "another motion": (
        replace(SCENE, things=(replace(CIRCLE, goal=3), STAR)),
        {"t2v", "i2v", "image_edit", "video_edit"},
    ),
    "all moves": (
        replace(SCENE, things=(CIRCLE, replace(STAR, goal=7))),
        {"t2v", "i2v", "image_edit", "video_edit"},
    ),
}


@pytest.mark.parametrize("task", judge.RULES)
def test_the_scene_itself_is_right(task):
    rng = random.Random(0)
    for _ in range(10):
        scene = world.sample_clip(rng)
        assert judge.RULES[task](shown(scene), shown(scene))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    scene, wrong = MISTAKES[name]
    made, true = shown(scene), shown(SCENE)
    assert {task for task, rule in judge.RULES.items() if not rule(made, true)} == wrong


def test_a_clip_may_stand_elsewhere():
    moved = world.Scene(things=(replace(CIRCLE, cell=4, goal=5), replace(STAR, cell=6)), background="white")
    assert judge.RULES["t2v"](shown(moved), shown(SCENE))


FAULTS = {  # what is drawn -> what is wrong first, where the circle should move right
    "": (CIRCLE, STAR),
    "first frame": (replace(CIRCLE, kind="cross"), STAR),
    "no room": (replace(CIRCLE, cell=2, goal=5), STAR),
    "motion": (replace(CIRCLE, goal=3), STAR),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_fault_of_a_clip(fault):
    assert judge.clip_fault(shown(world.Scene(things=FAULTS[fault], background="gray")), shown(SCENE)) == fault


def test_faults_of_a_clip_that_two_frames_tell():
    crowded = shown(world.Scene(things=(replace(CIRCLE, goal=3), replace(STAR, cell=1)), background="gray"))
    assert judge.clip_fault(crowded, shown(SCENE)) == "no room"
    true = shown(SCENE)
    assert judge.clip_fault(true._replace(last=true.last[1:]), true) == "last frame"


def test_painted_scenes_are_what_the_reader_sees():
    rng = random.Random(1)
    scenes = [world.sample_clip(rng) for _ in range(12)]
    plan = texts.paint_plan(scenes, world.CLIP_FRAMES)
    painted = Painted(*(torch.from_numpy(plan[name]).long() for name in Painted._fields))
    frames = painted.frames(slice(0, 12))
    for index, scene in enumerate(scenes):
        for frame, picture in enumerate(world.clip(scene)):
            assert frames[index, frame].permute(1, 2, 0).contiguous().numpy().tobytes() == picture.tobytes()
    first, last = (read(frames[:, at]) for at in (0, -1))
    assert [judge.seen(first, last, i) for i in range(12)] == judge.wanted(painted, torch.arange(12))
