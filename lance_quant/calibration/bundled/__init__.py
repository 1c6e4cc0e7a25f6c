"""The bundled samples: charts, texts, landscapes, photographs and short clips with words to them, made by code.

    bundled_requests(checkpoint, ["t2i", "x2t_image"], 16, seed=0, held_out=False)

Deterministic: the same arguments give the same requests. `held_out` samples show photographs, texts and numbers that
calibration never sees. Sizes are the checkpoint's own (`Checkpoint.edges`).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from lance_quant.calibration.bundled import landscapes
from lance_quant.calibration.bundled.clips import Clip, draw_clip, shoot
from lance_quant.calibration.bundled.documents import DOCUMENTS
from lance_quant.calibration.bundled.edits import edit
from lance_quant.calibration.bundled.photographs import Photograph, open_photograph, photographs
from lance_quant.checkpoint.layout import Checkpoint
from lance_quant.model.pixels import bucket
from lance_quant.model.request import INSTRUCTIONS, Request

# what the calibration part holds; the held-out part goes on as long as it is asked
COUNTS = {"x2t_image": 16, "t2i": 16, "image_edit": 16, "x2t_video": 8, "t2v": 8, "i2v": 8, "video_edit": 8}
RATIOS = (1.0, 4 / 3, 16 / 9, 3 / 4)  # of pictures, width to height
CLIP_RATIOS = (16 / 9, 1.0, 16 / 9, 4 / 3)
FRAMES = (9, 13, 5, 25, 9, 13, 17, 49)  # of the clips of t2v in turn; the other tasks' are shorter
SHORT_FRAMES = (9, 9, 13, 9, 17, 9, 13, 25)
KINDS = ("photograph", "document", "landscape", "document")  # what a picture shows, in turn


@dataclass(frozen=True)
class Place:
    """Which sample of a task is to be made. rng: its own stream."""

    task: str
    index: int
    held_out: bool
    edge: int
    rng: random.Random

    @property
    def photographs(self) -> list[Photograph]:
        return photographs(self.held_out)

    @property
    def first_edit(self) -> int:
        """The held-out photographs begin elsewhere in the table: the first ones are black and white already."""
        return 4 if self.held_out else 0

    def size(self, ratios: Sequence[float]) -> tuple[int, int]:
        """(width, height), multiples of 16 within the budget: every ratio with every kind in time."""
        return bucket(ratios[(self.index + self.index // len(ratios)) % len(ratios)], self.edge)

    def pick(self, questions: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """A question and its answer."""
        return questions[(self.index + self.index // len(KINDS)) % len(questions)]


@dataclass(frozen=True)
class Shown:
    """One picture with words: what a question, a prompt or an edit is made from."""

    image: Image.Image
    caption: str
    questions: Sequence[tuple[str, str]]


def bundled_requests(
    checkpoint: Checkpoint, tasks: Sequence[str], samples: int, *, seed: int, held_out: bool
) -> list[Request]:
    """Up to `samples` requests a task, in the order of `tasks`."""
    return list(iterate_requests(checkpoint, tasks, samples, seed=seed, held_out=held_out))


def iterate_requests(
    checkpoint: Checkpoint, tasks: Sequence[str], samples: int, *, seed: int, held_out: bool
) -> Iterator[Request]:
    """The same, each made when it is asked for."""
    for task in tasks:
        for index in range(samples if held_out else min(samples, COUNTS[task])):
            rng = random.Random(f"{task}/{seed}/{held_out}/{index}")
            yield MAKERS[task](Place(task, index, held_out, checkpoint.edges(task).image_edge, rng))


def _named(place: Place, **fields) -> Request:
    return Request(
        task=place.task,
        name=f"{place.task}-{place.index:03d}",
        instruction=INSTRUCTIONS.get(place.task, ""),
        **fields,
    )


def _shown(place: Place, size: tuple[int, int]) -> Shown:
    kind, turn = KINDS[place.index % len(KINDS)], place.index // len(KINDS)
    if kind == "photograph":
        found = place.photographs[turn % len(place.photographs)]
        caption = place.rng.choice((found.caption, found.detail))
        asked = (*found.questions, ("Describe the picture in detail.", found.detail), ("What is shown?", found.caption))
        return Shown(open_photograph(found), caption, asked)
    if kind == "landscape":
        scene = landscapes.draw_landscape(place.rng)
        return Shown(landscapes.paint(scene, size), landscapes.caption(scene), landscapes.questions(scene))
    drawers = list(DOCUMENTS.values())
    document = drawers[place.index // 2 % len(drawers)](place.rng, size, place.held_out)
    return Shown(document.image, document.caption, document.questions)


def _x2t_image(place: Place) -> Request:
    shown = _shown(place, place.size(RATIOS))
    question, answer = place.pick(shown.questions)
    return _named(place, prompt=question, answer=answer, image=shown.image)


def _t2i(place: Place) -> Request:
    size = place.size(RATIOS)
    shown = _shown(place, size)
    target = ImageOps.fit(shown.image, size, Image.Resampling.BICUBIC)
    return _named(place, prompt=shown.caption, target=(target,), width=size[0], height=size[1])


def _image_edit(place: Place) -> Request:
    """Landscapes change in one thing; photographs are worked on as a whole."""
    size, turn = place.size(RATIOS), place.index // 2
    if place.index % 2:
        scene = landscapes.draw_landscape(place.rng)
        possible = landscapes.changes(scene, place.rng)
        instruction, changed = possible[turn % len(possible)]
        return _named(
            place,
            prompt=instruction,
            image=landscapes.paint(scene, size),
            target=(landscapes.paint(changed, size),),
        )
    image = open_photograph(place.photographs[turn % len(place.photographs)])
    instruction, change = edit(place.first_edit + turn, place.rng)
    return _named(place, prompt=instruction, image=image, target=(change(image),))


def _clip(place: Place, frames: Sequence[int], shift: int = 0) -> Clip:
    count = frames[place.index % len(frames)]
    return draw_clip(place.index + shift, place.photographs, place.rng, place.size(CLIP_RATIOS), count)


def _x2t_video(place: Place) -> Request:
    clip = _clip(place, SHORT_FRAMES)
    question, answer = place.pick(clip.questions)
    return _named(place, prompt=question, answer=answer, video=clip.frames)


def _t2v(place: Place) -> Request:
    clip = _clip(place, FRAMES)
    width, height = clip.frames[0].size
    return _named(place, prompt=clip.caption, target=clip.frames, width=width, height=height, frames=len(clip.frames))


def _i2v(place: Place) -> Request:
    clip = _clip(place, SHORT_FRAMES, shift=4)
    return _named(place, prompt=clip.caption, image=clip.frames[0], target=clip.frames, frames=len(clip.frames))


def _video_edit(place: Place) -> Request:
    clip, turn = _clip(place, SHORT_FRAMES, shift=6), place.index // 2
    if clip.scene is not None:
        possible = landscapes.changes(clip.scene, place.rng)
        instruction, changed = possible[turn % len(possible)]
        target = shoot(changed, clip.frames[0].size, len(clip.frames))
    else:
        instruction, change = edit(place.first_edit + turn, place.rng)
        target = tuple(change(frame) for frame in clip.frames)
    return _named(place, prompt=instruction, video=clip.frames, target=target, frames=len(clip.frames))


MAKERS: dict[str, Callable[[Place], Request]] = {
    "x2t_image": _x2t_image,
    "t2i": _t2i,
    "image_edit": _image_edit,
    "x2t_video": _x2t_video,
    "t2v": _t2v,
    "i2v": _i2v,
    "video_edit": _video_edit,
}
