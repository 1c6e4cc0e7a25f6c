"""Requests drawn from a seed are pinned: calibration and evaluation artifacts are keyed by their arguments alone."""

import hashlib

import pytest

from lance_quant.model.inputs import given_frames
from lance_quant.model.request import CLIP_TASKS, TASKS, UNDERSTANDING
from lance_quant.tiny import SCENES_REVISION
from lance_quant.tiny.requests import scene_requests

DIGEST = {3: "0ee9a0932b91f029fc2aa65e7a9a43c6e2d42cd7f7d153ba71eb7281a007115a"}


def test_digest():
    digest = hashlib.sha256()
    for unseen in (False, True):
        for request in scene_requests(list(TASKS), 8, 128, seed=3, unseen=unseen):
            digest.update(f"{request.name}|{request.prompt}|{request.instruction}|{request.answer}".encode())
            for picture in (*([request.image] if request.image else []), *request.video, *request.target):
                digest.update(picture.tobytes())
    assert digest.hexdigest() == DIGEST[SCENES_REVISION], "other requests: raise SCENES_REVISION in lance_quant/tiny"


def test_unseen_scenes_differ_from_seen_ones():
    seen, unseen = (scene_requests(["t2i"], 4, 128, seed=0, unseen=value) for value in (False, True))
    assert not {request.prompt for request in seen} & {request.prompt for request in unseen}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_what_it_starts_from_and_what_should_come_out(task):
    for request in scene_requests([task], 6, 128, seed=0, unseen=True):
        frames = 5 if task in CLIP_TASKS else 1
        assert request.prompt and request.frames == frames
        assert len(given_frames(request)) in (0, 1, frames)
        if task in UNDERSTANDING:
            assert request.answer and not request.target
        else:
            assert len(request.target) == frames
        if task == "i2v":
            assert request.target[0].tobytes() == request.image.tobytes()
        if task.endswith("edit"):
            assert [f.tobytes() for f in request.target] != [f.tobytes() for f in given_frames(request)]
