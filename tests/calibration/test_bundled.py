"""The bundled samples: what is asked for comes, the same every time, and nothing held out is calibrated on."""

import hashlib

import pytest

from lance_quant.calibration import BUNDLED_REVISION
from lance_quant.calibration.bundled import COUNTS, bundled_requests
from lance_quant.calibration.bundled.photographs import PHOTOGRAPHS, open_photograph
from lance_quant.model.request import CLIP_TASKS, GENERATION, GIVEN, TASKS, UNDERSTANDING
from lance_quant.model.resolution import PRESETS

DIGEST = {1: "56a15bb6dcba0c857283b5aec4a366a387a492bbdb123fd1c4ceb4982bea3a20"}


class Sizes:
    """All that the samples look at in a checkpoint."""

    def __init__(self, pictures: str, clips: str):
        self._pictures, self._clips = PRESETS[pictures], PRESETS[clips]

    def edges(self, task):
        return self._clips if task in CLIP_TASKS else self._pictures


SMALL = Sizes("image_256res", "video_192p")


@pytest.fixture(scope="module")
def requests():
    return bundled_requests(SMALL, TASKS, 99, seed=0, held_out=False)


def test_every_task_has_its_count(requests):
    assert sum(COUNTS.values()) == len(requests) >= 64
    assert {task: sum(request.task == task for request in requests) for task in TASKS} == COUNTS


def test_requests_are_whole(requests):
    for request in requests:
        assert request.prompt.strip()
        assert bool(request.answer) == (request.task in UNDERSTANDING)
        assert bool(request.target) == (request.task in GENERATION)
        assert (request.image is not None) == (GIVEN.get(request.task) == "image")
        assert bool(request.video) == (GIVEN.get(request.task) == "video")
        if request.task in CLIP_TASKS:
            frames = len(request.video or request.target)
            assert frames % 4 == 1 and frames <= 49
        if request.task in ("t2i", "t2v"):
            assert request.target[0].size == (request.width, request.height)
            assert request.width % 16 == request.height % 16 == 0


def test_questions_and_captions_vary(requests):
    prompts = [request.prompt for request in requests]
    assert len(set(prompts)) > 0.75 * len(prompts)
    lengths = sorted(len(request.answer.split()) for request in requests if request.task in UNDERSTANDING)
    assert lengths[0] <= 2 and lengths[-1] >= 20


def test_held_out_samples_are_others(requests):
    held = bundled_requests(SMALL, ["x2t_image", "t2i", "image_edit"], 12, seed=0, held_out=True)
    assert len(held) == 36
    assert not {r.prompt for r in requests if r.task == "t2i"} & {r.prompt for r in held if r.task == "t2i"}
    seen = {r.image.tobytes() for r in requests if r.image is not None} | {
        r.target[0].tobytes() for r in requests if r.target
    }
    assert not seen & {r.image.tobytes() for r in held if r.image is not None}


def test_the_same_arguments_give_the_same_requests(requests):
    again = bundled_requests(SMALL, ["i2v"], 2, seed=0, held_out=False)
    first = [request for request in requests if request.task == "i2v"][:2]
    assert [(r.prompt, r.image.tobytes()) for r in again] == [(r.prompt, r.image.tobytes()) for r in first]
    assert bundled_requests(SMALL, ["i2v"], 1, seed=1, held_out=False)[0].prompt != first[0].prompt


def test_digest(requests):
    """Words and sizes; how a Pillow release draws a letter is its own."""
    digest = hashlib.sha256()
    for request in requests:
        frames = (request.image, *request.video, *request.target)
        sizes = [frame.size for frame in frames if frame is not None]
        digest.update(repr((request.name, request.prompt, request.answer, request.frames, sizes)).encode())
    assert digest.hexdigest() == DIGEST[BUNDLED_REVISION], "other requests: raise BUNDLED_REVISION"


def test_every_photograph_is_in_the_wheel():
    for photograph in PHOTOGRAPHS:
        assert min(open_photograph(photograph).size) > 150
