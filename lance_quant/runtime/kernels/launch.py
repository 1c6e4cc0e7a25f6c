"""Launches of Triton kernels that spare the host most of Triton's own look at every argument.

    KERNEL = Kernel(_kernel)                                # called with other tensors each time
    KERNEL(grid, (x, out, size), {"BLOCK": 64}, num_warps=4)
    Launch(KERNEL, grid, (x, out, size), {"BLOCK": 64})()   # with the same ones again and again

Triton compiles a form of a kernel for each kind of argument: dtypes, whether addresses and numbers divide by 16,
whether a number is 1. Both keep the forms that Triton gave them; a new kind goes through Triton.
"""

from collections.abc import Mapping

import torch

from lance_quant.runtime.kernels.early import launched, starts_early

INT32 = 2**31


def cdiv(size: int, step: int) -> int:
    """Steps that cover a size. Triton's own, as that of the next, is made for kernels and takes a host microseconds."""
    return -(-size // step)


def next_power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length() if size > 0 else 0


class Kernel:
    """A Triton kernel with EARLY as its last argument, before it its constants."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.forms: dict[tuple, object] = {}

    def __call__(self, grid: tuple[int, int, int], arguments: tuple, constants: Mapping[str, object], **options):
        """arguments: tensors, numbers and None, the first one a tensor; constants: in the kernel's order too. Returns
        what was compiled, None from the interpreter, which compiles nothing."""
        early, fixed = starts_early(), tuple(constants.values())
        device = torch.cuda.current_device() if arguments[0].is_cuda else None  # Triton's too
        key = (device, early, fixed, *options.values(), *kinds(arguments))
        compiled = self.forms.get(key)
        if compiled is None:
            compiled = self.forms[key] = self.kernel[grid](*arguments, **constants, **options, **launched())
        else:
            compiled[grid](*arguments, *fixed, early)
        return compiled


def kinds(arguments: tuple) -> list:
    """What Triton may compile arguments for."""
    found, address = [], 0
    for one in arguments:
        if isinstance(one, torch.Tensor):
            address |= one.data_ptr()
            found.append(one.dtype)
        elif isinstance(one, int) and not isinstance(one, bool):
            found.append(1 if one == 1 else (one & 15 == 0, -INT32 <= one < INT32))
        else:
            found.append(type(one))
    if address & 15:
        found += [isinstance(one, torch.Tensor) and one.data_ptr() & 15 == 0 for one in arguments]
    return found


class Launch:
    """grid, arguments, constants, options: as for `Kernel`, the same every time."""

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], arguments: tuple, constants: Mapping[str, object], **options
    ):
        self.kernel, self.grid, self.arguments = kernel, grid, arguments
        self.constants, self.options = constants, options
        self.compiled: dict[bool, object] = {}

    def __call__(self) -> None:
        early = starts_early()
        compiled = self.compiled.get(early)
        if compiled is None:
            self.compiled[early] = self.kernel(self.grid, self.arguments, self.constants, **self.options)
        else:
            compiled[self.grid](*self.arguments, *self.constants.values(), early)
