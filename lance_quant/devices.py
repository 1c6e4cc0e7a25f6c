"""Devices by name: what a user may write is `auto`, `cpu`, `cuda` or `cuda:1`; and what runs on them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lance_quant.errors import LanceQuantError

if TYPE_CHECKING:
    from torch import Tensor


@cache
def has_triton() -> bool:
    return "triton" in sys.modules or find_spec("triton") is not None


def on_triton(x: Tensor) -> bool:
    """Whether a Triton kernel can take this tensor."""
    return x.is_cuda and has_triton()


def current(name: str) -> AbstractContextManager:
    """Makes a GPU the thread's own: a Triton kernel runs there, wherever its tensors are."""
    import torch

    return torch.cuda.device(name) if name.startswith("cuda") else nullcontext()


_lock = threading.Lock()
_inside = 0
_before = (False, False)
_fixed_order: ContextVar[bool] = ContextVar("fixed_order", default=False)  # of a thread


@contextmanager
def repeatable(device: str) -> Iterator[None]:
    """Sums in a fixed order within, on a GPU: deterministic kernels, and attention that goes back in parts
    (`fixed_order`). Gradients run on the thread that asks for them, as another one would have no context of the device.
    """
    import torch

    global _inside, _before
    if not device.startswith("cuda"):
        yield
        return
    with _lock:
        if not _inside:
            _before = (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            )
        _inside += 1
        torch.use_deterministic_algorithms(True, warn_only=True)
    kept = _fixed_order.set(True)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _fixed_order.reset(kept)
        with _lock:
            _inside -= 1
            if not _inside:
                torch.use_deterministic_algorithms(_before[0], warn_only=_before[1])


def fixed_order() -> bool:
    """Whether this thread's gradients are to be `repeatable`."""
    return _fixed_order.get()


def choose_device(name: str) -> str:
    """ "auto": a GPU where there is one, else the CPU; any other as it is. LanceQuantError where it is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    exact_device(name, "device")
    return name


def exact_device(name: str, setting: str) -> str:
    """ "cpu" or "cuda:N" of this machine, in that spelling. LanceQuantError, which names the setting, where not."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise LanceQuantError(f"{setting}={name} is unknown: take auto, cpu, cuda or cuda:1")
    if device.type == "cpu":
        return "cpu"
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise LanceQuantError(
            f"{setting}={name}, but this machine has {count} CUDA devices: take auto or {', '.join(found_devices())}"
        )
    return f"cuda:{index}"


def found_devices() -> list[str]:
    """Every CUDA device, or else the CPU."""
    import torch

    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
