"""`random_int4`: a random Int4Linear, and its product worked out in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from lance_quant.runtime.int4_linear import Int4Linear
from lance_quant.runtime.measure import random_linear


def random_int4(
    outputs: int, inputs: int, group: int, bias: bool = False, seed: int = 0, device=None
) -> tuple[Int4Linear, Callable[[Tensor], Tensor]]:
    """(linear, exact): exact(x) is the product in float64 from the linear's buffers as they are when it is called.

    On torch's default device where none is given.
    """
    linear = random_linear((outputs, inputs), group, device or torch.get_default_device(), seed, bias)

    def exact(x: Tensor) -> Tensor:
        codes = torch.stack((linear.qweight & 15, linear.qweight >> 4), -1).view(outputs, -1, group).double()
        weight = ((codes - linear.zeros[..., None].double()) * linear.scales[..., None].double()).flatten(1)
        return x.double() @ weight.T + (0 if linear.bias is None else linear.bias.double())

    return linear, exact


def distance(y: Tensor, exact: Tensor) -> float:
    """Relative L2."""
    return float((y.double() - exact).norm() / exact.norm())
