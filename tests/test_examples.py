"""Example files in Lance's form, each as upstream ships it: pretty-printed, media relative to the clone."""

import json

import numpy as np
import pytest
from PIL import Image

from lance_quant.errors import LanceQuantError
from lance_quant.examples import list_examples, read_examples
from lance_quant.media import write_clip
from lance_quant.model.request import GIVEN

PICTURE, CLIP = "assets/cases/a.png", "config/examples/clips/a.mp4"


@pytest.fixture
def clone(tmp_path):
    """A clone with one picture and one clip."""
    for name in (PICTURE, CLIP):
        (tmp_path / name).parent.mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(tmp_path / PICTURE)
    write_clip(tmp_path / CLIP, np.zeros((13, 32, 32, 3), np.uint8))
    return tmp_path


def put(clone, name: str, value, **form):
    path = clone / "config" / "examples" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, **form), encoding="utf-8")
    return path


def entry(*rows) -> dict:
    """(element, dtype, istarget) each."""
    elements, kinds, targets = map(list, zip(*rows, strict=True))
    return {"interleave_array": elements, "element_dtype_array": kinds, "istarget_in_interleave": targets}


QUESTION = ["Watch.", "What is it?", "Red."]


@pytest.mark.parametrize("form", [{"indent": 2}, {}])
def test_prompts(clone, form):
    values = {"000000.png": 'a poster with "STOP"', "000007.png": "a cat"}
    first, second = read_examples(put(clone, "t2i_example.json", values, **form), height=64, width=32)
    assert (first.task, first.name, first.prompt) == ("t2i", "000000", 'a poster with "STOP"')
    assert (second.name, second.height, second.width, second.frames) == ("000007", 64, 32, 1)


@pytest.mark.parametrize("task", ["i2v", "image_edit", "video_edit"])
@pytest.mark.parametrize("order", [1, -1])
def test_edits(clone, task, order):
    kind, path = GIVEN[task], CLIP if GIVEN[task] == "video" else PICTURE
    value = entry(*[("make it blue", "text", 0), (path, kind, 0)][::order])
    (request,) = read_examples(put(clone, f"{task}_example.json", {"0001": value}), frames=9)
    assert (request.task, request.name, request.prompt, request.frames) == (task, "000001", "make it blue", 9)
    assert len(request.video) == 13 if kind == "video" else request.image.size == (40, 30)


def test_what_an_edit_should_give_is_not_read(clone):
    value = entry(("make it blue", "text", 0), (PICTURE, "image", 0), ("elsewhere.png", "image", 1))
    (request,) = read_examples(put(clone, "image_edit_example.json", {"0001": value}))
    assert request.image.size == (40, 30) and request.target == ()


@pytest.mark.parametrize("task", ["x2t_image", "x2t_video"])
def test_questions_about_one_file_do_not_collide(clone, task):
    kind, path = GIVEN[task], CLIP if task == "x2t_video" else PICTURE
    values = {key: entry((path, kind, 0), (QUESTION, "text", 1)) for key in ("0001", "0002")}
    requests = read_examples(put(clone, f"{task}_example.json", values))
    assert [request.name for request in requests] == ["000001", "000002"]
    assert (requests[0].instruction, requests[0].prompt, requests[0].answer) == tuple(QUESTION)


def test_a_text_alone_is_a_caption(clone):
    value = entry((PICTURE, "image", 0), ("A red picture.", "text", 1))
    (request,) = read_examples(put(clone, "x2t_image_example.json", {"0001": value}))
    assert request.prompt == "" and request.answer == "A red picture." and "Describe" in request.instruction


def test_the_task_may_be_given(clone):
    path = put(clone, "mine.json", {"0001.mp4": "a cat"})
    assert list_examples(path, "t2v")[0].task == "t2v"
    with pytest.raises(LanceQuantError, match="mine.json does not say its task: give task="):
        list_examples(path)


def test_media_are_looked_for_in_the_clone_the_folder_and_here(clone, tmp_path_factory, monkeypatch):
    value = {"0001": entry(("make it blue", "text", 0), ("b.png", "image", 0))}
    path = put(clone, "image_edit_example.json", value)
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    with pytest.raises(LanceQuantError) as refused:
        list_examples(path)
    assert f"entry '0001': b.png is not there; looked in {clone}, {path.parent}, {here}" in str(refused.value)
    for folder in (here, path.parent, clone):
        Image.new("RGB", (8, 8)).save(folder / "b.png")
        assert list_examples(path)[0].media == folder / "b.png"


MISTAKES = [
    ("t2i_example.json", "{", "is not JSON"),
    ("t2i_example.json", "[]", "holds no examples"),
    ("t2i_example.json", {"cat.png": "a cat"}, "'cat.png': the key must be a number"),
    ("t2i_example.json", {"1.png": "a", "0001": "b"}, "two keys of the number 1"),
    ("t2i_example.json", '{"1.png": "a", "1.png": "b"}', "the key '1.png' twice"),
    ("t2i_example.json", {"0001": entry(("a", "text", 0))}, "'0001': task t2i takes a prompt in quotes"),
    ("i2v_example.json", {"0001": "a cat"}, "takes an object with the lists interleave_array"),
    ("i2v_example.json", {"0001": entry(("a", "text", 0))}, "takes one text and an image"),
    ("video_edit_example.json", {"0001": entry(("a", "text", 0), (PICTURE, "image", 0))}, "one text and a video"),
    ("x2t_image_example.json", {"0001": entry((PICTURE, "image", 0), (["a"], "text", 1))}, "must be [instruction, "),
]


@pytest.mark.parametrize(("name", "value", "words"), MISTAKES)
def test_one_sentence(clone, name, value, words):
    path = put(clone, name, value)
    with pytest.raises(LanceQuantError) as refused:
        list_examples(path)
    assert str(path) in str(refused.value) and words in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(LanceQuantError, match="t2i_example.json is missing"):
        list_examples(tmp_path / "t2i_example.json")
