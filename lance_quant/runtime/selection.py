"""`choose(linear, x)`: the backend for a device and a number of rows."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from lance_quant.runtime.backends import REFERENCE

if TYPE_CHECKING:
    from lance_quant.runtime.int4_linear import Int4Linear


def choose(linear: "Int4Linear", x: Tensor) -> Callable[["Int4Linear", Tensor], Tensor]:
    """What multiplies x [M, I] by the linear's weight."""
    return REFERENCE.run
