"""Which tasks run on which layout, what is refused, and how clips and trajectories are cut down."""

from dataclasses import asdict, replace

import pytest
from PIL import Image

from lance_quant.errors import LanceQuantError
from lance_quant.evaluation.config import EvaluationConfig, evaluated_tasks
from lance_quant.evaluation.samples import evaluation_requests, shortened, velocity_steps
from lance_quant.model.request import TASKS, Request
from tests.random_checkpoint import random_checkpoint


def test_keys():
    assert list(asdict(EvaluationConfig())) == (
        "name source tasks samples max_new_tokens frames steps velocity_steps timestep_shift guidance seed".split()
    )


def test_auto_is_what_the_layout_serves():
    assert evaluated_tasks(EvaluationConfig(), "image") == ["x2t_image", "t2i", "image_edit"]
    assert evaluated_tasks(EvaluationConfig(), "video") == list(TASKS)
    assert evaluated_tasks(EvaluationConfig(tasks=["t2v", "x2t_image"]), "video") == ["x2t_image", "t2v"]
    with pytest.raises(LanceQuantError, match="'t2v'.* image layout .*choose from x2t_image, t2i, image_edit"):
        evaluated_tasks(EvaluationConfig(tasks=["t2i", "t2v"]), "image")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": "photos"}, "evaluation.source=photos .* scenes, bundled"),
        ({"tasks": "t2i"}, r"evaluation.tasks=t2i must be auto or a list"),
        ({"tasks": ["draw"]}, "evaluation.tasks has no 'draw'"),
        ({"tasks": ["t2i", "t2i"]}, "each task once"),
        ({"tasks": []}, "each task once"),
        ({"frames": 8}, "evaluation.frames=8 must be 5, 9, 13"),
        ({"frames": 1}, "evaluation.frames=1 must be 5, 9, 13"),
        ({"velocity_steps": -1}, "evaluation.velocity_steps=-1"),
        ({"steps": 0}, "evaluation.steps=0 must be at least 1"),
        ({"seed": -1}, "evaluation.seed=-1"),
    ],
)
def test_bad_settings_are_one_sentence(settings, said):
    with pytest.raises(LanceQuantError, match=said):
        EvaluationConfig(**settings)


def test_compared_steps_reach_from_end_to_end():
    assert velocity_steps(EvaluationConfig(steps=5)) == [0, 1, 2, 3, 4]
    assert velocity_steps(EvaluationConfig(steps=30, velocity_steps=4)) == [0, 10, 19, 29]
    assert velocity_steps(EvaluationConfig(steps=3, velocity_steps=8)) == [0, 1, 2]


def test_scenes_of_every_task_at_the_sizes_of_the_checkpoint(tmp_path):
    checkpoint = random_checkpoint(tmp_path, layout="video")
    requests = evaluation_requests(checkpoint, EvaluationConfig(samples=1))
    assert [request.task for request in requests] == list(TASKS)
    assert {request.height for request in requests} == {0, checkpoint.pictures.image_edge}


def test_clips_are_cut_short():
    picture = Image.new("RGB", (8, 8))
    request = Request(task="video_edit", name="a", prompt="", video=(picture,) * 13, target=(picture,) * 13, frames=13)
    short = shortened(request, 5)
    assert (len(short.video), len(short.target), short.frames) == (5, 5, 5)
    assert shortened(replace(request, task="t2i", video=(), target=(picture,), frames=1), 5).frames == 1
