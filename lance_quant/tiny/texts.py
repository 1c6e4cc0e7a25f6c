"""Words of a pool: worker processes draw scenes and write token ids. They import nothing of the models.

A medium is pictures or clips; a row of `MEDIA` tells what is said of each of its scenes.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from lance_quant.tiny import language, world
from lance_quant.tiny.layouts import frames_of, layout_of, write_slot

CHUNK = 1000

# medium -> task -> texts of every scene; an edit comes with a scene of its own and is one
MEDIA = {
    "pictures": {"x2t_image": 3, "t2i": 2, "image_edit": 1},
    "clips": {"x2t_video": 3, "t2v": 2, "i2v": 1, "video_edit": 1},
}
EDIT_TASK = {"pictures": "image_edit", "clips": "video_edit"}
# names of what is said, across tasks: an answer's or a motion's row as a number
ROWS = tuple(dict.fromkeys((*language.QUESTIONS, *language.CLIP_QUESTIONS, "caption", "still", "moving", *world.EDITS)))


@dataclass(frozen=True, kw_only=True)
class PoolPlan:
    """How many scenes of which medium, and whether they show held-out combinations."""

    medium: str
    scenes: int
    unseen: bool = False
    seed: int = 0


def paint_plan(scenes: list[world.Scene], frames: int) -> dict[str, np.ndarray]:
    """What the device needs to paint scenes and to judge pictures of them: see `pools.Painted`."""
    packed = [world.pack(scenes, way) for way in world.WAY[:frames]]
    cells = np.zeros((2, len(scenes), world.SLOTS), np.int16)
    for index, scene in enumerate(scenes):
        for slot, thing in enumerate(scene.things):
            cells[:, index, slot] = thing.cell, thing.cell if thing.goal is None else thing.goal
    arrays = {name: getattr(packed[0], name).numpy() for name in ("kind", "colour", "size", "background")}
    arrays |= {axis: np.stack([getattr(batch, axis).numpy() for batch in packed], 1) for axis in "xy"}
    arrays = {name: array.astype(np.int16) for name, array in arrays.items()}
    return arrays | {"cell": cells[0], "goal": cells[1]}


def _write(job: tuple[str, PoolPlan, int, int]) -> dict[str, np.ndarray]:
    """One chunk of scenes as arrays by name; runs in a worker."""
    source, plan, chunk, count = job
    tokenizer = Tokenizer.from_str(source)
    rng = random.Random(f"{plan.medium}/{plan.seed}/{plan.unseen}/{chunk}")
    tasks = MEDIA[plan.medium]
    sample = world.sample_clip if plan.medium == "clips" else world.sample_scene
    scenes = [sample(rng, unseen=plan.unseen) for _ in range(count)]
    edited = list(scenes)
    out: dict[str, np.ndarray] = {}
    for task, texts in tasks.items():
        layout = layout_of(task, source)
        ids = np.zeros((count, texts, layout.slot), np.int16)
        marks = np.zeros((count, texts, 3), np.int16)  # length, where the answer starts, row
        for index, scene in enumerate(scenes):
            for place in range(texts):
                said = language.SAYINGS[task](scene, rng)
                if said is None:  # the length stays 0
                    continue
                ids[index, place], *marks[index, place, :2] = write_slot(layout, tokenizer, said.prompt, said.answer)
                marks[index, place, 2] = ROWS.index(said.row)
                if task == EDIT_TASK[plan.medium]:
                    edited[index] = said.target
        out |= {f"{task}/ids": ids, f"{task}/marks": marks}
    frames = frames_of(EDIT_TASK[plan.medium])
    for prefix, which in (("scene", scenes), ("edited", edited)):
        out |= {f"{prefix}/{name}": array for name, array in paint_plan(which, frames).items()}
    return out


def write_texts(tokenizer: Tokenizer, plans: list[PoolPlan], workers: int) -> list[dict[str, torch.Tensor]]:
    """The arrays of every plan; the same whatever the number of workers."""
    source = tokenizer.to_str()
    jobs, owners = [], []
    for owner, plan in enumerate(plans):
        for chunk, start in enumerate(range(0, plan.scenes, CHUNK)):
            jobs.append((source, plan, chunk, min(CHUNK, plan.scenes - start)))
            owners.append(owner)
    if workers > 1 and len(jobs) > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as processes:
            parts = processes.map(_write, jobs, chunksize=1)
    else:
        parts = [_write(job) for job in jobs]
    out = []
    for owner in range(len(plans)):
        mine = [part for part, who in zip(parts, owners, strict=True) if who == owner]
        out.append({name: torch.from_numpy(np.concatenate([part[name] for part in mine])) for name in mine[0]})
    return out
