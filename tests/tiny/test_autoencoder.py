"""The single-frame path is the chunked one, names go both ways, and the fold changes no picture."""

from pathlib import Path

import pytest
import torch

from lance_quant.checkpoint.reader import TensorReader
from lance_quant.model.vae import build_vae, diffusers_key, upstream_key
from lance_quant.model.vae import load_vae as load_general
from lance_quant.tiny import autoencoder, world

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return autoencoder.build(6, 8).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pictures():
    return autoencoder.to_unit(world.render(world.random_batch(2, torch.Generator().manual_seed(1))[0]))[..., :64, :64]


def test_single_frames_take_the_short_path_to_the_same_numbers(vae, pictures):
    general = build_vae(6, 8)
    general.load_state_dict(vae.state_dict())
    mean, logvar = autoencoder.encode_frames(vae, pictures)
    posterior = general.encode(pictures[:, :, None]).latent_dist
    torch.testing.assert_close(mean, posterior.mean[:, :, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logvar, posterior.logvar[:, :, 0], atol=1e-5, rtol=1e-5)
    made = autoencoder.decode_frames(vae, mean).clamp(-1, 1)
    torch.testing.assert_close(made, general.decode(mean[:, :, None]).sample[:, :, 0], atol=1e-5, rtol=1e-5)


def test_upstream_keys_are_the_inverse_of_the_key_map(vae):
    names = list(vae.state_dict())
    assert [diffusers_key(upstream_key(name)) for name in names] == names
    with TensorReader(GOLDEN / "tiny_wan22_vae.safetensors") as golden:
        assert sorted(map(upstream_key, names)) == sorted(golden.names())


def test_the_file_is_read_by_the_model(vae, pictures, tmp_path):
    autoencoder.save_vae(vae, tmp_path / autoencoder.FILE)
    general = load_general(tmp_path / autoencoder.FILE)
    latents = general.encode(pictures[0][:, None])
    raw, _ = autoencoder.encode_frames(vae, pictures[:1])
    centre, scale = autoencoder.constants("cpu")
    torch.testing.assert_close(latents[0].permute(2, 0, 1), ((raw - centre) / scale)[0], atol=1e-4, rtol=1e-4)


def test_the_fold_normalises_latents_and_keeps_pictures(pictures):
    torch.manual_seed(1)
    vae = autoencoder.build(6, 8).requires_grad_(False)
    before = autoencoder.decode_frames(vae, autoencoder.encode_frames(vae, pictures)[0])
    autoencoder.fold_constants(vae, seed=3)
    raw, _ = autoencoder.encode_frames(vae, pictures)
    torch.testing.assert_close(autoencoder.decode_frames(vae, raw), before, atol=1e-4, rtol=1e-4)
    batch, _ = world.random_batch(64, torch.Generator().manual_seed(3))
    centre, scale = autoencoder.constants("cpu")
    latents = (autoencoder.encode_frames(vae, autoencoder.to_unit(world.render(batch)))[0] - centre) / scale
    assert latents.mean((0, 2, 3)).abs().max() < 0.3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.4
