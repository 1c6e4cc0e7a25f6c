"""`BACKENDS`: the ways to multiply by packed codes; each serves the native buffers as they are.

A row says on which devices a backend runs and for how many rows of x at most; `run(linear, x)` takes x [M, I].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from lance_quant.runtime.int4_linear import Int4Linear


@dataclass(frozen=True, kw_only=True)
class Backend:
    """devices: types of torch devices. most_rows: None for any number. groups: sizes served, empty for any."""

    name: str
    run: Callable[["Int4Linear", Tensor], Tensor]
    devices: tuple[str, ...]
    most_rows: int | None = None
    groups: tuple[int, ...] = ()

    def serves(self, linear: "Int4Linear", x: Tensor) -> bool:
        return (
            x.device.type in self.devices
            and (self.most_rows is None or len(x) <= self.most_rows)
            and (not self.groups or linear.group_size in self.groups)
        )


def reference(linear: "Int4Linear", x: Tensor) -> Tensor:
    """Dequantize all, then multiply: needs nothing."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight(x.dtype), bias)


REFERENCE = Backend(name="reference", run=reference, devices=("cpu", "cuda", "mps", "xpu", "meta"))
BACKENDS = {backend.name: backend for backend in (REFERENCE,)}
