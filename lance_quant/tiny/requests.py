"""Procedural scenes as requests: questions with their answers, captions with their pictures."""

import random

from lance_quant.model.request import Request
from lance_quant.tiny.language import INSTRUCTION, ask, caption
from lance_quant.tiny.world import picture, sample_scene


def scene_requests(tasks: list[str], count: int, edge: int, *, seed: int, unseen: bool) -> list[Request]:
    """`count` requests a task, the same for the same seed.

    edge: side in pixels of the pictures to draw. unseen: scenes that show what Lance-tiny never trained on.
    """
    out = []
    for task in tasks:
        rng = random.Random(f"{task}/{seed}/{unseen}")
        for index in range(count):
            scene = sample_scene(rng, unseen=unseen)
            image = picture(scene)
            name = f"{task}-{index:03d}"
            if task == "x2t_image":
                asked = ask(scene, rng)
                out.append(
                    Request(
                        task=task,
                        name=name,
                        prompt=asked.question,
                        instruction=INSTRUCTION,
                        answer=asked.answer,
                        image=image,
                    )
                )
            else:
                out.append(
                    Request(task=task, name=name, prompt=caption(scene, rng), image=image, height=edge, width=edge)
                )
    return out
