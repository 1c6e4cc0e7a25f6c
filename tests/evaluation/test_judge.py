"""Scenes are judged by what the reader finds in them; what cannot be told is None."""

from dataclasses import replace

import numpy as np
import pytest

from lance_quant.evaluation.judge import shows_what_was_asked
from lance_quant.model.request import CLIP_TASKS, GENERATION
from lance_quant.tiny.requests import scene_requests


def drawn(pictures) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


@pytest.mark.parametrize("task", GENERATION)
def test_targets_are_right_and_other_scenes_are_not(task):
    one, other = scene_requests([task], 2, 128, seed=0, unseen=True)
    assert shows_what_was_asked(one, drawn(one.target), "scenes") is True
    assert shows_what_was_asked(one, drawn(other.target), "scenes") is False


def test_a_source_is_no_edit():
    for request in scene_requests(["image_edit"], 8, 128, seed=0, unseen=True):
        assert shows_what_was_asked(request, drawn([request.image]), "scenes") is False, request.prompt


@pytest.mark.parametrize("task", [task for task in CLIP_TASKS if task in GENERATION])
def test_a_clip_must_end_as_asked(task):
    request = scene_requests([task], 1, 128, seed=0, unseen=True)[0]
    frames = drawn(request.target)
    frames[-1] = frames[-1][0, 0]  # nothing but ground
    assert shows_what_was_asked(request, frames, "scenes") is False


def test_what_cannot_be_told():
    request = scene_requests(["t2i"], 1, 128, seed=0, unseen=True)[0]
    frames = drawn(request.target)
    assert shows_what_was_asked(request, frames, "bundled") is None
    assert shows_what_was_asked(replace(request, target=()), frames, "scenes") is None
    assert shows_what_was_asked(request, frames[:, :64, :64], "scenes") is None
