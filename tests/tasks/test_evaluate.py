"""What the keys of baseline and comparison hold of the settings."""

from types import SimpleNamespace

from tasks.config import compose_config
from tasks.evaluate import measured_fields


def fields(layout: str, *overrides: str) -> dict:
    return measured_fields(compose_config(list(overrides)), SimpleNamespace(summary={"layout": layout}))


def test_auto_counts_as_the_tasks_that_it_stands_for():
    named = fields("image", "evaluation.tasks=[image_edit,t2i,x2t_image]")
    assert fields("image") == named != fields("video")
    assert named["tasks"] == ["x2t_image", "t2i", "image_edit"]


def test_the_length_of_bundled_clips_is_the_checkpoints():
    longer = "checkpoint.frames=9"
    assert fields("video") == fields("video", longer)  # scenes have a length of their own
    bundled = "evaluation=full_size"
    assert fields("video", bundled) != fields("video", bundled, longer)
    assert {"bundled", "clip_frames"} <= set(fields("video", bundled))
