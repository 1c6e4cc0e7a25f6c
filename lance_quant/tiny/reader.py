"""Reads a scene back from a picture: background, then per cell the colour, then the sprite that overlaps best.

Deterministic and batched on any device. The sprites are the renderer's own, so that a true picture is read without
error and what a generated picture costs is the picture's fault.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lance_quant.tiny.world import (
    BACKGROUNDS,
    CANVAS,
    CENTRES,
    COLOURS,
    GRID,
    HALF,
    JITTER,
    KINDS,
    SIZES,
    Scene,
    Thing,
    palette,
    sprites,
)

SHIFT = JITTER + 4  # pixels a thing may be off its cell's centre
MIN_AREA = 45.0  # pixels of coverage below which a cell is empty
MIN_OVERLAP = 0.72  # Dice overlap with the best sprite below which a thing is of no known kind
COLOUR_WIDTH = 40.0  # how far a pixel may lie from its palette colour, in levels
_CELLS = GRID * GRID
_SIDE = 2 * HALF + 1


class Reading(NamedTuple):
    """int64 [B, 9] per cell: `kind` (-1 nothing, -2 unreadable), `colour`, `size`; `background` [B]; `overlap`
    float [B, 9]."""

    kind: torch.Tensor
    colour: torch.Tensor
    size: torch.Tensor
    background: torch.Tensor
    overlap: torch.Tensor

    def scene(self, index: int) -> Scene:
        """The reading as a scene without jitter; things of no known kind are left out."""
        things = tuple(
            Thing(
                kind=KINDS[self.kind[index, cell]],
                colour=tuple(COLOURS)[self.colour[index, cell]],
                size=tuple(SIZES)[self.size[index, cell]],
                cell=cell,
            )
            for cell in range(_CELLS)
            if self.kind[index, cell] >= 0
        )
        return Scene(things=things, background=tuple(BACKGROUNDS)[self.background[index]])

    def things(self, index: int) -> list[tuple[int, int, int, int]]:
        """(kind, colour, size, cell) of everything that stands there, sorted, as numbers of the tables; an unreadable
        thing has kind -2."""
        columns = (part[index].tolist() for part in (self.kind, self.colour, self.size))
        cells = zip(*columns, range(_CELLS), strict=True)
        return sorted(thing for thing in cells if thing[0] != -1)

    def unreadable(self, index: int) -> bool:
        return bool((self.kind[index] == -2).any())


@torch.no_grad()
def read(pictures: torch.Tensor) -> Reading:
    """uint8 pictures [B, 3, 128, 128] -> what stands in each cell; the result lies on the CPU."""
    device = str(pictures.device)
    parts = [_read(chunk, device) for chunk in pictures.split(256)]
    return Reading(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _read(pictures: torch.Tensor, device: str) -> tuple[torch.Tensor, ...]:
    count = len(pictures)
    values = pictures.float()
    colours, grounds = palette(device)[len(BACKGROUNDS) :], palette(device)[: len(BACKGROUNDS)]
    rim = torch.cat([values[:, :, :2].flatten(2), values[:, :, -2:].flatten(2)], 2).median(2).values
    background = torch.cdist(rim, grounds).argmin(1)
    ground = grounds[background][:, :, None, None, None]

    # [B, 3, 9, 43, 43] windows around the cells
    cells = torch.stack(
        [values[:, :, y - HALF : y + HALF + 1, x - HALF : x + HALF + 1] for y in CENTRES for x in CENTRES], 2
    )
    difference = cells - ground
    far = difference.square().sum(1).sqrt()  # [B, 9, 43, 43]
    votes = torch.stack(
        [
            (torch.exp(-(cells - c.view(1, 3, 1, 1, 1)).square().sum(1) / (2 * COLOUR_WIDTH**2)) * (far > 50)).sum(
                (2, 3)
            )
            for c in colours
        ],
        2,
    )
    colour = votes.argmax(2)  # [B, 9]
    paint = colours[colour].permute(0, 2, 1)[..., None, None] - ground  # [B, 3, 9, 1, 1]
    cover = ((difference * paint).sum(1) / paint.square().sum(1)).clamp(0, 1)
    cover = torch.where(far > 24, cover, 0.0)
    area = (far > 60).float().sum((2, 3))

    atlas = sprites(device).flatten(0, 1)  # [kinds * sizes, 43, 43]
    overlap = torch.zeros(count, _CELLS, device=device)
    kind = torch.full((count, _CELLS), -1, device=device)
    size = torch.zeros(count, _CELLS, dtype=torch.int64, device=device)
    full = area > MIN_AREA
    windows = cover[full]
    if len(windows):
        products = F.conv2d(F.pad(windows[:, None], [SHIFT] * 4), atlas[:, None])
        products = products.amax((2, 3))  # [N, kinds * sizes]
        energy = windows.square().sum((1, 2))[:, None] + atlas.square().sum((1, 2))[None]
        best = (2 * products / energy).max(1)
        overlap[full] = best.values
        kind[full] = torch.where(best.values >= MIN_OVERLAP, best.indices // len(SIZES), -2)
        size[full] = best.indices % len(SIZES)
    return kind, colour, size, background, overlap


def same_scene(reading: Reading, index: int, scene: Scene) -> bool:
    """Whether background and every thing with kind, colour, size and cell are as in `scene`."""
    seen = reading.scene(index)
    wanted = {(t.cell, t.kind, t.colour, t.size) for t in scene.things}
    return (
        not reading.unreadable(index)
        and seen.background == scene.background
        and {(t.cell, t.kind, t.colour, t.size) for t in seen.things} == wanted
    )


def matches(reading: Reading, index: int, scene: Scene) -> bool:
    """Whether the picture shows exactly the things of `scene`: how many, which kinds, in which colours."""
    seen = Counter((t.kind, t.colour) for t in reading.scene(index).things)
    return not reading.unreadable(index) and seen == Counter((t.kind, t.colour) for t in scene.things)


def agreement(pictures: torch.Tensor, scenes: list[Scene], judge=same_scene) -> float:
    """Share of pictures that `judge` finds right."""
    reading = read(pictures)
    return sum(judge(reading, i, scene) for i, scene in enumerate(scenes)) / len(scenes)


assert CENTRES[0] >= HALF and CENTRES[-1] + HALF < CANVAS
