"""Short clips: a camera that pans or zooms over a photograph, and landscapes in which something moves."""

import random
from dataclasses import dataclass

from PIL import Image, ImageOps

from lance_quant.calibration.bundled import landscapes
from lance_quant.calibration.bundled.photographs import Photograph, open_photograph

# name -> (centre x, centre y, width) of the camera's view at the start and at the end, as shares of the picture
MOVES = {
    "pans to the right": ((0.36, 0.5, 0.7), (0.64, 0.5, 0.7)),
    "zooms in slowly": ((0.5, 0.5, 1.0), (0.5, 0.5, 0.6)),
    "pans to the left": ((0.64, 0.5, 0.7), (0.36, 0.5, 0.7)),
    "zooms out slowly": ((0.5, 0.5, 0.55), (0.5, 0.5, 1.0)),
    "tilts upwards": ((0.5, 0.64, 0.7), (0.5, 0.36, 0.7)),
    "tilts downwards": ((0.5, 0.36, 0.7), (0.5, 0.64, 0.7)),
    "moves diagonally from the upper left to the lower right": ((0.36, 0.36, 0.7), (0.64, 0.64, 0.7)),
}


@dataclass(frozen=True)
class Clip:
    """frames RGB of one size; caption: of the clip; questions: (question, answer); scene: of a landscape."""

    frames: tuple[Image.Image, ...]
    caption: str
    questions: tuple[tuple[str, str], ...]
    scene: landscapes.Landscape | None = None


def camera(photograph: Photograph, move: str, size: tuple[int, int], frames: int) -> Clip:
    """A camera move over a photograph."""
    image = ImageOps.fit(open_photograph(photograph), (round(1.5 * size[0]), round(1.5 * size[1])))
    start, end = MOVES[move]
    shots = []
    for frame in range(frames):
        share = frame / max(1, frames - 1)
        x, y, width = (a + (b - a) * share for a, b in zip(start, end, strict=True))
        box = (
            (x - width / 2) * image.width,
            (y - width / 2) * image.height,
            (x + width / 2) * image.width,
            (y + width / 2) * image.height,
        )
        shots.append(image.resize(size, Image.Resampling.BICUBIC, box=box))
    subject = photograph.caption[0].lower() + photograph.caption[1:]
    return Clip(
        tuple(shots),
        f"The camera {move} over a still scene: {subject}",
        (
            ("How does the camera move?", f"It {move}."),
            ("Describe the clip.", f"{photograph.detail} The camera {move}, and nothing in the scene itself moves."),
            ("Does anything move besides the camera?", "No, the scene stands still."),
            *photograph.questions,
        ),
    )


def shoot(scene: landscapes.Landscape, size: tuple[int, int], frames: int) -> tuple[Image.Image, ...]:
    """The frames of a landscape, from its first moment to its last."""
    return tuple(landscapes.paint(scene, size, frame / max(1, frames - 1)) for frame in range(frames))


def moving_landscape(scene: landscapes.Landscape, size: tuple[int, int], frames: int) -> Clip:
    """A landscape through which its mover goes."""
    return Clip(
        shoot(scene, size, frames),
        landscapes.caption(scene, moving=True),
        (
            ("What moves in the clip?", f"The {scene.mover_colour} {scene.mover}."),
            ("In which direction does it move?", f"The {scene.mover} {landscapes.WAYS[scene.mover]}."),
            ("Describe what happens.", landscapes.caption(scene, moving=True)),
            *landscapes.questions(scene)[:3],
        ),
        scene,
    )


def draw_clip(
    place: int, photographs: list[Photograph], rng: random.Random, size: tuple[int, int], frames: int
) -> Clip:
    """Landscapes and camera moves in turn."""
    if place % 2:
        moves = list(MOVES)
        return camera(photographs[place // 2 % len(photographs)], moves[place // 2 % len(moves)], size, frames)
    return moving_landscape(landscapes.draw_landscape(rng), size, frames)
