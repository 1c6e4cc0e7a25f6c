"""Memory of kernels whose inputs are shared out over programs: their sums, and tickets that tell who comes last."""

from functools import cache

import torch
from torch import Tensor

FLOATS, TICKETS = 2**22, 2**14  # what is not split when it needs more


@cache
def room(device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 [FLOATS] for the splits' sums, int32 [TICKETS], 0 before and after; shared by all calls of a device's one
    stream."""
    return torch.empty(FLOATS, device=device), torch.zeros(TICKETS, dtype=torch.int32, device=device)


def splits_of(wanted: int, rows: int, outputs: int, programs: int) -> int:
    """As many as wanted, where the room is enough."""
    return wanted if wanted * rows * outputs <= FLOATS and programs <= TICKETS else 1
