"""The VAE through diffusers against upstream's own outputs, and its key map."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lance_quant.errors import LanceQuantError
from lance_quant.model.vae import LATENT_MEAN, LATENT_STD, check_vae, load_vae, to_uint8
from tests.golden_cases import FOLDER, RECORDED

FILE = FOLDER / "tiny_wan22_vae.safetensors"


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
