"""Scenes with their words and pictures, made once per call and kept on the device: a training step is then a gather.

Worker processes draw scenes and write token ids; the device paints the pictures, shrinks them for the vision tower
and encodes them with the tiny VAE. Everything follows from one seed, whatever the number of workers.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from lance_quant.tiny import world
from lance_quant.tiny.autoencoder import constants, encode_frames, to_unit
from lance_quant.tiny.layouts import VIT_EDGE
from lance_quant.tiny.texts import PoolPlan, write_texts


class Pool(NamedTuple):
    """On the device: small uint8 [N, 3, 112, 112]; latents bf16 [N, 64, 48]; text int16 [N, asks, TEXT_WIDTH] with
    spans [N, asks, 2]; captions int16 [N, captions, CAPTION_WIDTH] with lengths [N, captions]; rows: question row
    of each text."""

    small: torch.Tensor
    latents: torch.Tensor
    text: torch.Tensor
    spans: torch.Tensor
    captions: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    batch: world.SceneBatch


@cache
def _shrink(device: str) -> torch.Tensor:
    """[112, 128]: Pillow's antialiased bicubic resize along one axis, as a matrix."""
    unit = torch.eye(world.CANVAS)[None, None]
    matrix = F.interpolate(unit, size=(VIT_EDGE, world.CANVAS), mode="bicubic", antialias=True, align_corners=False)
    return matrix[0, 0].to(device)


def shrink(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, 128, 128] -> uint8 [B, 3, 112, 112]: what the vision tower looks at."""
    matrix = _shrink(str(pictures.device))
    return (matrix @ pictures.float() @ matrix.T).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def latents_of(vae, pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, 128, 128] -> normalised latents [B, 64, 48], float32."""
    mean, std = constants(pictures.device)
    raw = encode_frames(vae, to_unit(pictures))[0]
    return ((raw - mean) / std).flatten(2).transpose(1, 2)


def build_pool(tokenizer: Tokenizer, vae, plan: PoolPlan, device: str, workers: int) -> Pool:
    """Write the words, paint the pictures, encode them."""
    text, spans, rows, captions, lengths, *packed = write_texts(tokenizer, plan, workers)
    batch = world.SceneBatch(*(part.long().to(device) for part in packed))
    count = plan.scenes
    small = torch.empty(count, 3, VIT_EDGE, VIT_EDGE, dtype=torch.uint8, device=device)
    latents = torch.empty(count, 64, 48, dtype=torch.bfloat16, device=device)
    step = 1024 if device.startswith("cuda") else 64
    for start in range(0, count, step):
        part = slice(start, start + step)
        pictures = world.render(world.SceneBatch(*(column[part] for column in batch)))
        small[part] = shrink(pictures)
        latents[part] = latents_of(vae, pictures).to(torch.bfloat16)
    words = (part.to(device) for part in (text, spans, captions, lengths, rows))
    return Pool(small, latents, *words, batch)
