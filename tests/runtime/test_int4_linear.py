import pytest
import torch
from torch import nn

from lance_quant.awq.grid import Grid, quantize
from lance_quant.checkpoint.native import pack_nibbles
from lance_quant.runtime.backends import BACKENDS
from lance_quant.runtime.int4_linear import Int4Linear
from lance_quant.runtime.selection import choose
from tests.random_int4 import distance, random_int4


def filled(outputs=24, inputs=64, group=16, bias=True, bits=4) -> tuple[Int4Linear, torch.Tensor]:
    """An Int4Linear and its weight in float64, worked out element by element."""
    draw = torch.Generator().manual_seed(0)
    rounded = quantize(torch.randn(outputs, inputs, generator=draw), Grid(bits=bits, group_size=group))
    linear = Int4Linear((outputs, inputs), group, bias)
    linear.qweight, linear.scales, linear.zeros = pack_nibbles(rounded.codes), rounded.scales, rounded.zeros
    if bias:
        linear.bias = torch.randn(outputs, generator=draw).to(torch.bfloat16)
    weight = torch.empty(outputs, inputs, dtype=torch.float64)
    for o in range(outputs):
        for i in range(inputs):
            byte = int(linear.qweight[o, i // 2])
            code = byte >> 4 if i % 2 else byte & 15
            weight[o, i] = (code - int(linear.zeros[o, i // group])) * float(linear.scales[o, i // group])
    return linear, weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_product_against_float64(bias, bits):
    linear, weight = filled(bias=bias, bits=bits)
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    wanted = x @ weight.T + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(linear(x), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linear(x.float()).double(), wanted, rtol=1e-4, atol=1e-4)
    half = linear(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert ((half.double() - wanted).norm() / wanted.norm()) < 0.01


def test_bf16_weight_is_rounded_once():
    linear, weight = filled()
    assert torch.equal(linear.weight(torch.bfloat16), weight.to(torch.bfloat16))
    assert torch.equal(linear.weight(torch.float32).double(), weight)


def in_cpu_layout(seed: int) -> tuple[Int4Linear, Int4Linear]:
    """(native, the same with its codes in the CPU's order)."""
    native, other = (random_int4(128, 64, 32, bias=True, seed=seed)[0] for _ in range(2))
    assert other.to_cpu_layout() and not torch.equal(other.qweight, native.qweight)
    return native, other


def same(linear: Int4Linear, wanted: Int4Linear) -> bool:
    """In codes, state and what is multiplied."""
    x = torch.randn(3, 64).bfloat16()
    state = linear.state_dict()
    return (
        torch.equal(linear.weight(torch.float32), wanted.weight(torch.float32))
        and all(torch.equal(state[key], value) for key, value in wanted.state_dict().items())
        and distance(linear(x), wanted(x).double()) < 4e-3
    )


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_goes_into_the_cpu_layout(assign):
    native, linear = in_cpu_layout(seed=1)
    linear.load_state_dict(linear.state_dict(), assign=assign)
    assert same(linear, native) and linear.terms is not None
    other, _ = in_cpu_layout(seed=2)
    linear.keep_dense()
    linear.load_state_dict(other.state_dict(), assign=assign)
    assert same(linear, other) and linear.terms is not None
    assert torch.equal(linear.dense, other.weight(torch.bfloat16))
    native.load_state_dict(linear.state_dict(), assign=assign)
    assert same(native, other) and native.terms is None


def test_a_state_that_does_not_fit_changes_nothing():
    native, linear = in_cpu_layout(seed=1)
    with pytest.raises(RuntimeError, match="size mismatch for qweight"):
        linear.load_state_dict(linear.state_dict() | {"qweight": torch.zeros(2, 2, dtype=torch.uint8)})
    assert same(linear, native) and linear.terms is not None


def test_codes_are_in_order_on_another_device(monkeypatch):
    native, linear = in_cpu_layout(seed=1)
    linear.to("cpu")
    assert linear.terms is not None  # where the CPU's kernel wants them
    orders = []
    monkeypatch.setattr(Int4Linear, "to_native_layout", lambda self: orders.append(self.qweight.device.type))
    linear.float()
    assert not orders
    linear.to("meta")
    assert orders == ["meta"]
    monkeypatch.undo()
    nn.Sequential(linear).to("meta")
    assert linear.terms is None and linear.qweight.shape == native.qweight.shape
    native, linear = in_cpu_layout(seed=1)
    linear.to_native_layout()
    assert linear.terms is None and torch.equal(linear.qweight, native.qweight) and same(linear, native)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_linear_that_goes_to_a_gpu_and_back():
    native, linear = in_cpu_layout(seed=1)
    x = torch.randn(3, 64).bfloat16()
    linear.to("cuda")
    assert torch.equal(linear.qweight.cpu(), native.qweight)
    assert choose(linear, x.cuda()) is not BACKENDS["reference"].run
    assert distance(linear(x.cuda()).cpu(), native(x).double()) < 8e-3
    assert same(linear.to("cpu"), native) and linear.to_cpu_layout() and same(linear, native)


def test_state_keys_are_those_of_the_layout():
    assert set(filled(bias=True)[0].state_dict()) == {"qweight", "scales", "zeros", "bias"}
    assert set(filled(bias=False)[0].state_dict()) == {"qweight", "scales", "zeros"}
