"""Scenes with their words, pictures and clips, made once per call and kept on the device: a step is then a gather.

Worker processes draw scenes and write token ids; the device paints the frames, shrinks them for the vision tower and
encodes them with the tiny VAE. Everything follows from one seed, whatever the number of workers.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from lance_quant.tiny import world
from lance_quant.tiny.autoencoder import constants, encode_clips, encode_frames, to_unit
from lance_quant.tiny.layouts import VIT_EDGE
from lance_quant.tiny.texts import MEDIA, PoolPlan, write_texts


class Words(NamedTuple):
    """A task's words: ids int16 [N, texts, slot]; marks int16 [N, texts, 3]: length, where the answer starts, row of
    texts.ROWS; able: indices of the scenes of which the task has something to say."""

    ids: torch.Tensor
    marks: torch.Tensor
    able: torch.Tensor


class Painted(NamedTuple):
    """Scenes: kind (-1: none), colour, size, cell, goal int64 [N, SLOTS], x, y [N, frames, SLOTS], background [N]."""

    kind: torch.Tensor
    colour: torch.Tensor
    size: torch.Tensor
    background: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    cell: torch.Tensor
    goal: torch.Tensor

    def frames(self, part: slice) -> torch.Tensor:
        """uint8 [B, frames, 3, 128, 128]."""
        kind, colour, size, ground = (column[part] for column in self[:4])
        return torch.stack(
            [
                world.render(world.SceneBatch(kind, colour, size, self.x[part, frame], self.y[part, frame], ground))
                for frame in range(self.x.shape[1])
            ],
            1,
        )


class Pool(NamedTuple):
    """On the device: what the tower sees uint8 [N, frames, 3, 112, 112]; latents of scenes and of edited scenes
    bf16 [N, latents, 48]; words by task; the scenes."""

    small: torch.Tensor
    latents: torch.Tensor
    edited: torch.Tensor
    words: dict[str, Words]
    scenes: Painted
    edited_scenes: Painted


@cache
def _shrink(device: str) -> torch.Tensor:
    """[112, 128]: Pillow's antialiased bicubic resize along one axis, as a matrix."""
    unit = torch.eye(world.CANVAS)[None, None]
    matrix = F.interpolate(unit, size=(VIT_EDGE, world.CANVAS), mode="bicubic", antialias=True, align_corners=False)
    return matrix[0, 0].to(device)


def shrink(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 128, 128] -> uint8 [..., 112, 112]: what the vision tower looks at."""
    matrix = _shrink(str(pictures.device))
    return (matrix @ pictures.float() @ matrix.T).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def latents_of(vae, frames: torch.Tensor) -> torch.Tensor:
    """uint8 [B, frames, 3, 128, 128] -> normalised latents float32 [B, t * 64, 48]."""
    mean, std = constants(frames.device)
    if frames.shape[1] == 1:
        raw = encode_frames(vae, to_unit(frames[:, 0]))[0][:, :, None]
    else:
        raw = encode_clips(vae, to_unit(frames.transpose(1, 2)))[0]
    return ((raw - mean[:, :, None]) / std[:, :, None]).flatten(2).transpose(1, 2)


def build_pools(tokenizer: Tokenizer, vae, plans: list[PoolPlan], device: str, workers: int) -> list[Pool]:
    """Write the words of all plans at once, then paint and encode each."""
    tables = write_texts(tokenizer, plans, workers)
    return [_paint(table, MEDIA[plan.medium], vae, device) for table, plan in zip(tables, plans, strict=True)]


def _paint(table: dict[str, torch.Tensor], tasks: dict[str, int], vae, device: str) -> Pool:
    scenes, edited = (
        Painted(*(table[f"{prefix}/{name}"].long().to(device) for name in Painted._fields))
        for prefix in ("scene", "edited")
    )
    count, frames = scenes.x.shape[:2]
    small = torch.empty(count, frames, 3, VIT_EDGE, VIT_EDGE, dtype=torch.uint8, device=device)
    latents = [torch.empty(count, 64 * (1 + (frames - 1) // 4), 48, dtype=torch.bfloat16, device=device) for _ in "12"]
    step = (1024 if frames == 1 else 256) if device.startswith("cuda") else 32
    for start in range(0, count, step):
        part = slice(start, start + step)
        for which, into in zip((scenes, edited), latents, strict=True):
            pictures = which.frames(part)
            if which is scenes:
                small[part] = shrink(pictures)
            into[part] = latents_of(vae, pictures).to(torch.bfloat16)
    words = {}
    for task in tasks:
        ids, marks = (table[f"{task}/{name}"].to(device) for name in ("ids", "marks"))
        words[task] = Words(ids, marks, (marks[:, 0, 0] > 0).nonzero().squeeze(1))
    return Pool(small, *latents, words, scenes, edited)
