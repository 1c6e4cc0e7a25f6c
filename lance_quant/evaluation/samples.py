"""The requests that baseline and comparison both run, and the names of the files that they share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lance_quant.checkpoint.layout import Checkpoint
from lance_quant.evaluation.config import EvaluationConfig, evaluated_tasks
from lance_quant.model.request import GENERATION, GIVEN, Request
from lance_quant.model.sampler import FlowConfig
from lance_quant.model.vae import WanVAE, load_vae, vae_dtype
from lance_quant.seeds import seed_of

ANSWERS = "answers.parquet"
STRIP_FRAMES, STRIP_EDGE, STRIP_GAP = 5, 256, 4  # of a clip as one picture: frames, their longest side, pixels between
GAP_COLOUR = (168, 168, 168)  # stands out on white and on black


def evaluation_requests(checkpoint: Checkpoint, cfg: EvaluationConfig) -> list[Request]:
    """Held-out requests, task by task, the same for baseline and comparison."""
    tasks = evaluated_tasks(cfg, checkpoint.layout)
    if cfg.source == "bundled":
        from lance_quant.calibration.bundled import bundled_requests

        requests = bundled_requests(checkpoint, tasks, cfg.samples, seed=cfg.seed, held_out=True)
    else:
        from lance_quant.tiny.requests import scene_requests

        requests = []
        for task in tasks:
            edge = checkpoint.edges(task).image_edge
            requests += scene_requests([task], cfg.samples, edge, seed=cfg.seed, unseen=True)
    return [shortened(request, cfg.frames) for request in requests] if cfg.frames else requests


def shortened(request: Request, frames: int) -> Request:
    """The request with clips of at most `frames` frames, 4 n + 1."""
    return replace(
        request,
        video=request.video[:frames],
        target=request.target[:frames],
        frames=min(request.frames, frames),
    )


def flow_config(cfg: EvaluationConfig) -> FlowConfig:
    return FlowConfig(steps=cfg.steps, timestep_shift=cfg.timestep_shift, guidance=cfg.guidance)


def velocity_steps(cfg: EvaluationConfig) -> list[int]:
    """Steps at which velocities are kept and compared, the first and the last among them."""
    count = min(cfg.velocity_steps or cfg.steps, cfg.steps)
    return np.linspace(0, cfg.steps - 1, count).round().astype(int).tolist()


def drawing_vae(checkpoint: Checkpoint, cfg: EvaluationConfig, device: str) -> WanVAE | None:
    """The VAE where a task draws, which all edits do; in bfloat16 on a GPU, as upstream."""
    if not set(evaluated_tasks(cfg, checkpoint.layout)) & set(GENERATION):
        return None
    return load_vae(checkpoint.vae_file, device, vae_dtype(device))


def noise_seed(cfg: EvaluationConfig, index: int) -> int:
    """Each sample starts from noise of its own, and of none that was calibrated on."""
    return seed_of(cfg.seed, index, held_out=True)


def given_picture(request: Request) -> Image.Image | None:
    """What the request looks at or starts from as one picture: a clip's frames side by side."""
    given = GIVEN.get(request.task)
    if given is None:
        return None
    return request.image if given == "image" else strip([np.asarray(frame.convert("RGB")) for frame in request.video])


def strip(frames) -> Image.Image:
    """A clip as one picture: up to STRIP_FRAMES frames uint8 [H, W, 3], evenly spread, side by side."""
    at = np.linspace(0, len(frames) - 1, min(len(frames), STRIP_FRAMES)).round().astype(int)
    shown = [Image.fromarray(np.asarray(frames[index])) for index in at]
    for picture in shown:
        picture.thumbnail((STRIP_EDGE, STRIP_EDGE), Image.Resampling.LANCZOS)
    width, height = shown[0].size
    out = Image.new("RGB", (len(shown) * (width + STRIP_GAP) - STRIP_GAP, height), GAP_COLOUR)
    for place, picture in enumerate(shown):
        out.paste(picture, (place * (width + STRIP_GAP), 0))
    return out


def save_frames(folder: Path, name: str, frames: np.ndarray) -> None:
    """What was drawn, uint8 [T, H, W, 3]: a picture as PNG, a clip as a strip and its frames without loss."""
    if len(frames) == 1:
        Image.fromarray(frames[0]).save(picture_file(folder, name))
        return
    strip(frames).save(picture_file(folder, name))
    save_tensors(folder, "frames", name, frames=torch.from_numpy(frames))


def load_frames(folder: Path, name: str) -> np.ndarray:
    """What `save_frames` wrote, uint8 [T, H, W, 3]."""
    if (folder / "frames" / f"{name}.safetensors").exists():
        return load_tensors(folder, "frames", name)["frames"].numpy()
    return np.asarray(Image.open(picture_file(folder, name)))[None]


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
