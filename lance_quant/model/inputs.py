"""From a `Request` to a `Sample`: pixels, grids, prompt assembly, clean latents, for all seven tasks."""

from dataclasses import replace

from PIL import Image
from tokenizers import Tokenizer

from lance_quant.errors import LanceQuantError
from lance_quant.model.config import TEMPORAL_DOWNSAMPLE
from lance_quant.model.pixels import latent_grid, nearest_bucket, open_image, vae_pixels, vit_patches, vit_pixels
from lance_quant.model.prompts import USER_BLOCKS, assemble
from lance_quant.model.request import GIVEN, INSTRUCTIONS, TASKS, UNDERSTANDING, Request
from lance_quant.model.resolution import Preset
from lance_quant.model.sequence import Sample
from lance_quant.model.vae import WanVAE

MISSING = {"image": "a picture and got none: give image=FILE", "video": "a clip and got none: give video=FILE"}

# which sizes a request names itself; the others come from its picture or clip, and t2i draws a single frame
SIZED = {"t2i": ("height", "width"), "t2v": ("height", "width", "frames"), "i2v": ("frames",)}


def prepare(request: Request, tokenizer: Tokenizer, edges: Preset, vae: WanVAE | None = None) -> Sample:
    """The sequence of a request, with its pixels and clean latents (Lance spec sec. 4 to 6).

    edges: pixel budgets of what is given, as edges of a square. vae: encodes what i2v, image_edit and video_edit start
    from. Raises LanceQuantError where the task is unknown, or the picture, clip or size that it needs is missing.
    """
    task = request.task
    if task not in TASKS:
        raise LanceQuantError(f"task '{task}' is unknown: take one of {', '.join(TASKS)}")
    frames = given_frames(request)
    looks = "vit" in USER_BLOCKS[task]
    patches, vit_grid = vit_patches(vit_pixels(frames, edges.vit_edge)) if looks else (None, None)
    clean, target = None, None
    if task not in UNDERSTANDING:
        clean = vae.encode(vae_pixels(frames, edges.image_edge)).cpu() if frames else None
        target = latent_grid(*drawn_size(request, edges))
    sample = assemble(
        task,
        tokenizer,
        request.prompt,
        instruction=request.instruction or INSTRUCTIONS.get(task, ""),
        vit_grid=vit_grid,
        latent_grid=target,
    )
    if looks:
        sample = replace(sample, vit_patches=patches, vit_grids=(vit_grid,))
    if clean is not None:  # of an edit the first block is the source, the second one drawn
        sample = replace(sample, clean_latents=(clean,) if task == "i2v" else (clean, None))
    return sample


def given_frames(request: Request) -> list[Image.Image]:
    """RGB frames that the task looks at or starts from, none for t2i and t2v. LanceQuantError where one is missing."""
    given = GIVEN.get(request.task)
    if given is None:
        return []
    frames = [request.image] if given == "image" else list(request.video)
    if not frames or frames[0] is None:
        raise LanceQuantError(f"'{request.name}': task {request.task} needs {MISSING[given]}")
    return [open_image(frame) for frame in frames]


def drawn_size(request: Request, edges: Preset) -> tuple[int, int, int]:
    """(frames, height, width) that a task draws: of the size asked for, or of what is given (Lance spec sec. 6).

    A clip has 4 n + 1 frames; what is more is left out, as upstream does. Raises LanceQuantError where the size asked
    for is none.
    """
    task = request.task
    height, width, frames = request.height, request.width, 1
    if task in GIVEN:
        picture = request.image if GIVEN[task] == "image" else request.video[0]
        width, height = nearest_bucket(*picture.size, edges.image_edge)
    elif min(height, width) < 16 or height % 16 or width % 16:
        raise LanceQuantError(f"'{request.name}' draws {width} x {height} pixels: both sides must be multiples of 16")
    if task == "video_edit":
        frames = len(request.video)
    elif "frames" in SIZED.get(task, ()):
        frames = request.frames
        if frames < 1:
            raise LanceQuantError(f"'{request.name}': frames={frames} must be at least 1")
    return frames - (frames - 1) % TEMPORAL_DOWNSAMPLE, height, width
