"""Small random layers for the tests: sizes, tensors, a checkpoint on disk, captured activations."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from lance_quant.awq.score import Evidence, evidence
from lance_quant.calibration.activations import SiteActivations
from lance_quant.calibration.sequences import KeptSequence
from lance_quant.checkpoint.layout import (
    NORMS,
    PATHS,
    SITES,
    SUFFIX,
    Checkpoint,
    expected_shapes,
    layer_prefix,
    layer_targets,
    norm_name,
)
from lance_quant.model.config import LanceConfig
from lance_quant.model.resolution import Preset


def small_config(
    heads: int = 4, kv_heads: int = 2, bias: bool = True, layers: int = 1, qk_norm: bool = True
) -> LanceConfig:
    raw = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "vocab_size": 40,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "attention_bias": bias,
        "qk_norm": qk_norm,
        "max_latent_size": 4,
        "max_num_frames": 1,
        "eos_token_id": 1,
        "vision_start": 2,
        "vision_end": 3,
        "video_token_id": 4,
    }
    return LanceConfig.from_dict(raw, tokenizer_length=40)


def random_layer(config: LanceConfig, layer: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Source key -> float32 of one layer's linears, biases and norms."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for target in layer_targets(config, layer):
        shape = (target.out_features, target.in_features)
        tensors[f"{target.name}.weight"] = torch.randn(shape, generator=draw) * 0.1
        if target.bias:
            tensors[f"{target.name}.bias"] = torch.randn(target.out_features, generator=draw) * 0.1
    for path in PATHS:
        for norm in NORMS:
            weight = 1 + 0.2 * torch.randn(config.hidden_size, generator=draw)
            tensors[f"{norm_name(layer, path, norm)}.weight"] = weight
        for leaf in ("q_norm", "k_norm") if config.qk_norm else ():
            weight = 1 + 0.2 * torch.randn(config.head_dim, generator=draw)
            tensors[f"{layer_prefix(layer)}self_attn.{leaf}{SUFFIX[path]}.weight"] = weight
    return tensors


def random_checkpoint(folder: Path, config: LanceConfig) -> Checkpoint:
    """A checkpoint whose model file is real and random; its other files do not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(5)
    tensors = {key: torch.randn(shape, generator=draw) * 0.1 for key, shape in expected_shapes(config).items()}
    save_file(tensors, folder / "model.safetensors")
    return checkpoint_of(folder / "model.safetensors", config)


def checkpoint_of(model_file: Path, config: LanceConfig) -> Checkpoint:
    nowhere = model_file.parent / "absent"
    return Checkpoint(
        name="test",
        layout="image",
        folder=model_file.parent,
        model_file=model_file,
        config_file=nowhere,
        vit_file=None,
        vit_config_file=nowhere,
        vae_file=nowhere,
        config=config,
        pictures=Preset(128, 112),
        clips=Preset(128, 112),
        frames=5,
    )


def random_sites(
    config: LanceConfig, layer: int = 0, rows: int = 80, seed: int = 1, outliers: float = 1.0
) -> dict[tuple[str, str], SiteActivations]:
    """Two tasks' activations at every site; every 16th channel is `outliers` times as large."""
    draw = torch.Generator().manual_seed(seed)
    width = {(target.path, target.site): target.in_features for target in layer_targets(config, layer)}
    sites = {}
    for key in [(path, site) for path in PATHS for site in SITES]:
        size = torch.ones(width[key])
        size[::16] = outliers
        x = (torch.randn(rows, width[key], generator=draw) * size).to(torch.bfloat16)
        x[rows // 2 :] *= 30  # the second task's activations are larger; it must not count for more
        half = {"x2t_image": x[: rows // 2].float(), "t2i": x[rows // 2 :].float()}
        sites[key] = SiteActivations(
            tasks=list(half),
            tokens={"x2t_image": 1000, "t2i": 3000},
            mean_abs={task: value.abs().mean(0) for task, value in half.items()},
            mean_sq={task: value.square().mean(0) for task, value in half.items()},
            max_abs={task: value.abs().amax(0) for task, value in half.items()},
            rows=x,
            row_tasks=["x2t_image"] * (rows // 2) + ["t2i"] * (rows - rows // 2),
            row_samples=list(range(rows)),
            row_timesteps=torch.full((rows,), float("nan")),
        )
    return sites


def random_sequences(config: LanceConfig, count: int = 3, seed: int = 2, outliers: float = 4.0) -> list[KeptSequence]:
    """`count` questions of 24 tokens and as many pictures of 8 and 16; every 16th channel `outliers` times as large."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.ones(config.hidden_size)
    size[::16] = outliers
    out = []
    for index in range(2 * count):
        states = (torch.randn(24, config.hidden_size, generator=draw) * size).to(torch.bfloat16)
        latent = torch.zeros(24, dtype=torch.bool)
        spans, task = ((0, 24, "causal"),), "x2t_image"
        if index % 2:
            latent[8:] = True
            spans, task = ((0, 8, "causal"), (8, 24, "noise")), "t2i"
        positions = torch.arange(24).expand(3, -1)
        out.append(
            KeptSequence(
                task=task,
                sample=index,
                timestep=0.5,
                positions=positions,
                latent=latent,
                drawn=latent,
                said=~latent & (task == "x2t_image"),
                spans=spans,
                states=states,
            )
        )
    return out


def random_evidence(config: LanceConfig, layer: int = 0, **kwargs) -> Evidence:
    sites = random_sites(config, layer, **kwargs)
    return evidence(sites, layer_targets(config, layer), by_token=False, device="cpu")


def random_gradients(kept: list[KeptSequence], seed: int = 6, directions: int = 4) -> dict[int, torch.Tensor]:
    """Of each sequence, in a few directions of its states."""
    draw = torch.Generator().manual_seed(seed)
    along = torch.randn(directions, kept[0].states.shape[1], generator=draw)
    return {
        number: (torch.randn(len(one.states), directions, generator=draw) @ along).bfloat16()
        for number, one in enumerate(kept)
    }
