"""Random checkpoints: published counts at real size, and a tiny one that opens, is whole and has the real token ids."""

import pytest
import torch

from benchmarks.make_full_size import (
    ADDED_TOKENS,
    FOLDERS,
    PUBLISHED,
    SCALES,
    VISION,
    Draw,
    MakeConfig,
    ahead,
    make,
    table_frames,
)
from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.checkpoint.inspect import inspect_checkpoint
from lance_quant.checkpoint.layout import open_checkpoint, vision_shapes
from lance_quant.errors import LanceQuantError
from lance_quant.model.embedders import latent_positions
from lance_quant.model.lance import load_lance
from lance_quant.model.prompts import encode, load_tokenizer
from lance_quant.model.vae import load_vae


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    return folder, make(MakeConfig(variant="video", out=str(folder), scale="tiny", device="cpu"))


def checkpoint_in(folder):
    return open_checkpoint(CheckpointConfig(name="video", path=str(folder / FOLDERS["video"])))


def test_it_is_a_whole_checkpoint(made, tmp_path):
    folder, told = made
    summary = inspect_checkpoint(checkpoint_in(folder), tmp_path / "hashes.json")
    assert summary.layout == "video" and summary.targets == {"und": 14, "gen": 14}
    assert (summary.tensors, summary.parameters, summary.bytes) == (told["tensors"], told["parameters"], told["bytes"])
    lance = load_lance(checkpoint_in(folder), dtype=torch.float32)
    norm = lance.get_parameter("language_model.model.layers.0.input_layernorm.weight")
    assert norm.max() > 8 and norm.median().sub(1).abs() < 0.2
    assert all(parameter.isfinite().all() for parameter in lance.parameters())
    assert load_vae(folder / "Wan2.2_VAE.pth").decode(torch.randn(2, 2, 2, 48)).isfinite().all()


def test_what_is_there_is_kept(made):
    folder, _ = made
    again = make(MakeConfig(variant="video", out=str(folder), scale="tiny", device="cpu"))
    assert {value for part, value in again["seconds"].items() if part != "all"} == {"kept"}


def test_token_ids_are_the_published_ones(made):
    tokenizer = load_tokenizer(made[0] / FOLDERS["video"])
    assert tokenizer.get_vocab_size() == 151_665
    text = "<|im_start|>system\nLook<|im_end|>\n<|im_start|>user\n<|video_pad|>?<|im_end|>\n<|im_start|>assistant\n"
    ids = encode(tokenizer, text)
    assert ids[:3] == [151644, 8948, 198] and ids[-3:] == [151644, 77091, 198]
    assert {151645, 872, 151656} < set(ids) and tokenizer.decode(ids, skip_special_tokens=False) == text
    assert [tokenizer.token_to_id(text) for text in ADDED_TOKENS] == list(range(151_643, 151_665))


def test_the_real_scale_has_the_published_counts():
    from tests.published import PUBLISHED_SIZES

    decoder = SCALES["real"].decoder
    assert all(getattr(PUBLISHED_SIZES, name) == value for name, value in decoder.items() if name in SIZES)
    eyes = sum(torch.Size(shape).numel() for shape in vision_shapes(VISION | SCALES["real"].vision).values())
    rows = (31 - 1) * 64**2 * decoder["hidden_size"]
    assert PUBLISHED["video"] == (PUBLISHED["image"][0] + 390, PUBLISHED["image"][1] + eyes + rows)


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def test_values_come_from_the_seed():
    name, shape = "language_model.model.layers.0.mlp.up_proj.weight", (512, 32)
    first, again, other = (torch.cat(list(Draw("cpu", seed, 2).pieces(name, shape))) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.std(1).max() > 3 * first.std(1).median()


def test_the_position_table_is_the_real_one():
    frames = list(table_frames((3 * 64**2, 24)))
    assert torch.equal(torch.cat(frames), latent_positions((3, 64, 64), 24))


def test_a_fault_ahead_comes_through():
    def items():
        yield 1
        raise ValueError("disk")

    made = ahead(items())
    assert next(made) == 1
    with pytest.raises(ValueError, match="disk"):
        next(made)


def test_settings_are_checked():
    with pytest.raises(LanceQuantError, match="variant=images is unknown: take one of image, video"):
        MakeConfig(variant="images", out="x")
    with pytest.raises(LanceQuantError, match="out=FOLDER is missing"):
        MakeConfig()
