"""The published layouts, written: `Lance_tiny/` and `Lance_tiny_video/`, with `Qwen2.5-VL-ViT/` and the VAE file
beside them (Lance spec sec. 1 to 3)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from lance_quant.checkpoint.layout import POSITION_TABLE, VIT_PREFIX
from lance_quant.model.config import LanceConfig
from lance_quant.model.embedders import latent_positions
from lance_quant.tiny.tokenizer import LENGTH, VOCABULARY, save_tokenizer

FOLDERS = {"image": "Lance_tiny", "video": "Lance_tiny_video"}  # of the two layouts
FOLDER = FOLDERS["image"]
VIT_FOLDER = "Qwen2.5-VL-ViT"
HIDDEN = 128

# the fields of the published llm_config.json at this size; the last two are the tiny's own
DECODER = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "max_window_layers": 7,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "max_latent_size": 16,
}
MAX_FRAMES = {"image": 1, "video": 9}  # rows of the position table: one latent frame and three

VISION = {
    "model_type": "qwen2_5_vl",
    "depth": 4,
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_heads": 3,
    "in_chans": 3,
    "in_channels": 3,
    "out_hidden_size": HIDDEN,
    "patch_size": 14,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [1, 3],
    "tokens_per_second": 2,
    "hidden_act": "silu",
}

TOKENS = {
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


def decoder_settings(tokenizer: Tokenizer, layout: str = "image") -> dict:
    """The content of llm_config.json."""
    ids = {key: tokenizer.token_to_id(text) for key, text in TOKENS.items()}
    return DECODER | {"max_num_frames": MAX_FRAMES[layout]} | ids | {"vision_config": VISION}


def architecture(tokenizer: Tokenizer, layout: str = "video") -> tuple[LanceConfig, dict]:
    """The decoder's resolved config and the vision tower's; the weights are the same in both layouts."""
    return LanceConfig.from_dict(decoder_settings(tokenizer, layout), LENGTH), dict(VISION)


def write_checkpoints(weights: dict[str, torch.Tensor], tokenizer: Tokenizer, out: Path) -> list[Path]:
    """Write one set of weights in both layouts under `out`, F32: everything but the VAE. Returns the models' folders.

    weights: a `Lance`'s parameters by name. The image layout keeps the vision tower in a file of its own, the video
    layout bundles it (Lance spec sec. 1); its config.json serves both.
    """
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in weights.items()}
    tower = {name[len(VIT_PREFIX) :]: value for name, value in tensors.items() if name.startswith(VIT_PREFIX)}
    model = {name: value for name, value in tensors.items() if not name.startswith(VIT_PREFIX)}
    eyes = out / VIT_FOLDER
    eyes.mkdir(parents=True, exist_ok=True)
    save_file(tower, eyes / "vit.safetensors", metadata={"format": "pt"})
    _write_json(eyes / "config.json", VISION)
    for layout, name in FOLDERS.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        config, _ = architecture(tokenizer, layout)
        side = config.max_latent_size
        table = latent_positions((config.max_latent_frames, side, side), HIDDEN).contiguous()
        own = {POSITION_TABLE: table} | (tensors if layout == "video" else model)
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
        save_tokenizer(tokenizer, folder)
        settings = decoder_settings(tokenizer, layout)
        _write_json(folder / "llm_config.json", settings)
        generation = {
            "bos_token_id": settings["bos_token_id"],
            "eos_token_id": [settings["eos_token_id"], settings["bos_token_id"]],
            "pad_token_id": settings["bos_token_id"],
            "do_sample": False,
        }
        _write_json(folder / "generation_config.json", generation)
    return [out / name for name in FOLDERS.values()]


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
