"""Words of a pool: worker processes draw scenes and write token ids. They import nothing of the models."""

from __future__ import annotations

import multiprocessing
import os
import random
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from lance_quant.tiny import language, world
from lance_quant.tiny.layouts import CAPTION_WIDTH, TEXT_WIDTH, AskLayout, DrawLayout

CHUNK = 2500


@dataclass(frozen=True, kw_only=True)
class PoolPlan:
    """How many scenes, how many questions and captions of each, and whether they show held-out combinations."""

    scenes: int
    asks: int = 3
    captions: int = 2
    unseen: bool = False
    seed: int = 0


ROWS = tuple(language.QUESTIONS)


def _write(job: tuple[str, PoolPlan, int, int]) -> tuple[np.ndarray, ...]:
    """One chunk of scenes as arrays; runs in a worker."""
    source, plan, chunk, count = job
    tokenizer = Tokenizer.from_str(source)
    ask, draw = AskLayout(tokenizer), DrawLayout(tokenizer)
    rng = random.Random(f"{plan.seed}/{plan.unseen}/{chunk}")
    scenes = [world.sample_scene(rng, unseen=plan.unseen) for _ in range(count)]
    text = np.zeros((count, plan.asks, TEXT_WIDTH), np.int16)
    spans = np.zeros((count, plan.asks, 2), np.int16)
    rows = np.zeros((count, plan.asks), np.int16)
    captions = np.zeros((count, plan.captions, CAPTION_WIDTH), np.int16)
    lengths = np.zeros((count, plan.captions), np.int16)
    for index, scene in enumerate(scenes):
        for place in range(plan.asks):
            asked = language.ask(scene, rng)
            text[index, place], *spans[index, place] = ask.text(asked.prompt, asked.answer)
            rows[index, place] = ROWS.index(asked.row)
        for place in range(plan.captions):
            captions[index, place], lengths[index, place] = draw.caption(language.caption(scene, rng))
    packed = world.pack(scenes)
    return text, spans, rows, captions, lengths, *(part.numpy().astype(np.int16) for part in packed)


def write_texts(tokenizer: Tokenizer, plan: PoolPlan, workers: int) -> list[torch.Tensor]:
    source = tokenizer.to_str()
    starts = range(0, plan.scenes, CHUNK)
    jobs = [(source, plan, i, min(CHUNK, plan.scenes - start)) for i, start in enumerate(starts)]
    if workers > 1 and len(jobs) > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as processes:
            parts = processes.map(_write, jobs, chunksize=1)
    else:
        parts = [_write(job) for job in jobs]
    return [torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]
