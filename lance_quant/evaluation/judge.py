"""Does a drawn picture or clip of a scene show what was asked for? Read by Lance-tiny's deterministic scene reader.

shows_what_was_asked(request, frames, source="scenes")
"""

from collections import Counter

import numpy as np
import torch

from lance_quant.model.request import Request
from lance_quant.tiny.reader import Reading, read
from lance_quant.tiny.world import CANVAS

WHOLE = ("image_edit", "video_edit", "i2v")  # the source says size and place of all things; a caption need not


def shows_what_was_asked(request: Request, frames: np.ndarray, source: str) -> bool | None:
    """Whether frames uint8 [T, H, W, 3] show the things of the request's target in their colours, at the start and the
    end of a clip, and in size and place where the request's source says them; None where that cannot be told: no
    scene, no target.
    """
    if source != "scenes" or not request.target or frames.shape[1:3] != (CANVAS, CANVAS):
        return None
    target = [np.asarray(frame.convert("RGB")) for frame in request.target]
    shown = [frames[0], frames[-1], target[0], target[-1]]
    reading = read(torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2))
    whole = request.task in WHOLE
    return all(
        not reading.unreadable(index) and things(reading, index, whole) == things(reading, index + 2, whole)
        for index in range(2)
    )


def things(reading: Reading, index: int, whole: bool) -> Counter:
    """Kind and colour of everything that was read, with its size and cell where `whole`."""
    seen = reading.scene(index).things
    return Counter((thing.kind, thing.colour, *((thing.size, thing.cell) if whole else ())) for thing in seen)
