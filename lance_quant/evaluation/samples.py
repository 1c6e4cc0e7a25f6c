"""Names of the files that baseline and comparison share, and the requests that both run."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lance_quant.checkpoint.layout import Checkpoint
from lance_quant.evaluation.config import EvaluationConfig
from lance_quant.model.request import Request
from lance_quant.model.sampler import FlowConfig
from lance_quant.tiny.requests import scene_requests

ANSWERS = "answers.parquet"


def evaluation_requests(checkpoint: Checkpoint, cfg: EvaluationConfig) -> list[Request]:
    """Held-out scenes, the same for baseline and comparison."""
    return scene_requests(cfg.tasks, cfg.samples, checkpoint.image_edge, seed=cfg.seed, unseen=True)


def flow_config(cfg: EvaluationConfig) -> FlowConfig:
    return FlowConfig(steps=cfg.steps, timestep_shift=cfg.timestep_shift, guidance=cfg.guidance)


def picture_file(folder: Path, name: str) -> Path:
    return folder / "pictures" / f"{name}.png"


def image_file(folder: Path, name: str) -> Path:
    return folder / "images" / f"{name}.png"


def save_tensors(folder: Path, kind: str, name: str, **tensors: torch.Tensor) -> None:
    path = folder / kind / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, path)


def load_tensors(folder: Path, kind: str, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / kind / f"{name}.safetensors")
