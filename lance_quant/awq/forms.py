"""`form_of`: an inner loop's Triton form (`kernels.py`) for tensors that can take it, else its torch form."""

from collections.abc import Callable

from torch import Tensor

from lance_quant.devices import on_triton


def form_of(plain: Callable, x: Tensor) -> Callable:
    """The kernel is called as `plain` is."""
    if not on_triton(x):
        return plain
    from lance_quant.awq import kernels

    return getattr(kernels, plain.__name__)
