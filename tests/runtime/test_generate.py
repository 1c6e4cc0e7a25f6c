"""Any request on a random checkpoint, bf16 and packed: shapes, repetition to the bit, refusals."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.pack import PackJob, pack
from lance_quant.awq.search import LayerJob, search_layer
from lance_quant.errors import LanceQuantError
from lance_quant.model.request import TASKS, Request
from lance_quant.model.resolution import Preset
from lance_quant.model.sampler import FlowConfig
from lance_quant.runtime.generate import GenerationConfig, Generator
from lance_quant.runtime.int4_linear import Int4Linear
from lance_quant.runtime.selection import Int4Config
from tests.random_checkpoint import random_checkpoint

FAST = GenerationConfig(flow=FlowConfig(steps=3), max_new_tokens=4)
MINMAX = RecipeConfig(name="minmax", scoring="none", folds=[])


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Generator:
    checkpoint = random_checkpoint(tmp_path_factory.mktemp("video"), layout="video", layers=1)
    return Generator(checkpoint, None, "cpu")


@pytest.fixture(scope="module")
def packed(video, tmp_path_factory) -> Generator:
    root = tmp_path_factory.mktemp("packed")
    layer, out = root / "layer", root / "packed"
    layer.mkdir(), out.mkdir()
    job = LayerJob(checkpoint=video.checkpoint, layer=0, capture=None, recipe=MINMAX, group_size=32, bits=4)
    search_layer(job, layer, "cpu")
    whole = PackJob(
        checkpoint=video.checkpoint, layers=[layer], recipe=MINMAX, group_size=32, bits=4, tasks_calibrated=[]
    )
    pack(whole, out)
    return Generator(video.checkpoint, out, "cpu")


def request(task: str, **more) -> Request:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)) for _ in range(5)]
    fields = {"name": "it", "prompt": "a red circle", "height": 32, "width": 48, "frames": 5}
    return Request(task=task, **fields | {"image": frames[0], "video": tuple(frames)} | more)


DRAWN = {  # what is given is brought to the nearest bucket of 64 x 64 pixels
    "t2i": (1, 32, 48, 3),
    "t2v": (5, 32, 48, 3),
    "i2v": (5, 48, 80, 3),
    "image_edit": (1, 48, 80, 3),
    "video_edit": (5, 48, 80, 3),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_and_again_to_the_bit(video, task):
    told = []
    first, again = (video.run(request(task), FAST, lambda *what: told.append(what)) for _ in range(2))
    assert first.tokens == again.tokens and first.text == again.text
    if task in DRAWN:
        assert first.frames.shape == DRAWN[task] and first.frames.dtype == np.uint8
        assert np.array_equal(first.frames, again.frames)
        assert told == 2 * [(1, 3, "it"), (2, 3, "it"), (3, 3, "it")]
        assert list(first.seconds) == ["prepare", "context", "steps", "decode"]
        assert first.rate["seconds_per_step"] == pytest.approx(first.seconds["steps"] / 3)
    else:
        assert 1 <= len(first.tokens) <= 4 and first.frames is None
        assert told[: len(first.tokens)] == [(n + 1, 4, "it") for n in range(len(first.tokens))]
    assert first.peak_bytes is None


def test_another_seed_draws_another_picture(video):
    a, b = (
        video.run(request("t2i"), GenerationConfig(flow=FlowConfig(steps=3), seed=seed)).frames for seed in (42, 43)
    )
    assert not np.array_equal(a, b)


def test_uncached_settings_reach_both_loops(video):
    uncached = GenerationConfig(flow=FlowConfig(steps=3, cached=False), max_new_tokens=4)
    assert video.run(request("x2t_image"), uncached).tokens == video.run(request("x2t_image"), FAST).tokens
    assert video.run(request("t2i"), uncached).frames.shape == DRAWN["t2i"]


def test_the_stop_token(video, monkeypatch):
    end = video.tokenizer.token_to_id("<|im_end|>")
    monkeypatch.setattr("lance_quant.model.understanding.choose", lambda logits, length: end)
    result = video.run(request("x2t_image"), FAST)
    assert (result.tokens, result.text, result.raw) == ((end,), "", "<|im_end|>")


@pytest.mark.parametrize("task", ["x2t_image", "t2i"])
def test_accelerated(video, packed, task):
    for generator in (video, packed):
        fast = Generator(generator.checkpoint, generator.weights, "cpu", "on")
        first, again = (fast.run(request(task), FAST) for _ in range(2))
        assert fast.lance.fast is not None and first.tokens == again.tokens
        if task == "t2i":
            assert np.array_equal(first.frames, again.frames)
            apart = np.abs(first.frames.astype(int) - generator.run(request(task), FAST).frames)
            assert apart.mean() < 2
        else:
            assert first.tokens == generator.run(request(task), FAST).tokens


def test_packed(packed, video):
    result = packed.run(request("t2v"), FAST)
    assert result.frames.shape == DRAWN["t2v"]
    assert not np.array_equal(result.frames, video.run(request("t2v"), FAST).frames)
    assert any(isinstance(module, Int4Linear) for module in packed.lance.modules())


def test_how_packed_weights_multiply(packed, video):
    chosen = Generator(packed.checkpoint, packed.weights, "cpu", int4=Int4Config(backend="blocks", resident_gb=1))
    assert chosen.run(request("t2i"), FAST).frames.shape == DRAWN["t2i"]
    linears = [module for module in chosen.lance.modules() if isinstance(module, Int4Linear)]
    assert all(linear.backend == "blocks" and linear.dense is not None for linear in linears)
    with pytest.raises(LanceQuantError, match="int4 is of packed weights, and these are bf16"):
        Generator(video.checkpoint, None, "cpu", int4=Int4Config())


def test_a_packed_folder_of_another_checkpoint(packed, tmp_path):
    other = Generator(random_checkpoint(tmp_path / "other", layout="video", layers=2), packed.weights, "cpu")
    with pytest.raises(LanceQuantError, match="awq_state_dict.safetensors"):
        other.run(request("t2i"), FAST)


def test_a_packed_folder_of_the_other_layout(packed, tmp_path):
    other = Generator(random_checkpoint(tmp_path, layers=1), packed.weights, "cpu")
    words = (
        "was packed from the video layout, but checkpoint random is of the image layout: take the one it was packed "
        r"from \(checkpoint=tiny_video or video\), or weights packed from random"
    )
    with pytest.raises(LanceQuantError, match=words):
        other.run(request("t2i"), FAST)


def test_a_request_that_lacks_something_is_refused_before_anything_is_loaded(video):
    fresh = Generator(video.checkpoint, None, "cpu")
    with pytest.raises(LanceQuantError, match="task i2v needs a picture and got none"):
        fresh.run(request("i2v", image=None), FAST)
    with pytest.raises(LanceQuantError, match="draws 48 x 33 pixels"):
        fresh.run(request("t2i", height=33), FAST)
    assert "lance" not in vars(fresh)


def test_what_is_beyond_the_position_table_is_refused_before_anything_is_loaded(video):
    fresh = Generator(video.checkpoint, None, "cpu")
    longer = tuple(2 * request("video_edit").video) + request("video_edit").video
    asked = (
        ("t2v", {"frames": 16}, "'it' draws 16 frames at 12 a second, beyond this model's 9: take frames=9 or less"),
        ("video_edit", {"video": longer}, "gives a clip of 15 frames .*give a clip of at most 9 frames, 0.75 seconds"),
        ("t2i", {"width": 272}, "draws 272 x 32 pixels, beyond this model's 256 a side: .*, height or width"),
    )
    for task, more, words in asked:
        with pytest.raises(LanceQuantError, match=words):
            fresh.run(request(task, **more), FAST)
    wide = Generator(replace(video.checkpoint, pictures=Preset(256, 56)), None, "cpu")
    with pytest.raises(LanceQuantError, match="draws 368 x 160 pixels, .* or image=... of another shape"):
        wide.run(request("image_edit", image=Image.new("RGB", (210, 90))), FAST)
    assert not {"tokenizer", "lance", "vae"} & (vars(fresh).keys() | vars(wide).keys())
    assert video.run(request("video_edit", video=longer[:12]), FAST).frames.shape == (9, 48, 80, 3)


def test_a_task_of_the_other_family(tmp_path):
    image = Generator(random_checkpoint(tmp_path, layers=1), None, "cpu")
    with pytest.raises(LanceQuantError, match="serves x2t_image, t2i, image_edit: take checkpoint=video"):
        image.run(request("t2v"), FAST)
