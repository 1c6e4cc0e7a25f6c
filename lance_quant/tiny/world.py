"""A scene is one to three coloured things in the nine cells of a 128 x 128 canvas; everything else here is a table.

A thing is a shape or a glyph, has a colour, a size, a cell, a jitter of a few pixels and a cell it moves to in a clip
(none when it stands still). Every kind has one colour that no training task ever shows (`held_out`). Pictures are
sprites pasted at whole pixels, so that the renderer is a gather on any device and the reader can match against the
very same sprites.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from PIL import Image

CANVAS = 128
GRID = 3
CENTRES = (22, 64, 106)
HALF = 21  # a sprite is 43 x 43 pixels, its drawing ends before the rim
JITTER = 3
SLOTS = 3
WAY = (0.0, 1.0, 1.0, 1.0, 1.0)  # share of its way that a moving thing has made, frame by frame: it hops
CLIP_FRAMES = len(WAY)
STILL = 0.2  # share of clips in which nothing moves

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 225),
    "yellow": (245, 220, 50),
    "purple": (140, 50, 185),
    "orange": (250, 140, 25),
    "cyan": (60, 205, 225),
    "pink": (255, 140, 200),
}
BACKGROUNDS = {"black": (18, 18, 22), "gray": (112, 114, 120), "white": (240, 240, 236)}
SIZES = {"small": 12.5, "large": 17.0}  # radius in pixels
POSITIONS = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # columns, rows of a clip's one move


def _star(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Five points, the inner radius 0.45 of the outer one."""
    angle = torch.remainder(torch.atan2(x, -y), 2 * math.pi / 5)
    angle = torch.minimum(angle, 2 * math.pi / 5 - angle)
    inner = 0.45
    px, py = torch.hypot(x, y) * torch.cos(angle), torch.hypot(x, y) * torch.sin(angle)
    ix, iy = inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5)
    return (1 - px) * iy - py * (1 - ix) >= 0


SHAPES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "circle": lambda x, y: x * x + y * y <= 0.9,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) <= 0.82,
    "triangle": lambda x, y: (y <= 0.8) & (y >= -0.95) & (x.abs() <= (y + 0.95) * 0.57),
    "diamond": lambda x, y: x.abs() * 1.35 + y.abs() <= 1.0,
    "cross": lambda x, y: (torch.minimum(x.abs(), y.abs()) <= 0.3) & (torch.maximum(x.abs(), y.abs()) <= 0.98),
    "star": _star,
}

# 5 x 7 bitmaps, one hexadecimal byte a row, the lowest five bits are the pixels from left to right
GLYPHS = {
    "0": "0e11131519110e", "1": "040c040404040e", "2": "0e11010204081f", "3": "1f02040201110e", "4": "02060a121f0202",
    "5": "1f101e0101110e", "6": "0608101e11110e", "7": "1f010204080808", "8": "0e11110e11110e", "9": "0e11110f01020c",
    "A": "0e11111f111111", "C": "0e11101010110e", "E": "1f10101e10101f", "F": "1f10101e101010", "H": "1111111f111111",
    "K": "11121418141211", "L": "1010101010101f", "P": "1e11111e101010", "T": "1f040404040404", "X": "11110a040a1111",
}  # fmt: skip

KINDS = (*SHAPES, *GLYPHS)
_COLOUR_NAMES, _BACKGROUND_NAMES, _SIZE_NAMES = tuple(COLOURS), tuple(BACKGROUNDS), tuple(SIZES)


def held_out(colour: str, kind: str) -> bool:
    """True for the one colour of every kind that training never shows."""
    return held_out_colour(KINDS.index(kind)) == _COLOUR_NAMES.index(colour)


def held_out_colour(kind_index: int) -> int:
    return (3 * kind_index + 1) % len(COLOURS)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: `kind` of KINDS, names of the tables, `cell` 0..8 row-major, jitter (dx, dy) in pixels,
    `goal` the cell it reaches in the last frame of a clip."""

    kind: str
    colour: str
    size: str
    cell: int
    dx: int = 0
    dy: int = 0
    goal: int | None = None

    def centre(self, way: float = 0.0) -> tuple[int, int]:
        """(x, y) in whole pixels when it has made that share of its way."""
        goal = self.cell if self.goal is None else self.goal
        at = [CENTRES[self.cell % GRID], CENTRES[self.cell // GRID]]
        to = [CENTRES[goal % GRID], CENTRES[goal // GRID]]
        x, y = (round(a + (b - a) * way) for a, b in zip(at, to, strict=True))
        return x + self.dx, y + self.dy

    @property
    def is_glyph(self) -> bool:
        return self.kind in GLYPHS

    @property
    def direction(self) -> str | None:
        """The move of MOVES that the thing makes, None where it stands still."""
        if self.goal is None or self.goal == self.cell:
            return None
        step = (self.goal % GRID - self.cell % GRID, self.goal // GRID - self.cell // GRID)
        return next(name for name, move in MOVES.items() if move == step)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Things in reading order of their cells, on one background."""

    things: tuple[Thing, ...]
    background: str

    @property
    def is_held_out(self) -> bool:
        return any(held_out(thing.colour, thing.kind) for thing in self.things)

    @property
    def mover(self) -> Thing | None:
        """The one thing that moves in the clip."""
        return next((thing for thing in self.things if thing.direction), None)

    def lone(self) -> list[int]:
        """Indices of things that colour and kind tell from all others."""
        names = [(thing.colour, thing.kind) for thing in self.things]
        return [index for index, name in enumerate(names) if names.count(name) == 1]


# ---------------------------------------------------------------- drawing scenes at random


def sample_scene(rng: random.Random, *, unseen: bool = False, things: int | None = None, jitter: int = JITTER) -> Scene:
    """A scene; with `unseen` its first drawn thing is a held-out combination, else none is."""
    count = things or rng.choices((1, 2, 3), (3, 4, 3))[0]
    cells = rng.sample(range(GRID * GRID), count)
    drawn = []
    twins = count > 1 and rng.random() < 0.15
    for slot, cell in enumerate(cells):
        if twins and slot:
            drawn.append(replace(drawn[0], cell=cell, dx=_jitter(rng, jitter), dy=_jitter(rng, jitter)))
            continue
        kind = rng.choice(tuple(GLYPHS) if rng.random() < 0.25 else tuple(SHAPES))
        lost = held_out_colour(KINDS.index(kind))
        colour = lost if unseen and slot == 0 else (lost + rng.randint(1, len(COLOURS) - 1)) % len(COLOURS)
        drawn.append(
            Thing(
                kind=kind,
                colour=_COLOUR_NAMES[colour],
                size=rng.choice(_SIZE_NAMES),
                cell=cell,
                dx=_jitter(rng, jitter),
                dy=_jitter(rng, jitter),
            )
        )
    return Scene(things=tuple(sorted(drawn, key=lambda thing: thing.cell)), background=rng.choice(_BACKGROUND_NAMES))


def sample_clip(rng: random.Random, *, unseen: bool = False) -> Scene:
    """A scene in which one thing moves to a free neighbouring cell, or nothing does."""
    while True:
        scene = sample_scene(rng, unseen=unseen)
        if rng.random() < STILL:
            return scene
        taken = {thing.cell for thing in scene.things}
        moves = []
        for at in scene.lone():
            column, row = scene.things[at].cell % GRID, scene.things[at].cell // GRID
            for dx, dy in MOVES.values():
                goal = (row + dy) * GRID + column + dx
                if 0 <= column + dx < GRID and 0 <= row + dy < GRID and goal not in taken:
                    moves.append((at, goal))
        if moves:
            at, goal = rng.choice(moves)
            return _swap(scene, at, replace(scene.things[at], goal=goal))


def _jitter(rng: random.Random, reach: int) -> int:
    return rng.randint(-reach, reach)


def _recolour(scene: Scene, at: int, rng: random.Random) -> Scene:
    thing = scene.things[at]
    lost = held_out_colour(KINDS.index(thing.kind))
    names = [n for i, n in enumerate(COLOURS) if n != thing.colour and i != lost]
    return _swap(scene, at, replace(thing, colour=rng.choice(names)))


def _resize(scene: Scene, at: int, rng: random.Random) -> Scene:
    thing = scene.things[at]
    return _swap(scene, at, replace(thing, size="small" if thing.size == "large" else "large"))


def _remove(scene: Scene, at: int, rng: random.Random) -> Scene:
    return replace(scene, things=scene.things[:at] + scene.things[at + 1 :])


def _move(scene: Scene, at: int, rng: random.Random) -> Scene:
    free = sorted(set(range(GRID * GRID)) - {thing.cell for thing in scene.things})
    return _swap(scene, at, replace(scene.things[at], cell=rng.choice(free)))


def _swap(scene: Scene, at: int, thing: Thing) -> Scene:
    things = [*scene.things[:at], thing, *scene.things[at + 1 :]]
    return replace(scene, things=tuple(sorted(things, key=lambda each: each.cell)))


# name -> (scene, index of the thing, rng) -> the edited scene; the words for them are in language.EDIT_WORDS
EDITS: dict[str, Callable[[Scene, int, random.Random], Scene]] = {
    "recolour": _recolour,
    "resize": _resize,
    "remove": _remove,
    "move": _move,
}


# ---------------------------------------------------------------- drawing pictures


class SceneBatch(NamedTuple):
    """Scenes as int64 tensors [B, SLOTS] (`kind` -1: no thing) and `background` [B]; x, y are centres in pixels."""

    kind: torch.Tensor
    colour: torch.Tensor
    size: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    background: torch.Tensor

    def to(self, device: str | torch.device) -> SceneBatch:
        return SceneBatch(*(part.to(device) for part in self))


def pack(scenes: list[Scene], way: float = 0.0) -> SceneBatch:
    """Scenes as tensors, when things have made that share of their way."""
    rows = []
    for scene in scenes:
        row = [
            [KINDS.index(t.kind), _COLOUR_NAMES.index(t.colour), _SIZE_NAMES.index(t.size), *t.centre(way)]
            for t in scene.things
        ]
        rows.append(row + [[-1, 0, 0, 64, 64]] * (SLOTS - len(row)))
    table = torch.tensor(rows, dtype=torch.int64).reshape(len(scenes), SLOTS, 5)
    background = torch.tensor([_BACKGROUND_NAMES.index(scene.background) for scene in scenes], dtype=torch.int64)
    return SceneBatch(*table.unbind(-1), background)


def random_batch(count: int, generator: torch.Generator) -> tuple[SceneBatch, torch.Tensor]:
    """`count` random scenes drawn on the generator's device, none held out, and pixel velocities [B, SLOTS, 2]
    a frame: the fast source of pictures for the VAE."""
    device = generator.device

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, (count, *shape), generator=generator, device=device)

    glyph = draw(0, 4, SLOTS) == 0
    kind = torch.where(glyph, draw(len(SHAPES), len(KINDS), SLOTS), draw(0, len(SHAPES), SLOTS))
    colour = (3 * kind + 1 + draw(1, len(COLOURS), SLOTS)) % len(COLOURS)
    cells = torch.rand(count, GRID * GRID, generator=generator, device=device).argsort(1)[:, :SLOTS]
    first, spacing = CENTRES[0], CENTRES[1] - CENTRES[0]
    present = torch.arange(SLOTS, device=device) < draw(1, SLOTS + 1, 1)
    batch = SceneBatch(
        kind=torch.where(present, kind, -1),
        colour=colour,
        size=draw(0, len(SIZES), SLOTS),
        x=first + spacing * (cells % GRID) + draw(-JITTER, JITTER + 1, SLOTS),
        y=first + spacing * (cells // GRID) + draw(-JITTER, JITTER + 1, SLOTS),
        background=draw(0, len(BACKGROUNDS)),
    )
    return batch, draw(-11, 12, SLOTS, 2)


@cache
def sprites(device: str = "cpu") -> torch.Tensor:
    """Coverage in 0..1, float32 [kinds, sizes, 43, 43], 8 x 8 samples a pixel."""
    side, fine = 2 * HALF + 1, 8
    axis = (torch.arange(side * fine, dtype=torch.float64) + 0.5) / fine - side / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    atlas = torch.stack([torch.stack([_inside(kind, x / r, y / r) for r in SIZES.values()]) for kind in KINDS])
    atlas = torch.nn.functional.avg_pool2d(atlas.float(), fine)
    return atlas.to(device)


def _inside(kind: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether points in units of the radius lie inside the drawing; a glyph is 1.5 wide and 2.1 high."""
    if kind in SHAPES:
        return SHAPES[kind](x, y)
    bitmap = torch.tensor([[row >> bit & 1 for bit in range(4, -1, -1)] for row in bytes.fromhex(GLYPHS[kind])])
    column, row = torch.floor(x / 0.30 + 2.5).long(), torch.floor(y / 0.30 + 3.5).long()
    on = (column >= 0) & (column < 5) & (row >= 0) & (row < 7)
    return on & bitmap[row.clamp(0, 6), column.clamp(0, 4)].bool()


@cache
def palette(device: str = "cpu") -> torch.Tensor:
    """Backgrounds, then colours, float32 [11, 3] in 0..255."""
    return torch.tensor([*BACKGROUNDS.values(), *COLOURS.values()], dtype=torch.float32).to(device)


def render(batch: SceneBatch) -> torch.Tensor:
    """uint8 pictures [B, 3, 128, 128] on the batch's device; later slots paint over earlier ones."""
    device = str(batch.kind.device)
    atlas, colours = sprites(device), palette(device)
    axis = torch.arange(CANVAS, device=device)
    picture = colours[batch.background][:, :, None, None].expand(-1, -1, CANVAS, CANVAS)
    for slot in range(batch.kind.shape[1]):
        row = (axis - batch.y[:, slot, None] + HALF).clamp(0, 2 * HALF)
        column = (axis - batch.x[:, slot, None] + HALF).clamp(0, 2 * HALF)
        kind = batch.kind[:, slot]
        cover = atlas[
            kind.clamp(min=0)[:, None, None], batch.size[:, slot, None, None], row[:, :, None], column[:, None]
        ]
        cover = (cover * (kind >= 0)[:, None, None])[:, None]
        paint = colours[len(BACKGROUNDS) + batch.colour[:, slot]][:, :, None, None]
        picture = picture + (paint - picture) * cover
    return picture.round().to(torch.uint8)


def picture(scene: Scene, way: float = 0.0) -> Image.Image:
    """The scene as a 128 x 128 RGB picture."""
    return Image.fromarray(render(pack([scene], way))[0].permute(1, 2, 0).contiguous().numpy())


def clip(scene: Scene) -> tuple[Image.Image, ...]:
    """The scene as CLIP_FRAMES pictures."""
    return tuple(picture(scene, way) for way in WAY)
