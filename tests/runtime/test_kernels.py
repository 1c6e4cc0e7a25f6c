"""Triton kernels in its interpreter, small shapes, against float64."""

import os
import subprocess
import sys
from dataclasses import astuple

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
pytest.importorskip("triton")

from lance_quant.runtime.kernels.dequantize import DequantizeConfig, dequantize  # noqa: E402
from lance_quant.runtime.kernels.few import TUNED, FewConfig, few  # noqa: E402
from lance_quant.runtime.kernels.gemm import GemmConfig, gemm  # noqa: E402
from lance_quant.runtime.kernels.gemv import Around, GemvConfig, gemv  # noqa: E402
from tests.random_int4 import distance, random_int4  # noqa: E402

CLOSE = 1e-5  # outputs are float32 here: the interpreter cuts a bf16 off instead of rounding it


CONFIG = GemvConfig(4, 32, 1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def tensors_where_triton_runs():
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(24, 256, 32), (7, 384, 64), (16, 640, 128)])
def test_gemv(rows, outputs, inputs, group):
    linear, exact = random_int4(outputs, inputs, group, bias=rows % 2 == 1)
    x = torch.randn(rows, inputs).bfloat16()
    y = gemv(x, linear.packed, linear.bias, out=torch.empty(rows, outputs), config=CONFIG)
    assert distance(y, exact(x)) < CLOSE


@pytest.mark.parametrize("normed", [True, False])
def test_gemv_with_what_stands_around_it(normed):
    linear, exact = random_int4(32, 128, 32, bias=True)
    x, residual, gain = torch.randn(2, 128).bfloat16(), torch.randn(2, 16).bfloat16(), torch.rand(128).bfloat16()
    seen = x.double()
    if normed:
        seen = seen / (seen.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain.double()
    gate, up = exact(seen).chunk(2, -1)
    around = Around(gain=gain if normed else None, eps=1e-6, silu_mul=True, residual=residual)
    y = gemv(x, linear.packed, linear.bias, around, out=torch.empty(2, 16), config=CONFIG)
    assert distance(y, torch.nn.functional.silu(gate) * up + residual.double()) < CLOSE


def test_a_large_activation_leaves_the_others_their_digits():
    linear, exact = random_int4(16, 128, 64, bias=False)
    x = torch.randn(1, 128).bfloat16()
    x[0, 5] = 8192
    linear.qweight[:, 2] = linear.qweight[:, 2] & 15 | linear.zeros[:, 0] << 4  # the weight that meets it is 0
    assert distance(gemv(x, linear.packed, out=torch.empty(1, 16), config=CONFIG), exact(x)) < 4e-3


@pytest.mark.parametrize("rows", [1, 7, 17, 33, 111])
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(24, 256, 32), (40, 384, 64), (16, 640, 128)])
def test_gemm(rows, outputs, inputs, group, splits):
    linear, exact = random_int4(outputs, inputs, group, bias=rows % 2 == 1)
    x = torch.randn(rows, inputs).bfloat16()
    config = GemmConfig(16, 16, splits, 1, stages=splits)
    for _ in range(2):  # the tickets are 0 again after a call
        y = gemm(x, linear.packed, linear.bias, torch.empty(rows, outputs), config)
        assert distance(y, exact(x)) < (CLOSE if DEVICE == "cpu" else 4e-3)  # a GPU's weights are bf16


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 16])
@pytest.mark.parametrize("config", [FewConfig(1, 4), FewConfig(2, 2, 2, 128, 1), FewConfig(1, 1, 3, 512)])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(16, 256, 32), (40, 576, 64), (24, 1152, 128), (33, 512, 256)]
)
def test_few(rows, config, outputs, inputs, group):
    linear, exact = random_int4(outputs, inputs, group, bias=rows % 2 == 1)
    x = torch.randn(rows, inputs).bfloat16()
    for _ in range(2):  # the tickets are 0 again after a call
        y = few(x, linear.packed, linear.bias, torch.empty(rows, outputs), config)
        assert distance(y, exact(x)) < CLOSE


@pytest.mark.parametrize("config", [FewConfig(1, 2, 1, 64), FewConfig(2, 1, 2)])
def test_few_with_silu_and_product(config):
    linear, exact = random_int4(80, 256, 64, bias=True)
    x = torch.randn(3, 256).bfloat16()
    y = few(x, linear.packed, linear.bias, torch.empty(3, 40), config, silu_mul=True)
    gate, up = exact(x).chunk(2, -1)
    assert distance(y, torch.nn.functional.silu(gate) * up) < CLOSE


def test_few_by_its_own_configs():
    linear, exact = random_int4(2568, 576, 64)
    x = torch.randn(8, 576).bfloat16()
    assert distance(few(x, linear.packed), exact(x)) < 2**-7  # bf16 that is cut off, as said above


def test_few_keeps_digits_beside_a_large_activation():
    linear, exact = random_int4(16, 128, 64, bias=False)
    x = torch.randn(2, 128).bfloat16()
    x[0, 5] = 8192
    linear.qweight[:, 2] = linear.qweight[:, 2] & 15 | linear.zeros[:, 0] << 4  # the weight that meets it is 0
    assert distance(few(x, linear.packed, out=torch.empty(2, 16)), exact(x)) < 4e-3


@pytest.mark.parametrize(
    ("inputs", "group", "rows", "silu_mul", "config"),
    [
        (2048, 64, 8, 1, TUNED[8, 22016, 2048]),
        (2048, 64, 8, 0, TUNED[8, 2560, 2048]),
        (11008, 64, 8, 0, TUNED[8, 2048, 11008]),
        (2048, 64, 16, 1, FewConfig(1, 4)),
        (2048, 128, 8, 1, TUNED[8, 22016, 2048]),
        (2048, 32, 8, 0, FewConfig(2, 8, 1, 128, 2)),
        (2048, 256, 16, 0, FewConfig(1, 4, 4)),
    ],
)
def test_few_moves_nothing_through_shared_memory(inputs, group, rows, silu_mul, config):
    """But the sums of the warps: what makes it fast hangs on how Triton lays tensors out."""
    command = [sys.executable, "-m", "tests.compiled_few", *map(str, (inputs, group, rows, silu_mul, *astuple(config)))]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0"], done.stderr


@pytest.mark.parametrize(("outputs", "inputs", "group"), [(5, 64, 32), (7, 384, 64), (8, 640, 128), (3, 1280, 256)])
def test_dequantize(outputs, inputs, group):
    linear, _ = random_int4(outputs, inputs, group)
    config = DequantizeConfig(32, 2, 1)
    got = dequantize(linear.qweight, linear.scales, linear.zeros, torch.empty(outputs, inputs), config)
    assert torch.equal(got, linear.weight(torch.float32))
    got = dequantize(*linear.packed, torch.empty(outputs - 1, inputs), config, gap=(1, 1))
    assert torch.equal(got, linear.weight(torch.float32)[[0, *range(2, outputs)]])
