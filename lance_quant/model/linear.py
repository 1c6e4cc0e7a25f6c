"""`linear`: F.linear that a CPU without bf16 products need not crawl through.

There torch multiplies bf16 matrices element by element, ten times slower than float32 ones. bf16 operands are exact in
float32 and both ways add in float32, so the result is the same but for the order of the sum.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

MANY_ROWS = 24  # below, widening the weight costs more than it saves


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU has fast bf16 products."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., I] @ weight [O, I].T + bias [O]."""
    few = x.numel() < MANY_ROWS * weight.shape[1]
    if few or x.dtype != torch.bfloat16 or x.device.type != "cpu" or multiplies_bf16():
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(torch.bfloat16)


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
