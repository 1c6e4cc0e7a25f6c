"""The VAE through diffusers against upstream's own outputs, and its key map."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lance_quant.model.vae as vae_module
import lance_quant.tiny
from lance_quant.errors import LanceQuantError
from lance_quant.model.vae import LATENT_MEAN, LATENT_STD, check_vae, load_vae, to_uint8
from tests.golden_cases import FOLDER, RECORDED

FILE = FOLDER / "tiny_wan22_vae.safetensors"
WEIGHTS = Path(lance_quant.tiny.__file__).parent / "weights"


@pytest.fixture(scope="module")
def vae():
    return load_vae(FILE)


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "vae.safetensors")


def test_constants():
    assert list(LATENT_MEAN) == RECORDED["vae_latent_mean"]
    assert list(LATENT_STD) == RECORDED["vae_latent_std"]


def test_encode(vae, golden):
    torch.testing.assert_close(vae.encode(golden["video"]).permute(3, 0, 1, 2), golden["mu_norm"], rtol=0, atol=2e-5)
    torch.testing.assert_close(
        vae.encode(golden["video"][:, :1]).permute(3, 0, 1, 2), golden["mu1_norm"], rtol=0, atol=2e-5
    )


@pytest.mark.parametrize(("latent", "decoded"), [("mu_norm", "decoded"), ("mu1_norm", "decoded1")])
def test_decode(vae, golden, latent, decoded):
    pixels = vae.decode(golden[latent].permute(1, 2, 3, 0))
    torch.testing.assert_close(pixels, golden[decoded].clamp(-1, 1), rtol=0, atol=5e-5)


def test_a_clip_decodes_piece_by_piece(vae, golden):
    latents = golden["mu_norm"].permute(1, 2, 3, 0)
    pieces = list(vae.pieces(latents))
    assert [piece.shape[1] for piece in pieces] == [1] + [4] * (len(latents) - 1)
    whole = vae.autoencoder.decode(raw(latents)).sample[0].clamp(-1, 1)
    assert torch.equal(torch.cat(pieces, dim=1), whole) and torch.equal(vae.decode(latents), whole)
    assert torch.equal(vae.decode_frames(latents), to_uint8(whole))
    assert all(kept is None for kept in vae.autoencoder._feat_map)


def raw(latents):
    std, mean = (torch.tensor(table).view(1, -1, 1, 1, 1) for table in (LATENT_STD, LATENT_MEAN))
    return latents.permute(3, 0, 1, 2)[None] * std + mean


def test_large_frames_of_clips_decode_in_tiles(monkeypatch):
    vae = load_vae(WEIGHTS / "Wan2.2_VAE.safetensors")
    ramp = torch.linspace(-0.8, 0.8, 160)
    clip = torch.stack((ramp.expand(160, -1), ramp[:, None].expand(-1, 160), ramp * ramp[:, None]))
    latents = vae.encode(clip[:, None].repeat(1, 5, 1, 1))
    picture, whole = vae.decode(latents[:1]), vae.decode(latents)
    for name, value in (("TILED_LATENTS", 99), ("TILE", 96), ("TILE_STRIDE", 64)):
        monkeypatch.setattr(vae_module, name, value)
    assert torch.equal(vae.decode(latents[:1]), picture)
    tiled = vae.decode(latents)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert (tiled - whole).norm() < 0.3 * whole.norm()  # tiles lack what the middle block sees of the whole frame
    monkeypatch.undo()
    assert torch.equal(vae.decode(latents), whole)


def test_bfloat16_has_the_constants_of_upstream(golden):
    """Mean and 1 / std are rounded, and so is each step (Lance spec sec. 15)."""
    pixels = golden["video"][:, :5]
    vae = load_vae(FILE, dtype=torch.bfloat16)
    mean = torch.tensor(LATENT_MEAN).bfloat16().view(1, -1, 1, 1, 1)
    inverse = (1 / torch.tensor(LATENT_STD).bfloat16()).view(1, -1, 1, 1, 1)
    assert inverse.dtype == torch.bfloat16
    seen = vae.autoencoder.encode(pixels[None].bfloat16()).latent_dist.mean
    latents = vae.encode(pixels)
    assert latents.dtype == torch.float32
    assert torch.equal(latents.permute(3, 0, 1, 2)[None], ((seen - mean) * inverse).float())
    z = latents.bfloat16().permute(3, 0, 1, 2)[None] / inverse + mean
    assert torch.equal(vae.decode(latents), vae.autoencoder.decode(z).sample[0].float())

    mended = load_vae(FILE, dtype=torch.bfloat16, faithful=False)
    exact, std = (torch.tensor(table).view(1, -1, 1, 1, 1) for table in (LATENT_MEAN, LATENT_STD))
    assert torch.equal(mended.encode(pixels).permute(3, 0, 1, 2)[None], (seen.float() - exact) / std)


def test_reads_a_plain_state_dict(tmp_path, golden):
    path = tmp_path / "Wan2.2_VAE.pth"
    torch.save(load_file(FILE), path)
    torch.testing.assert_close(
        load_vae(path).encode(golden["video"][:, :1]).permute(3, 0, 1, 2), golden["mu1_norm"], rtol=0, atol=2e-5
    )


def test_refuses_what_is_not_a_vae(tmp_path):
    tensors = load_file(FILE)
    tensors.pop("decoder.middle.0.residual.0.gamma")
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(LanceQuantError, match="decoder.mid_block.resnets.0.norm1.gamma"):
        load_vae(tmp_path / "vae.safetensors")
    (tmp_path / "vae.pth").write_bytes(b"nothing")
    with pytest.raises(LanceQuantError, match="vae.pth"):
        load_vae(tmp_path / "vae.pth")


def test_to_uint8():
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)).flatten().tolist() == [0, 128, 255]


def test_a_file_is_checked_without_reading_values(tmp_path):
    check_vae(FILE)
    tensors = load_file(FILE)
    torch.save(tensors, tmp_path / "vae.pth")
    check_vae(tmp_path / "vae.pth")
    faults = {
        "lacks tensor 'decoder.conv_in.bias'": lambda t: t.pop("decoder.conv1.bias"),
        r"'quant_conv.bias' is \[95\]": lambda t: t.update({"conv1.bias": torch.zeros(95)}),
        "lacks the tensor 'conv2.weight'": lambda t: t.pop("conv2.weight"),
    }
    for sentence, change in faults.items():
        broken = dict(tensors)
        change(broken)
        save_file(broken, tmp_path / "vae.safetensors")
        with pytest.raises(LanceQuantError, match=sentence):
            check_vae(tmp_path / "vae.safetensors")
