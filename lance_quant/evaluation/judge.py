"""Does a drawn picture or clip of a scene show what was asked for? Lance-tiny's reader and rules say it.

shows_what_was_asked(request, frames, source="scenes")
"""

import numpy as np
import torch

from lance_quant.model.request import Request
from lance_quant.tiny.judge import RULES, seen
from lance_quant.tiny.reader import read
from lance_quant.tiny.world import CANVAS


def shows_what_was_asked(request: Request, frames: np.ndarray, source: str) -> bool | None:
    """Whether frames uint8 [T, H, W, 3] show at the start and the end what the request's target shows there, by the
    rule of its task; None where that cannot be told: no scene, no target.
    """
    if source != "scenes" or not request.target or frames.shape[1:3] != (CANVAS, CANVAS):
        return None
    target = [np.asarray(frame.convert("RGB")) for frame in request.target]
    first, last = np.stack([frames[0], target[0]]), np.stack([frames[-1], target[-1]])
    readings = [read(torch.from_numpy(pictures).permute(0, 3, 1, 2)) for pictures in (first, last)]
    made, true = (seen(*readings, index) for index in range(2))
    return RULES[request.task](made, true)
