"""`Launch`: one launch of a Triton kernel, made again and again with the same arguments.

Triton looks at every argument of every call to find what it compiled for their kinds; where the kinds cannot change the
host need not wait for that, several microseconds a launch.
"""

from collections.abc import Mapping

from lance_quant.runtime.kernels.early import launched


class Launch:
    """grid: three numbers. arguments: tensors and numbers in the kernel's order; constants: what follows them, in its
    order too, all but EARLY, which is the last. options: num_warps and the like."""

    def __init__(
        self, kernel, grid: tuple[int, int, int], arguments: tuple, constants: Mapping[str, object], **options
    ):
        self.kernel, self.grid, self.arguments = kernel, grid, arguments
        self.constants, self.options = constants, options
        self.compiled: dict[bool, object] = {}

    def __call__(self) -> None:
        how = launched()
        compiled = self.compiled.get(how["EARLY"])
        if compiled is None:  # the interpreter has none to give
            call = self.kernel[self.grid]
            self.compiled[how["EARLY"]] = call(*self.arguments, **self.constants, **self.options, **how)
        else:
            compiled[self.grid](*self.arguments, *self.constants.values(), how["EARLY"])
