"""`early`: kernels that start while the one before them still runs (programmatic dependent launch, sm_90 on).

    with early(True):       # around what is recorded: a CUDA graph keeps the edges
        decoding.run()

A kernel that takes part tells at its start that its successor may come, reads what no kernel writes, and waits for its
predecessor's end before it touches anything else. Every kernel launched so must wait: only then does the end of one
mean the end of all before it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_on = [False]


def can_start_early(device: torch.device) -> bool:
    """Whether the device can do it; an older one cannot even compile it."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


@contextmanager
def early(on: bool) -> Iterator[None]:
    """Whether kernels of this process are launched early within."""
    kept, _on[0] = _on[0], on
    try:
        yield
    finally:
        _on[0] = kept


def launched(on: bool = False) -> dict:
    """Keywords of a launch, early where asked for here or around it."""
    return {"EARLY": True, "launch_pdl": True} if on or _on[0] else {"EARLY": False}
