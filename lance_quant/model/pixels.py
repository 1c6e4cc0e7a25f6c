"""Pictures in and out: bucket resize, vision-tower patches, frame sampling (Lance spec sec. 6)."""

import numpy as np
import torch
from PIL import Image

RATIOS = (21 / 9, 16 / 9, 4 / 3, 1.0, 3 / 4, 9 / 16)
STRIDE = 16  # of both bucket tables, the vision tower's too (quirk Q11)
VIT_STRIDE = 28
PATCH, TEMPORAL_PATCH, MERGE = 14, 2, 2
VIT_MEAN = (0.48145466, 0.4578275, 0.40821073)
VIT_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_SECONDS, SAMPLED_FPS = 6.0, 12  # quirk Q13: longer clips are compressed in time


def open_image(image: Image.Image) -> Image.Image:
    """RGB; palettes and transparency over white."""
    if image.mode == "P":
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def bucket(ratio: float, edge: int) -> tuple[int, int]:
    """(width, height) for a width/height ratio within a budget of edge^2 pixels, multiples of 16."""
    area = edge * edge

    def stepped(value: float) -> int:
        return round(value / STRIDE) * STRIDE

    width1 = stepped((area * ratio) ** 0.5)
    height1 = stepped(width1 / ratio)
    height2 = stepped((area / ratio) ** 0.5)
    width2 = stepped(height2 * ratio)
    candidates = [(width1, height1), (width2, height2)]
    return min(candidates, key=lambda size: (abs(size[0] / size[1] - ratio), abs(size[0] * size[1] - area)))


def nearest_bucket(width: int, height: int, edge: int) -> tuple[int, int]:
    """The bucket (width, height) whose own ratio is nearest to the picture's; the first on a tie."""
    sizes = [bucket(ratio, edge) for ratio in RATIOS]
    return min(sizes, key=lambda size: abs(width / height - size[0] / size[1]))


def bucket_resize(image: Image.Image, edge: int) -> Image.Image:
    """Centre-crop to the nearest bucket's ratio and resize to it, bicubic with antialiasing; small pictures grow."""
    width, height = image.size
    target = nearest_bucket(width, height, edge)
    ratio = target[0] / target[1]
    crop_width, crop_height = width, height
    if width / height < ratio:
        crop_height = round(width / ratio)
    elif width / height > ratio:
        crop_width = round(height * ratio)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    cropped = image.crop((left, top, left + crop_width, top + crop_height))
    return cropped if cropped.size == target else cropped.resize(target, Image.Resampling.BICUBIC)


def _unit(images: list[Image.Image]) -> torch.Tensor:
    """[3, T, H, W] float32 in [0, 1]."""
    frames = torch.from_numpy(np.stack([np.asarray(image, dtype=np.uint8) for image in images]))
    return frames.permute(3, 0, 1, 2).float().div_(255)  # in place here and below: a clip is 240 MB


def vae_pixels(frames: list[Image.Image], edge: int) -> torch.Tensor:
    """RGB frames -> [3, T, H, W] in [-1, 1] at the VAE's bucket."""
    return _unit([bucket_resize(frame, edge) for frame in frames]).sub_(0.5).div_(0.5)


def vit_pixels(frames: list[Image.Image], edge: int) -> torch.Tensor:
    """RGB frames -> normalised [3, T, H, W] at the vision tower's bucket, centre-cropped to multiples of 28."""
    pixels = _unit([bucket_resize(frame, edge) for frame in frames])
    height, width = pixels.shape[-2:]
    rows, columns = height // VIT_STRIDE * VIT_STRIDE, width // VIT_STRIDE * VIT_STRIDE
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    pixels = pixels[:, :, top : top + rows, left : left + columns]
    return pixels.sub_(torch.tensor(VIT_MEAN).view(3, 1, 1, 1)).div_(torch.tensor(VIT_STD).view(3, 1, 1, 1))


def vit_patches(pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Normalised [3, T, H, W] -> patches float32 [t*h*w, 1176] grouped by 2x2 merge blocks, and the grid (t, h, w).

    A picture is doubled to two frames, an odd clip repeats its last frame (Lance spec sec. 6).
    """
    if pixels.shape[1] % TEMPORAL_PATCH:
        pixels = torch.cat((pixels, pixels[:, -1:]), dim=1)
    channels, frames, height, width = pixels.shape
    t, h, w = frames // TEMPORAL_PATCH, height // PATCH, width // PATCH
    x = pixels.reshape(channels, t, TEMPORAL_PATCH, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    x = x.permute(1, 3, 6, 4, 7, 0, 2, 5, 8)  # t, h/2, w/2, 2, 2 | C, tp, p, p
    return x.reshape(t * h * w, channels * TEMPORAL_PATCH * PATCH * PATCH), (t, h, w)


def sample_frames(total: int, fps: float, faithful: bool = True) -> list[int]:
    """Indices of the frames that edit and video questions look at (Lance spec sec. 6).

    faithful=False takes the first six seconds of a longer clip at their own speed, instead of the whole clip compressed
    in time (quirk Q13). Raises ValueError for clips too short to give a frame.
    """
    rate = int(round(fps)) if fps and fps > 0 else 24
    if not faithful:
        total = min(total, round(MAX_SECONDS * rate))
    count = round(min(total / rate, MAX_SECONDS) * SAMPLED_FPS)
    count = 4 * (count // 4) + 1 if count % 4 else count - 3
    if count <= 0:
        raise ValueError(f"a clip of {total} frames at {rate} a second is too short")
    return np.trunc(np.linspace(0, total - 1, count)).astype(int).tolist()


def latent_grid(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(t, h, w) latents of a clip of `frames` at height x width pixels."""
    return (frames - 1) // 4 + 1, height // 16, width // 16
