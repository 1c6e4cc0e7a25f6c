"""A kernel goes through Triton once for each kind of arguments and then straight to what was compiled."""

import pytest
import torch

pytest.importorskip("triton")

from lance_quant.runtime.kernels.early import early  # noqa: E402
from lance_quant.runtime.kernels.launch import Kernel, Launch  # noqa: E402


class Named:
    """What is called as kernel[grid](...), by its name, told apart in `calls`."""

    def __init__(self, name: str, calls: list, gives: "Named | None" = None):
        self.name, self.calls, self.gives = name, calls, gives

    def __getitem__(self, grid):
        def call(*arguments, **named):
            self.calls.append((self.name, grid, arguments, named))
            return self.gives

        return call


def test_a_launch_is_looked_for_once_a_way():
    calls = []
    kernel = Kernel(Named("jit", calls, gives=Named("compiled", calls)))
    x = torch.zeros(4)
    launch = Launch(kernel, (8, 1, 1), (x, 2), {"BLOCK": 16, "WHOLE": True}, num_warps=4)
    named = {"BLOCK": 16, "WHOLE": True, "num_warps": 4}
    for on in (False, False, True, True, False):
        with early(on):
            launch()
    assert calls == [
        ("jit", (8, 1, 1), (x, 2), named | {"EARLY": False}),
        ("compiled", (8, 1, 1), (x, 2, 16, True, False), {}),
        ("jit", (8, 1, 1), (x, 2), named | {"EARLY": True, "launch_pdl": True}),
        ("compiled", (8, 1, 1), (x, 2, 16, True, True), {}),
        ("compiled", (8, 1, 1), (x, 2, 16, True, False), {}),
    ]


def test_a_launch_of_dequantize_has_what_the_kernel_takes_in_order():
    from lance_quant.runtime.kernels.dequantize import _dequantize, dequantizing
    from tests.random_int4 import random_int4

    linear, _ = random_int4(16, 64, 32)
    launch = dequantizing(linear.packed, torch.empty(16, 64))
    names = _dequantize.arg_names
    assert list(launch.constants) == names[len(launch.arguments) : -1] and names[-1] == "EARLY"


def test_the_interpreter_gives_nothing_to_go_straight_to():
    calls = []
    launch = Launch(Kernel(Named("jit", calls)), (1, 1, 1), (torch.zeros(4),), {})
    launch()
    launch()
    assert [name for name, *_ in calls] == ["jit", "jit"]


X, OTHER, WIDE = torch.zeros(64), torch.ones(64), torch.zeros(64, dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "again"),
    [
        ((OTHER, 2, 0.5, None), True),
        ((X, 3, 0.25, None), True),  # neither divides by 16
        ((X[1:], 2, 0.5, None), False),  # where Triton may not read 16 bytes at a time
        ((WIDE, 2, 0.5, None), False),
        ((X, 1, 0.5, None), False),
        ((X, 32, 0.5, None), False),
        ((X, 2**33 + 2, 0.5, None), False),
        ((X, 2, 0.5, OTHER), False),
    ],
)
def test_a_kernel_is_looked_for_once_a_kind_of_arguments(arguments, again):
    calls = []
    kernel = Kernel(Named("jit", calls, gives=Named("compiled", calls)))
    kernel((1, 1, 1), (X, 2, 0.5, None), {"BLOCK": 16}, num_warps=4)
    kernel((1, 1, 1), arguments, {"BLOCK": 16}, num_warps=4)
    assert [name for name, *_ in calls] == ["jit", "compiled" if again else "jit"]
    for constants, warps in (({"BLOCK": 32}, 4), ({"BLOCK": 16}, 8)):
        kernel((1, 1, 1), (X, 2, 0.5, None), constants, num_warps=warps)
        assert calls[-1][0] == "jit"


def test_every_kernel_takes_its_constants_last():
    """`Kernel` hands all of them over by place."""
    from lance_quant.runtime import attention_triton, ops_triton
    from lance_quant.runtime.kernels import dequantize, few, gemm, gemv

    modules = (attention_triton, ops_triton, dequantize, few, gemm, gemv)
    kernels = [one for module in modules for one in vars(module).values() if isinstance(one, Kernel)]
    assert len(kernels) == 9
    assert all(one.kernel.arg_names[-1] == "EARLY" for one in kernels)
