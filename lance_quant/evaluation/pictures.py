"""How far apart two pictures or two tensors are: PSNR and SSIM; relative L2 and cosine.

picture_scores(bf16_pixels, int4_pixels).psnr
"""

from dataclasses import dataclass

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lance_quant.errors import LanceQuantError

PSNR_CAP = 100.0  # identical pictures have infinite PSNR; a finite stand-in keeps means and JSON usable
SSIM_WINDOW = 7  # scikit-image's default, smaller only for pictures with a shorter side


@dataclass(frozen=True, kw_only=True)
class PictureScores:
    """psnr in dB, at most PSNR_CAP; ssim in -1..1, 1 = identical."""

    psnr: float
    ssim: float


@dataclass(frozen=True, kw_only=True)
class TensorErrors:
    """relative_l2 = |other - baseline| / |baseline|; cosine of the angle between the two, flattened."""

    relative_l2: float
    cosine: float


def picture_scores(baseline: np.ndarray, other: np.ndarray) -> PictureScores:
    """PSNR and SSIM of two uint8 RGB pictures [H, W, 3] of equal size, at least 3 pixels a side.

    SSIM: 7 x 7 uniform window (the largest odd one that fits smaller pictures), mean over channels, range 255.
    Identical pictures have PSNR_CAP dB. Raises LanceQuantError for other dtypes or shapes.
    """
    for picture in (baseline, other):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or min(picture.shape[:2]) < 3:
            raise LanceQuantError(
                f"a picture of {picture.dtype} {picture.shape} cannot be scored: give uint8 [H, W, 3], 3 pixels or more"
            )
    if baseline.shape != other.shape:
        raise LanceQuantError(
            f"pictures of {baseline.shape} and {other.shape} cannot be compared: generate both at one size"
        )
    if np.array_equal(baseline, other):
        return PictureScores(psnr=PSNR_CAP, ssim=1.0)
    side = min(baseline.shape[:2])
    window = min(SSIM_WINDOW, side if side % 2 else side - 1)
    return PictureScores(
        psnr=min(PSNR_CAP, float(peak_signal_noise_ratio(baseline, other, data_range=255))),
        ssim=float(structural_similarity(baseline, other, win_size=window, channel_axis=-1, data_range=255)),
    )


def clip_scores(baseline: np.ndarray, other: np.ndarray) -> PictureScores:
    """Means of PSNR and SSIM over the frames of two uint8 clips [T, H, W, 3]; a picture is a clip of one frame.

    Raises LanceQuantError where `picture_scores` does, and where the clips differ in length.
    """
    if len(baseline) != len(other):
        raise LanceQuantError(
            f"clips of {len(baseline)} and {len(other)} frames cannot be compared: generate both at one length"
        )
    scores = [picture_scores(before, after) for before, after in zip(baseline, other, strict=True)]
    return PictureScores(
        psnr=float(np.mean([score.psnr for score in scores])), ssim=float(np.mean([score.ssim for score in scores]))
    )


def tensor_errors(baseline: torch.Tensor, other: torch.Tensor) -> TensorErrors:
    """Relative L2 error and cosine of two float tensors of one shape (velocities, latents), accumulated in float64.

    Two zero tensors are equal (0, 1); against a zero baseline the relative error is infinite and the cosine 0.
    Raises LanceQuantError where the shapes differ.
    """
    if baseline.shape != other.shape:
        raise LanceQuantError(
            f"tensors of {tuple(baseline.shape)} and {tuple(other.shape)} cannot be compared: give two of one shape"
        )
    a, b = baseline.double().flatten(), other.double().flatten()
    norm_a, norm_b, distance = a.norm().item(), b.norm().item(), (b - a).norm().item()
    if distance == 0.0:
        return TensorErrors(relative_l2=0.0, cosine=1.0)
    if norm_a == 0.0 or norm_b == 0.0:
        return TensorErrors(relative_l2=distance / norm_a if norm_a else float("inf"), cosine=0.0)
    return TensorErrors(relative_l2=distance / norm_a, cosine=(a @ b).item() / (norm_a * norm_b))
