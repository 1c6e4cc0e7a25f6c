"""Drawn landscapes that can be painted at any size and moment, so that what is asked and changed is known exactly."""

import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

COLOURS = {
    "red": (200, 44, 40),
    "blue": (42, 84, 190),
    "yellow": (238, 200, 52),
    "white": (240, 240, 236),
    "orange": (232, 130, 36),
    "purple": (122, 60, 160),
    "green": (52, 150, 74),
    "pink": (236, 140, 170),
}
SKIES = {  # time of day -> colour at the top and at the horizon
    "noon": ((70, 140, 220), (190, 224, 246)),
    "dawn": ((96, 110, 170), (250, 206, 170)),
    "sunset": ((60, 50, 110), (250, 140, 80)),
    "night": ((8, 12, 38), (36, 48, 92)),
}
GROUNDS = {"meadow": (92, 160, 70), "desert": (220, 186, 120), "snow": (236, 242, 248), "autumn field": (190, 134, 60)}
MOVERS = ("hot-air balloon", "sailing boat", "car", "bird")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
SCALE = 2  # painted this much larger, for smooth edges


@dataclass(frozen=True)
class Landscape:
    """time, ground, colours: keys of the tables above; mover: one of MOVERS or "" for none."""

    time: str
    ground: str
    house: str
    trees: int
    mover: str
    mover_colour: str
    clouds: int
    seed: int


def draw_landscape(rng: random.Random) -> Landscape:
    house, mover_colour = rng.sample(list(COLOURS), 2)
    return Landscape(
        time=rng.choice(list(SKIES)),
        ground=rng.choice(list(GROUNDS)),
        house=house,
        trees=rng.randint(1, 6),
        mover=rng.choice(MOVERS),
        mover_colour=mover_colour,
        clouds=rng.randint(0, 4),
        seed=rng.randrange(2**31),
    )


def paint(scene: Landscape, size: tuple[int, int], moment: float = 0.3) -> Image.Image:
    """The landscape at a size; moment 0..1 moves what moves from one side to the other."""
    width, height = size[0] * SCALE, size[1] * SCALE
    image = _sky(scene, width, height)
    draw = ImageDraw.Draw(image)
    rng = random.Random(scene.seed)
    horizon = int(height * 0.62)
    _sun(draw, scene, rng, width, horizon)
    for _ in range(scene.clouds):
        _cloud(draw, rng.random() * width, rng.uniform(0.08, 0.3) * height, rng.uniform(0.04, 0.08) * width)
    _hills(draw, scene, rng, width, height, horizon)
    _house(draw, scene, rng.uniform(0.15, 0.7) * width, horizon + 0.2 * height, 0.13 * min(width, height))
    for index in range(scene.trees):
        x = (index + rng.uniform(0.2, 0.8)) * width / scene.trees
        _tree(draw, scene, x, horizon + rng.uniform(0.04, 0.16) * height, rng.uniform(0.07, 0.11) * height)
    if scene.mover:
        _mover(draw, scene, moment, width, height, horizon)
    return image.resize(size, Image.Resampling.LANCZOS)


def _sky(scene: Landscape, width: int, height: int) -> Image.Image:
    top, bottom = SKIES[scene.time]
    column = Image.new("RGB", (1, 64))
    for row in range(64):
        share = row / 63
        column.putpixel((0, row), tuple(round(a + (b - a) * share) for a, b in zip(top, bottom, strict=True)))
    return column.resize((width, height), Image.Resampling.BILINEAR)


def _shade(scene: Landscape, colour: tuple[int, int, int]) -> tuple[int, ...]:
    dim = {"night": 0.4, "sunset": 0.8, "dawn": 0.9}.get(scene.time, 1.0)
    return tuple(round(value * dim) for value in colour)


def _sun(draw: ImageDraw.ImageDraw, scene: Landscape, rng: random.Random, width: int, horizon: int) -> None:
    x, radius = rng.uniform(0.1, 0.9) * width, 0.05 * width
    low = scene.time in ("dawn", "sunset")
    y = horizon - radius * 0.6 if low else horizon * 0.25
    colour = {"night": (236, 236, 220), "noon": (255, 244, 170)}.get(scene.time, (255, 190, 90))
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    if scene.time == "night":
        for _ in range(60):
            a, b, r = rng.random() * width, rng.random() * horizon * 0.8, rng.uniform(1, 3)
            draw.ellipse((a - r, b - r, a + r, b + r), fill=(250, 250, 240))


def _cloud(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    for dx, dy, part in ((-1.1, 0.2, 0.7), (0, 0, 1.0), (1.1, 0.2, 0.8), (0.5, -0.4, 0.7)):
        size = r * part
        cx, cy = x + dx * r, y + dy * r * 0.6
        draw.ellipse((cx - size, cy - size * 0.6, cx + size, cy + size * 0.6), fill=(246, 246, 250))


def _hills(draw, scene: Landscape, rng: random.Random, width: int, height: int, horizon: int) -> None:
    base = GROUNDS[scene.ground]
    for layer, rise in enumerate((0.16, 0.09)):
        peaks = rng.randint(3, 5)
        points = [(0, horizon)]
        for peak in range(peaks + 1):
            points.append((peak * width / peaks, horizon - rng.uniform(0.2, 1) * rise * height))
        points += [(width, horizon), (width, horizon + 4), (0, horizon + 4)]
        far = 0.62 + 0.16 * layer
        draw.polygon(points, fill=_shade(scene, tuple(round(value * far + 40 * (1 - far)) for value in base)))
    draw.rectangle((0, horizon, width, height), fill=_shade(scene, base))
    for _ in range(160):
        x, y = rng.random() * width, horizon + rng.random() * (height - horizon)
        tone = rng.uniform(0.8, 1.1)
        colour = _shade(scene, tuple(min(255, round(value * tone)) for value in base))
        draw.line((x, y, x + rng.uniform(-6, 6), y - rng.uniform(4, 14)), fill=colour, width=3)


def _house(draw: ImageDraw.ImageDraw, scene: Landscape, x: float, y: float, s: float) -> None:
    wall, lit = _shade(scene, COLOURS[scene.house]), scene.time in ("night", "sunset")
    draw.rectangle((x, y - s, x + 1.6 * s, y), fill=wall)
    draw.polygon(
        [(x - 0.15 * s, y - s), (x + 0.8 * s, y - 1.7 * s), (x + 1.75 * s, y - s)], fill=_shade(scene, (90, 56, 44))
    )
    draw.rectangle((x + 0.65 * s, y - 0.6 * s, x + 0.95 * s, y), fill=_shade(scene, (70, 46, 34)))
    window = (255, 226, 120) if lit else (196, 224, 240)
    for left in (0.18, 1.12):
        draw.rectangle((x + left * s, y - 0.75 * s, x + (left + 0.3) * s, y - 0.4 * s), fill=window)


def _tree(draw: ImageDraw.ImageDraw, scene: Landscape, x: float, y: float, s: float) -> None:
    leaf = {"autumn field": (206, 96, 30), "snow": (206, 222, 220)}.get(scene.ground, (36, 108, 52))
    draw.rectangle((x - 0.09 * s, y - 0.6 * s, x + 0.09 * s, y), fill=_shade(scene, (98, 66, 40)))
    for dx, dy, part in ((0, -1.2, 0.6), (-0.35, -0.8, 0.45), (0.35, -0.8, 0.45)):
        cx, cy, r = x + dx * s, y + dy * s, part * s
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=_shade(scene, leaf))


def _mover(draw: ImageDraw.ImageDraw, scene: Landscape, moment: float, width: int, height: int, horizon: int) -> None:
    colour, s = _shade(scene, COLOURS[scene.mover_colour]), 0.075 * min(width, height)
    x = width * (0.1 + 0.8 * moment)
    if scene.mover == "hot-air balloon":
        y = horizon * (0.8 - 0.6 * moment)
        draw.ellipse((x - s, y - 1.3 * s, x + s, y + 0.9 * s), fill=colour)
        draw.rectangle((x - 0.3 * s, y + 1.2 * s, x + 0.3 * s, y + 1.6 * s), fill=_shade(scene, (110, 76, 44)))
        for side in (-1, 1):
            draw.line((x + side * 0.5 * s, y + 0.7 * s, x + side * 0.28 * s, y + 1.2 * s), fill=(60, 50, 40), width=4)
    elif scene.mover == "bird":
        y = horizon * (0.3 + 0.1 * (1 if int(moment * 12) % 2 else -1))
        lift = s * (0.7 if int(moment * 12) % 2 else -0.5)
        draw.polygon([(x - 1.2 * s, y - lift), (x, y), (x - 0.2 * s, y + 0.25 * s)], fill=colour)
        draw.polygon([(x + 1.2 * s, y - lift), (x, y), (x + 0.2 * s, y + 0.25 * s)], fill=colour)
    elif scene.mover == "sailing boat":
        y = horizon + 0.3 * height
        draw.rectangle((0, y, width, height), fill=_shade(scene, (50, 110, 170)))
        draw.polygon(
            [(x - s, y), (x + s, y), (x + 0.6 * s, y + 0.5 * s), (x - 0.6 * s, y + 0.5 * s)], fill=(96, 60, 36)
        )
        draw.polygon([(x, y - 1.9 * s), (x, y - 0.1 * s), (x + 1.1 * s, y - 0.1 * s)], fill=colour)
    else:
        y = horizon + 0.3 * height
        draw.rectangle((0, y - 0.1 * s, width, y + 0.5 * s), fill=_shade(scene, (80, 80, 84)))
        draw.rectangle((x - 1.2 * s, y - 0.5 * s, x + 1.2 * s, y), fill=colour)
        draw.polygon(
            [(x - 0.7 * s, y - 0.5 * s), (x - 0.4 * s, y - s), (x + 0.5 * s, y - s), (x + 0.8 * s, y - 0.5 * s)],
            fill=colour,
        )
        for wheel in (-0.7, 0.7):
            cx = x + wheel * s
            draw.ellipse((cx - 0.28 * s, y - 0.28 * s, cx + 0.28 * s, y + 0.28 * s), fill=(24, 24, 26))


TIMES = {"noon": "in bright daylight", "dawn": "at dawn", "sunset": "at sunset", "night": "on a clear night"}
WAYS = {
    "hot-air balloon": "rises slowly into the sky from the left to the right",
    "sailing boat": "sails over the water from the left to the right",
    "car": "drives along the road from the left to the right",
    "bird": "flies with beating wings from the left to the right",
}


def many(count: int, what: str) -> str:
    return f"{NUMBERS[count]} {what}{'' if count == 1 else 's'}"


def caption(scene: Landscape, moving: bool = False) -> str:
    """One or two sentences that say all that was drawn."""
    where = f"in {_some(_place(scene))} {TIMES[scene.time]}"
    first = f"{_some(scene.house)} house with a brown roof and {many(scene.trees, 'tree')} {where}"
    first = first[0].upper() + first[1:]
    clouds = f", under a sky with {many(scene.clouds, 'cloud')}" if scene.clouds else ""
    if not scene.mover:
        return f"{first}{clouds}."
    thing = _some(f"{scene.mover_colour} {scene.mover}")
    if moving:
        return f"{first}{clouds}. {thing[0].upper()}{thing[1:]} {WAYS[scene.mover]}."
    return f"{first}{clouds}, with {thing}. Flat illustration with clean edges."


def _some(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def _place(scene: Landscape) -> str:
    return {"meadow": "green meadow", "desert": "sandy desert", "snow": "snowy plain"}.get(scene.ground, scene.ground)


def questions(scene: Landscape) -> list[tuple[str, str]]:
    return [
        ("What colour is the house?", f"{scene.house.capitalize()}."),
        ("How many trees are there?", f"There {'is' if scene.trees == 1 else 'are'} {many(scene.trees, 'tree')}."),
        ("What time of day does the picture show?", f"It is drawn {TIMES[scene.time]}."),
        (f"What colour is the {scene.mover}?", f"The {scene.mover} is {scene.mover_colour}."),
        ("Describe the picture in detail.", caption(scene)),
    ]


def changes(scene: Landscape, rng: random.Random) -> list[tuple[str, Landscape]]:
    """(instruction, the landscape that it leads to)."""
    other = rng.choice([colour for colour in COLOURS if colour not in (scene.house, scene.mover_colour)])
    time = rng.choice([time for time in SKIES if time != scene.time])
    ground = rng.choice([ground for ground in GROUNDS if ground != scene.ground])
    trees = rng.choice([count for count in range(1, len(NUMBERS)) if count != scene.trees])
    thing = f"{scene.mover_colour} {scene.mover}"
    return [
        (f"Paint the house {other} and leave everything else as it is.", replace(scene, house=other)),
        (f"Show the same place {TIMES[time]}.", replace(scene, time=time)),
        (f"Remove the {thing}.", replace(scene, mover="")),
        (f"Make the {scene.mover} {other}.", replace(scene, mover_colour=other)),
        (f"Turn the ground into {_some(_place(replace(scene, ground=ground)))}.", replace(scene, ground=ground)),
        (f"Let there be {many(trees, 'tree')} instead.", replace(scene, trees=trees)),
    ]
