"""The parity fixtures as the model's own types: config, weights and samples of `tests/golden/manifest.json`."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from lance_quant.checkpoint.fill import fill
from lance_quant.model.config import LanceConfig
from lance_quant.model.lance import Lance
from lance_quant.model.sequence import Sample

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
WEIGHTS = GOLDEN / "tiny_lance_video.safetensors"


def golden_config() -> LanceConfig:
    f32 = MANIFEST["f32"]
    ids = f32["compact_special_ids"]
    return LanceConfig.from_dict(
        f32["tiny_llm_config"]
        | {
            "max_latent_size": f32["max_latent_size"],
            "max_num_frames": f32["max_num_frames"],
            "eos_token_id": ids["eos_token_id"],
            "vision_start_token_id": ids["start_of_image"],
            "vision_end_token_id": ids["end_of_image"],
            "video_token_id": ids["image_token_id"],
        },
        tokenizer_length=f32["vocab_eff"],
    )


@cache
def golden_lance(mode: str) -> Lance:
    """The fixtures' weights in float32 or bfloat16; mode is "f32" or "bf16"."""
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[mode]
    with torch.device("meta"):
        lance = Lance(golden_config(), MANIFEST["f32"]["tiny_vit_config"], dtype).eval()
    fill(lance, WEIGHTS, "cpu", dtype)
    return lance


def golden_case(mode: str, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """A case's settings and its tensors."""
    case = MANIFEST[mode]["cases"][name]
    return case, load_file(GOLDEN / case["file"])


def _grids(tensor: torch.Tensor) -> tuple:
    return tuple(tuple(row) for row in tensor.reshape(-1, 3).tolist())


def golden_sample(case: dict, tensors: dict[str, torch.Tensor]) -> Sample:
    """A prepared sample as the manifest describes one."""
    ids = tensors["in.text_ids"]
    pad = golden_config().video_token_id
    empty = torch.empty(0, dtype=torch.int64)
    understanding = "in.ce_indexes" in tensors
    vit_grids = _grids(tensors["in.vit_grid_thw"]) if "in.vit_grid_thw" in tensors else ()
    sizes = tensors.get("in.video_sizes_THW")
    latent_grids = () if sizes is None else tuple(((t - 1) // 4 + 1, h // 16, w // 16) for t, h, w in sizes.tolist())
    count = int(tensors["in.ce_indexes"][0]) + 1 if understanding else len(ids)
    return Sample(
        task="x2t_image" if understanding else "t2i",
        ids=ids,
        split_lens=tuple(case["split_lens"]),
        split_modes=tuple(case["attn_modes"]),
        modality=tensors.get("in.modality", torch.full_like(ids, -1)),
        grids=vit_grids if understanding else _grids(tensors["in.rope_grid_thw"]),
        vit_indexes=(ids == pad).nonzero().squeeze(1) if understanding else tensors.get("in.vit_token_indexes", empty),
        vae_indexes=tensors.get("in.vae_token_indexes", empty),
        mse_indexes=tensors.get("in.mse_indexes", empty),
        latent_grids=latent_grids,
        context_length=count if understanding else None,
        vit_patches=tensors.get("in.vit_patches"),
        vit_grids=vit_grids,
    )


def relative_l2(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())
