"""`Int4Linear`: a linear over packed codes that dequantizes at every call: the plain reference for faster ones."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lance_quant.checkpoint.native import part_shapes, unpack_nibbles


class Int4Linear(nn.Module):
    """y = x @ ((codes - zeros) * scales).T + bias, in the dtype of x.

    Buffers as in the native layout: qweight uint8 [O, I/2], scales bf16 [O, I/G], zeros uint8 [O, I/G], bias bf16 [O]
    or None. Built empty on `device`; `swap.swap_linears` fills it.
    """

    def __init__(self, shape: tuple[int, int], group_size: int, bias: bool, device: torch.device | str = "cpu"):
        super().__init__()
        self.out_features, self.in_features = shape
        self.group_size = group_size
        parts = part_shapes(shape, group_size)
        self.register_buffer("qweight", torch.empty(parts["qweight"], dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(parts["scales"], dtype=torch.bfloat16, device=device))
        self.register_buffer("zeros", torch.empty(parts["zeros"], dtype=torch.uint8, device=device))
        empty_bias = torch.empty(self.out_features, dtype=torch.bfloat16, device=device) if bias else None
        self.register_buffer("bias", empty_bias)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [O, I]; one rounding to `dtype`, since code - zero is exact in each."""
        codes = unpack_nibbles(self.qweight).view(self.out_features, -1, self.group_size)
        steps = codes.to(dtype) - self.zeros[..., None].to(dtype)
        return (steps * self.scales[..., None].to(dtype)).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight(x.dtype), bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"
        return f"{sizes}, bias={self.bias is not None}"
