"""Opening and checking a checkpoint: every fault is one sentence that names file and key."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.checkpoint.inspect import file_hash, inspect_checkpoint
from lance_quant.checkpoint.layout import (
    POSITION_TABLE,
    expected_shapes,
    open_checkpoint,
    targets,
    vision_shapes,
)
from lance_quant.errors import LanceQuantError
from lance_quant.model.lance import build_lance, load_lance
from tests.published import PUBLISHED_SIZES
from tests.random_checkpoint import VISION, random_checkpoint, write_random_checkpoint

PUBLISHED_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "in_chans": 3,
    "out_hidden_size": 2048,
    "patch_size": 14,
}


def test_the_published_models_arithmetic():
    """Lance spec sec. 1 and 3: tensors, parameters and targets of both variants."""
    shapes = expected_shapes(PUBLISHED_SIZES)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert len(shapes) + 1 == 1021 and parameters + 4096 * 2048 == 6_185_205_808
    tower = vision_shapes(PUBLISHED_VISION)
    eyes = sum(torch.Size(shape).numel() for shape in tower.values())
    assert len(tower) == 390 and eyes == 668_684_288
    assert len(shapes) + len(tower) + 1 == 1411 and parameters + eyes + 126976 * 2048 == 7_105_548_336
    found = targets(PUBLISHED_SIZES)
    assert len(found) == 504 and sum(target.path == "gen" for target in found) == 252
    assert sum(target.in_features * target.out_features for target in found) == 5_549_064_192
    assert PUBLISHED_SIZES.max_latent_frames == 31


def test_shapes_are_those_of_the_modules(tmp_path):
    lance = build_lance(random_checkpoint(tmp_path), torch.float32)
    mine = expected_shapes(lance.config) | {f"vit_model.{name}": shape for name, shape in vision_shapes(VISION).items()}
    assert {name: tuple(parameter.shape) for name, parameter in lance.named_parameters()} == mine


@pytest.mark.parametrize("layout", ["image", "video"])
def test_layouts(tmp_path, layout):
    checkpoint = random_checkpoint(tmp_path, layout=layout)
    summary = inspect_checkpoint(checkpoint, tmp_path / "hashes.json")
    assert summary.layout == layout and summary.targets == {"und": 14, "gen": 14}
    lance = load_lance(checkpoint)
    source = load_file(checkpoint.model_file)
    name = "language_model.model.layers.1.mlp_moe_gen.down_proj.weight"
    assert torch.equal(lance.get_parameter(name), source[name].to(torch.bfloat16))
    assert (checkpoint.vit_file is None) == (layout == "video")


def test_the_bundled_vision_tower_wins(tmp_path):
    """The video file's own tower overrides the standalone one (Lance spec sec. 1)."""
    cfg = write_random_checkpoint(tmp_path, layout="video")
    name = "blocks.0.attn.proj.weight"
    save_file({name: torch.zeros(32, 32)}, tmp_path / "Qwen2.5-VL-ViT" / "vit.safetensors")
    lance = load_lance(open_checkpoint(cfg), dtype=torch.float32)
    bundled = load_file(f"{cfg.path}/model.safetensors")[f"vit_model.{name}"]
    assert torch.equal(lance.vit_model.get_parameter(name), bundled)


def change(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


FAULTS = {
    "missing": (lambda t: t.pop("llm2vae.bias"), "lacks tensor 'llm2vae.bias'"),
    "unexpected": (lambda t: t.update(connector=torch.zeros(1)), "unknown tensor 'connector'"),
    "shape": (lambda t: t.update({"llm2vae.bias": torch.zeros(47)}), r"'llm2vae.bias' is \[47\], the config asks for"),
    "dtype": (lambda t: t.update({"llm2vae.bias": torch.zeros(48, dtype=torch.uint8)}), "'llm2vae.bias' is U8"),
    "table": (lambda t: t.update({POSITION_TABLE: torch.zeros(255, 128)}), "multiple of 256 rows"),
    "no table": (lambda t: t.pop(POSITION_TABLE), "lacks the tensor 'latent_pos_embed.pos_embed'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_the_model_file(tmp_path, fault):
    edit, sentence = FAULTS[fault]
    checkpoint = random_checkpoint(tmp_path)
    change(checkpoint.model_file, edit)
    with pytest.raises(LanceQuantError, match=sentence) as raised:
        inspect_checkpoint(checkpoint, tmp_path / "hashes.json")
    assert "model.safetensors" in str(raised.value) and "\n" not in str(raised.value)


def test_truncated(tmp_path):
    cfg = write_random_checkpoint(tmp_path)
    model = tmp_path / "Lance" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-5000])
    with pytest.raises(LanceQuantError, match="truncated"):
        open_checkpoint(cfg)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("Lance/model.safetensors", "checkpoint.path"),
        ("Lance/llm_config.json", "llm_config.json is missing"),
        ("Lance/tokenizer.json", "tokenizer.json is missing"),
        ("Qwen2.5-VL-ViT/config.json", "checkpoint.vit"),
        ("Qwen2.5-VL-ViT/vit.safetensors", "checkpoint.vit"),
        ("Wan2.2_VAE.safetensors", "checkpoint.vae"),
    ],
)
def test_a_missing_part_says_which_option_takes_it(tmp_path, part, sentence):
    cfg = write_random_checkpoint(tmp_path)
    (tmp_path / part).unlink()
    with pytest.raises(LanceQuantError, match=sentence):
        open_checkpoint(cfg)


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(LanceQuantError, match="huggingface.co.*checkpoint.path"):
        open_checkpoint(CheckpointConfig(name="image", path=str(tmp_path / "none")))


def test_config_faults(tmp_path):
    cfg = write_random_checkpoint(tmp_path)
    path = tmp_path / "Lance" / "llm_config.json"
    values = json.loads(path.read_text())
    for change, sentence in (
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_scaling": {"mrope_section": [4, 6, 7]}}, "sum to 16"),
    ):
        path.write_text(json.dumps({k: v for k, v in (values | change).items() if v is not None}))
        with pytest.raises(LanceQuantError, match=sentence):
            open_checkpoint(cfg)
    path.write_text("{")
    with pytest.raises(LanceQuantError, match="not readable JSON"):
        open_checkpoint(cfg)


def test_a_file_is_hashed_once(tmp_path, monkeypatch):
    path, cache = tmp_path / "big", tmp_path / "hashes.json"
    path.write_bytes(b"first")
    first = file_hash(path, cache)
    monkeypatch.setattr("hashlib.sha256", lambda: pytest.fail("read again"))
    assert file_hash(path, cache) == first
    monkeypatch.undo()
    path.write_bytes(b"second")
    assert file_hash(path, cache) != first


def test_the_fingerprint_follows_every_file(tmp_path):
    checkpoint = random_checkpoint(tmp_path)
    cache = tmp_path / "hashes.json"
    before = inspect_checkpoint(checkpoint, cache).fingerprint
    change(checkpoint.vit_file, lambda tensors: tensors.update({"merger.ln_q.weight": torch.zeros(32)}))
    assert inspect_checkpoint(checkpoint, cache).fingerprint != before
