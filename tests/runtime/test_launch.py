"""A launch goes through Triton once and then straight to what was compiled, early or not."""

import pytest
import torch

pytest.importorskip("triton")

from lance_quant.runtime.kernels.early import early  # noqa: E402
from lance_quant.runtime.kernels.launch import Launch  # noqa: E402


class Kernel:
    """What is called as kernel[grid](...), by its name, told apart in `calls`."""

    def __init__(self, name: str, calls: list, gives: "Kernel | None" = None):
        self.name, self.calls, self.gives = name, calls, gives

    def __getitem__(self, grid):
        def call(*arguments, **named):
            self.calls.append((self.name, grid, arguments, named))
            return self.gives

        return call


def test_a_launch_is_looked_for_once_a_way():
    calls = []
    kernel = Kernel("jit", calls, gives=Kernel("compiled", calls))
    launch = Launch(kernel, (8, 1, 1), (1, 2), {"BLOCK": 16, "WHOLE": True}, num_warps=4)
    named = {"BLOCK": 16, "WHOLE": True, "num_warps": 4}
    for on in (False, False, True, True, False):
        with early(on):
            launch()
    assert calls == [
        ("jit", (8, 1, 1), (1, 2), named | {"EARLY": False}),
        ("compiled", (8, 1, 1), (1, 2, 16, True, False), {}),
        ("jit", (8, 1, 1), (1, 2), named | {"EARLY": True, "launch_pdl": True}),
        ("compiled", (8, 1, 1), (1, 2, 16, True, True), {}),
        ("compiled", (8, 1, 1), (1, 2, 16, True, False), {}),
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
    launch = Launch(Kernel("jit", calls), (1, 1, 1), (), {})
    launch()
    launch()
    assert [name for name, *_ in calls] == ["jit", "jit"]
