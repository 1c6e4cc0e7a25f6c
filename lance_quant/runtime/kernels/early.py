"""`early`: kernels that start while the one before them still runs (programmatic dependent launch, sm_90 on).

    with early(True):       # around what is recorded: a CUDA graph keeps the edges
        decoding.run()

A kernel that takes part tells at its start that its successor may come, reads what no kernel writes, and waits for its
predecessor's end before it touches anything else. Every kernel launched so must wait: only then does the end of one
mean the end of all before it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_on: ContextVar[bool] = ContextVar("early", default=False)  # of a thread


def can_start_early(device: torch.device) -> bool:
    """Whether the device can do it; an older one cannot even compile it."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


@contextmanager
def early(on: bool) -> Iterator[None]:
    """Whether kernels of this thread are launched early within."""
    kept = _on.set(on)
    try:
        yield
    finally:
        _on.reset(kept)


def starts_early() -> bool:
    """Whether this thread's kernels do, as it stands."""
    return _on.get()


def launched() -> dict:
    """Keywords of a launch, early where asked for around it."""
    return {"EARLY": True, "launch_pdl": True} if _on.get() else {"EARLY": False}
