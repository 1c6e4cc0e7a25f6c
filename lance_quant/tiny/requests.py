"""Procedural scenes as requests of all seven tasks, with the answer, picture or clip that should come out."""

import random

from lance_quant.model.request import CLIP_TASKS, GIVEN, INSTRUCTIONS, UNDERSTANDING, Request
from lance_quant.tiny.language import SAYINGS, Said
from lance_quant.tiny.world import CLIP_FRAMES, Scene, clip, picture, sample_clip, sample_scene

SIZED = ("t2i", "t2v")  # the others take their size from what they are given


def scene_requests(tasks: list[str], count: int, edge: int, *, seed: int, unseen: bool) -> list[Request]:
    """`count` requests a task, the same for the same seed.

    edge: side in pixels of the pictures and clips to draw. unseen: scenes that show what Lance-tiny never trained on.
    """
    out = []
    for task in tasks:
        rng = random.Random(f"{task}/{seed}/{unseen}")
        for index in range(count):
            scene, said = speak(task, rng, unseen=unseen)
            out.append(_request(task, scene, said, edge, name=f"{task}-{index:03d}"))
    return out


def speak(task: str, rng: random.Random, *, unseen: bool) -> tuple[Scene, Said]:
    """A scene that the task can say something of, and what it says."""
    sample = sample_clip if task in CLIP_TASKS else sample_scene
    while True:
        scene = sample(rng, unseen=unseen)
        said = SAYINGS[task](scene, rng)
        if said:
            return scene, said


def _request(task: str, scene: Scene, said: Said, edge: int, *, name: str) -> Request:
    moving, given = task in CLIP_TASKS, GIVEN.get(task)
    target = clip(said.target) if moving else (picture(said.target),)
    return Request(
        task=task,
        name=name,
        prompt=said.prompt,
        instruction=INSTRUCTIONS.get(task, ""),
        answer=said.answer,
        image=picture(scene) if given == "image" else None,
        video=clip(scene) if given == "video" else (),
        target=() if task in UNDERSTANDING else target,
        height=edge if task in SIZED else 0,
        width=edge if task in SIZED else 0,
        frames=CLIP_FRAMES if moving else 1,
    )
