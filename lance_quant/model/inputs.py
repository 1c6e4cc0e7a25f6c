"""From a `Request` to a `Sample`: pixels, grids, prompt assembly."""

from dataclasses import replace

from tokenizers import Tokenizer

from lance_quant.errors import LanceQuantError
from lance_quant.model.pixels import latent_grid, open_image, vit_patches, vit_pixels
from lance_quant.model.prompts import assemble
from lance_quant.model.request import Request
from lance_quant.model.sequence import Sample


def prepare(request: Request, tokenizer: Tokenizer, vit_edge: int) -> Sample:
    """The sequence of a question about a picture or of a picture to draw.

    vit_edge: the vision tower's pixel budget, as the edge of a square. Raises LanceQuantError where the picture or the
    size that the task needs is missing.
    """
    if request.task == "x2t_image":
        if request.image is None:
            raise LanceQuantError(f"'{request.name}' asks about a picture and has none: give image=...")
        patches, grid = vit_patches(vit_pixels([open_image(request.image)], vit_edge))
        sample = assemble(request.task, tokenizer, request.prompt, instruction=request.instruction, vit_grid=grid)
        return replace(sample, vit_patches=patches, vit_grids=(grid,))
    if request.task == "t2i":
        if min(request.height, request.width) < 16 or request.height % 16 or request.width % 16:
            raise LanceQuantError(
                f"'{request.name}' draws {request.width} x {request.height} pixels: both sides must be multiples of 16"
            )
        return assemble(
            request.task, tokenizer, request.prompt, latent_grid=latent_grid(1, request.height, request.width)
        )
    raise LanceQuantError(f"task '{request.task}' cannot be prepared yet: take x2t_image or t2i")
