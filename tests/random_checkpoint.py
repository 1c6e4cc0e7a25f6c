"""A random Lance in the on-disk layout, small enough to run every stage in seconds."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.checkpoint.layout import (
    POSITION_TABLE,
    VIT_PREFIX,
    Checkpoint,
    expected_shapes,
    open_checkpoint,
    vision_shapes,
)
from lance_quant.model.config import LanceConfig
from lance_quant.tiny.tokenizer import save_tokenizer, train_tokenizer
from tests.golden_cases import FOLDER

VISION = {
    "depth": 2,
    "hidden_size": 32,
    "hidden_act": "silu",
    "intermediate_size": 48,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 112,
    "out_hidden_size": 128,
    "fullatt_block_indexes": [1],
}


def write_random_checkpoint(root: Path, layout: str = "image", layers: int = 2, seed: int = 0) -> CheckpointConfig:
    """Write `root/Lance/`, the vision tower's folder and the VAE file; returns the config that opens them."""
    folder, vit = root / "Lance", root / "Qwen2.5-VL-ViT"
    for path in (folder, vit):
        path.mkdir(parents=True)
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, folder)
    llm = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"mrope_section": [4, 6, 6]},
        "max_latent_size": 16,
        "max_num_frames": 1 if layout == "image" else 9,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
    }
    (folder / "llm_config.json").write_text(json.dumps(llm))
    (vit / "config.json").write_text(json.dumps(VISION))
    config = LanceConfig.from_folder(folder)
    generator = torch.Generator().manual_seed(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("norm.weight") or "layernorm" in name or "_norm" in name or "norm1" in name or "norm2" in name:
            return 1 + 0.1 * torch.randn(shape, generator=generator)
        return torch.randn(shape, generator=generator) * (0.02 if len(shape) == 1 else shape[-1] ** -0.5)

    tensors = {name: tensor(name, shape) for name, shape in expected_shapes(config, layout != "text").items()}
    if layout == "text":
        save_file(tensors, folder / "model.safetensors")
        return CheckpointConfig(name="random", path=str(folder))
    tower = {name: tensor(name, shape) for name, shape in vision_shapes(VISION).items()}
    tensors[POSITION_TABLE] = torch.zeros(16 * 16 * config.max_latent_frames, config.hidden_size)
    if layout == "video":
        tensors |= {VIT_PREFIX + name: value for name, value in tower.items()}
    else:
        save_file(tower, vit / "vit.safetensors")
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(FOLDER / "tiny_wan22_vae.safetensors", root / "Wan2.2_VAE.safetensors")
    return CheckpointConfig(
        name="random", path=str(folder), image_edge=64, vit_edge=56, video_edge=64, video_vit_edge=56
    )


def random_checkpoint(root: Path, **settings) -> Checkpoint:
    return open_checkpoint(write_random_checkpoint(root, **settings))
