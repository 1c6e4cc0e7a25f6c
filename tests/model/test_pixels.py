"""Bucket sizes, resize, patches and frame sampling against upstream's (tests/golden)."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lance_quant.model import pixels
from lance_quant.model.resolution import PRESETS
from tests.golden_cases import FOLDER, RECORDED

BUCKETS = RECORDED["preproc"]["buckets_hw"]


@pytest.mark.parametrize("edge", sorted(BUCKETS, key=int))
def test_buckets(edge):
    assert [list(pixels.bucket(ratio, int(edge))[::-1]) for ratio in pixels.RATIOS] == BUCKETS[edge]


@pytest.fixture(scope="module")
def picture():
    tensors = load_file(FOLDER / "preproc.safetensors")
    return Image.fromarray(tensors["image_rgb_uint8"].numpy()), tensors


def test_vae_pixels(picture):
    image, tensors = picture
    edge = PRESETS["image_256res"].image_edge
    assert torch.equal(pixels.vae_pixels([image], edge)[:, :, ::4, ::4], tensors["image_256res.vae_tensor_stride4"])
    assert torch.equal(pixels.vae_pixels([image], 96), tensors["small.vae_tensor"])


def test_vit_patches(picture):
    image, tensors = picture
    patches, grid = pixels.vit_patches(pixels.vit_pixels([image], PRESETS["image_256res"].vit_edge))
    assert [list(grid)] == RECORDED["preproc"]["image_256res.vit_grid_thw"]
    assert torch.equal(patches[:48], tensors["image_256res.vit_patches_first48"])


def test_odd_clip_repeats_its_last_frame():
    patches, grid = pixels.vit_patches(torch.arange(3.0).view(1, 3, 1, 1).expand(3, 3, 28, 28))
    assert grid == (2, 2, 2)
    assert patches[-1].reshape(3, 2, 14, 14)[0, :, 0, 0].tolist() == [2.0, 2.0]


def test_frame_sampler():
    for case in json.loads((FOLDER / "frame_sampler.json").read_text()):
        assert pixels.sample_frames(case["total_frames"], case["fps"]) == case["indices"]
    with pytest.raises(ValueError, match="too short"):
        pixels.sample_frames(1, 24)


def test_transparency_is_composited_over_white():
    image = pixels.open_image(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)


def test_a_long_clip_is_compressed_in_time_or_cut():
    assert pixels.sample_frames(480, 24.0)[-1] == 479
    cut = pixels.sample_frames(480, 24.0, faithful=False)
    assert cut[-1] == 143 and len(cut) == len(pixels.sample_frames(480, 24.0))
    assert pixels.sample_frames(100, 24.0, faithful=False) == pixels.sample_frames(100, 24.0)
