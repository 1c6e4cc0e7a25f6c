"""bf16 products in float32 on a CPU that has none of its own."""

import pytest
import torch
import torch.nn.functional as F

from lance_quant.model import linear as module
from lance_quant.model.linear import Linear, linear


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("rows", [3, 40])
def test_either_way_rounds_once(rows, fast, monkeypatch):
    monkeypatch.setattr(module, "multiplies_bf16", lambda: fast)
    torch.manual_seed(0)
    one = Linear(96, 80).bfloat16()
    x = torch.randn(2, rows, 96).bfloat16()
    exact = F.linear(x.double(), one.weight.double(), one.bias.double())
    out = one(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-3)


def test_widened_where_it_pays(monkeypatch):
    monkeypatch.setattr(module, "multiplies_bf16", lambda: False)
    seen = []
    plain = F.linear
    monkeypatch.setattr(module.F, "linear", lambda x, *rest: seen.append(x.dtype) or plain(x, *rest))
    weight = torch.randn(8, 16)
    linear(torch.randn(1, 16).bfloat16(), weight.bfloat16())
    linear(torch.randn(64, 16).bfloat16(), weight.bfloat16())
    linear(torch.randn(64, 16), weight)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]
