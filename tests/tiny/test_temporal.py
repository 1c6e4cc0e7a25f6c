"""What only later frames meet is trained: single pictures keep every bit, and clips get better."""

import pytest
import torch

from lance_quant.tiny import autoencoder, temporal, world
from lance_quant.tiny.recipes import ClipRecipe


@pytest.fixture(scope="module")
def before():
    torch.manual_seed(0)
    return autoencoder.build(6, 8).requires_grad_(False)


@pytest.fixture(scope="module")
def after(before, tmp_path_factory):
    out = tmp_path_factory.mktemp("clips")
    autoencoder.save_vae(before, out / autoencoder.FILE)
    recipe = ClipRecipe(batch=2, edge=48, steps=4, peak=3e-3)
    temporal.train_clips(recipe, out=out, minutes=10, total_minutes=10, device="cpu")
    return autoencoder.load_vae(out / autoencoder.FILE)


def test_single_pictures_keep_every_bit(before, after):
    pictures = autoencoder.to_unit(world.render(world.random_batch(2, torch.Generator().manual_seed(1))[0]))
    latents = [autoencoder.encode_frames(vae, pictures)[0] for vae in (before, after)]
    assert torch.equal(*latents)
    assert torch.equal(*(autoencoder.decode_frames(vae, latents[0]) for vae in (before, after)))


def test_later_frames_change_and_the_first_does_not(before, after):
    clips = autoencoder.to_unit(temporal.moving_batch(1, torch.Generator().manual_seed(2)))
    first, second = (autoencoder.encode_clips(vae, clips)[0] for vae in (before, after))
    assert torch.equal(first[:, :, 0], second[:, :, 0])
    assert not torch.equal(first[:, :, 1], second[:, :, 1])


def test_clips_move_as_scenes_do():
    clips = temporal.moving_batch(64, torch.Generator().manual_seed(3))
    assert clips.shape == (64, 3, 5, 128, 128) and clips.dtype == torch.uint8
    still = (clips[:, :, 0] == clips[:, :, -1]).flatten(1).all(1)
    assert 0 < still.sum() < 32


def test_cuts_are_whole_latents():
    clips = torch.arange(128 * 128).view(1, 1, 1, 128, 128)
    cut = temporal.crop(clips, 64, torch.Generator().manual_seed(0))
    y, x = divmod(int(cut[0, 0, 0, 0, 0]), 128)
    assert cut.shape[-2:] == (64, 64) and y % 16 == 0 and x % 16 == 0
