import pytest
import torch

from lance_quant.awq.grid import Grid, quantize
from lance_quant.checkpoint.native import pack_nibbles
from lance_quant.runtime.int4_linear import Int4Linear


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


def test_state_keys_are_those_of_the_layout():
    assert set(filled(bias=True)[0].state_dict()) == {"qweight", "scales", "zeros", "bias"}
    assert set(filled(bias=False)[0].state_dict()) == {"qweight", "scales", "zeros"}
