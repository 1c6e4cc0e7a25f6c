"""`choose(linear, x)`: the backend for a device and a number of rows, from a table.

    python -m lance_quant.runtime.measure       # measures this GPU anew and writes its table

A table is measured once for a GPU and kept in `$LANCE_QUANT_CACHE`, by default `~/.cache/lance-quant`; a GPU without
one is served by BUILT_IN.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lance_quant.errors import LanceQuantError
from lance_quant.runtime.backends import BACKENDS

if TYPE_CHECKING:
    from lance_quant.runtime.int4_linear import Int4Linear

LAUNCH_ROWS = 128
_waiting: ContextVar[bool] = ContextVar("waiting_for_launches", default=False)  # of a thread
VERSION = 3  # of the tables' meaning: raised where kernels or configs change, so that GPUs are measured again


@dataclass(frozen=True)
class Choice:
    """Up to most_rows rows of x (None: any number) go to a backend."""

    most_rows: int | None
    backend: str


@dataclass(frozen=True, kw_only=True)
class Int4Config:
    """How packed linears multiply. backend: auto, or the one to use wherever it serves. resident_gb: of GPU memory for
    weights that are kept in bf16 too, so that many rows need no dequantizing."""

    backend: str = "auto"
    resident_gb: float = 0.0

    def __post_init__(self) -> None:
        if self.backend != "auto":
            backend_named(self.backend)
        if not isinstance(self.resident_gb, int | float) or not self.resident_gb >= 0:
            raise LanceQuantError(f"resident_gb={self.resident_gb!r} must be a number, 0 or more")


BUILT_IN = {
    "cuda": (
        Choice(1, "triton_gemv"),
        Choice(16, "triton_few"),
        Choice(2, "triton_gemv"),  # groups of 16, few outputs
        Choice(64, "triton_gemm"),
        Choice(None, "triton_dequant_cublas"),
    ),
    "cpu": (Choice(64, "cpu_int4"), Choice(None, "blocks")),
}


@contextmanager
def waiting_for_launches(on: bool) -> Iterator[None]:
    """Within, this thread's linears of up to LAUNCH_ROWS rows go where launches are fewest, whatever a table says of
    the time on a GPU alone: a context's layers wait for the host."""
    kept = _waiting.set(on)
    try:
        yield
    finally:
        _waiting.reset(kept)


def choose(linear: "Int4Linear", x: Tensor) -> Callable[["Int4Linear", Tensor], Tensor]:
    """What multiplies M rows like those of x [M, ...] by the linear's weight."""
    if linear.backend is not None:
        named = backend_named(linear.backend)
        if named.serves(linear, x):
            return named.run
    rows = x.shape[0]
    for choice in table_of(x.device):
        if choice.most_rows is None or rows <= choice.most_rows:
            backend = BACKENDS[choice.backend]
            if choice.backend == "triton_dequant_cublas":
                if linear.dense is not None:
                    backend = BACKENDS["dense"]
                elif rows <= LAUNCH_ROWS and _waiting.get():
                    backend = BACKENDS["triton_gemm"]  # one launch instead of two or more
            if backend.serves(linear, x):
                return backend.run
    return BACKENDS["reference"].run


def backend_named(name: str):
    """Raises LanceQuantError for one that does not exist."""
    if name not in BACKENDS:
        raise LanceQuantError(f"backend={name} is unknown: take auto or one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


@cache
def table_of(device: torch.device) -> tuple[Choice, ...]:
    """As measured, else as built in; read once a process."""
    measured = read_table(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return measured or BUILT_IN.get(device.type, ())


def table_file(name: str) -> Path:
    """Of a GPU's name."""
    folder = os.environ.get("LANCE_QUANT_CACHE")
    root = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lance-quant"
    return root / f"backends-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def read_table(name: str) -> tuple[Choice, ...] | None:
    """None where there is none, or none that this version of the kernels wrote for this GPU: it is measured again."""
    try:
        held = json.loads(table_file(name).read_text())
        if (held["version"], held["device"]) != (VERSION, name):
            return None
        table = tuple(Choice(row["most_rows"], row["backend"]) for row in held["choices"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sound = all(
        choice.backend in BACKENDS and (choice.most_rows is None or isinstance(choice.most_rows, int))
        for choice in table
    )
    return table if table and sound and table[-1].most_rows is None else None


def write_table(name: str, table: tuple[Choice, ...]) -> Path:
    """Whole or not at all."""
    path = table_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    held = {"version": VERSION, "device": name, "choices": [asdict(choice) for choice in table]}
    beside.write_text(json.dumps(held, indent=1))
    beside.replace(path)
    table_of.cache_clear()
    return path
