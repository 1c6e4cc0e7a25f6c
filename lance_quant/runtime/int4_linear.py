"""`Int4Linear`: a linear over packed codes, the one resident copy, from which few and many rows are served.

    gate_up = fuse([mlp.gate_proj, mlp.up_proj])    # one product instead of two; the parts give up their buffers

Which kernel multiplies is `selection.choose`'s answer to the device and the number of rows.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lance_quant.checkpoint.native import PARTS, part_shapes, unpack_nibbles
from lance_quant.errors import LanceQuantError
from lance_quant.runtime.selection import choose


class Int4Linear(nn.Module):
    """y = x @ ((codes - zeros) * scales).T + bias, in the dtype of x.

    Buffers as in the native layout: qweight uint8 [O, I/2], scales bf16 [O, I/G], zeros uint8 [O, I/G], bias bf16 [O]
    or None. Built empty on `device`; `swap.swap_linears` fills it.
    backend: the name of the one to use for any number of rows; None: as measured or built in for the device.
    dense: the weight in bf16 [O, I] where `keep_dense` made it, None otherwise; no part of the state.
    """

    backend: str | None = None

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
        self.register_buffer("dense", None, persistent=False)

    def weight(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """The dequantized weight [O, I], or some rows of it; one rounding to `dtype`, as code - zero is exact."""
        codes = unpack_nibbles(self.qweight[rows]).unflatten(-1, (-1, self.group_size))
        steps = codes.to(dtype) - self.zeros[rows, :, None].to(dtype)
        return (steps * self.scales[rows, :, None].to(dtype)).flatten(1)

    def blocks(self, dtype: torch.dtype, size: int) -> Iterator[Tensor]:
        """The weight's rows in blocks of at most `size` elements: a whole one never exists."""
        step = max(1, size // self.in_features)
        for first in range(0, self.out_features, step):
            yield self.weight(dtype, slice(first, first + step))

    def keep_dense(self) -> None:
        """Keep the weight in bf16 beside the codes: many rows then need no dequantizing."""
        self.dense = torch.cat(list(self.blocks(torch.bfloat16, 2**24)))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        return choose(self, rows)(self, rows).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"
        return f"{sizes}, bias={self.bias is not None}"


def fuse(linears: Sequence[Int4Linear]) -> Int4Linear:
    """One linear whose outputs are those of `linears` side by side; these are left empty, on the meta device.

    Where only some have a bias the others' is 0. Raises LanceQuantError unless inputs and group size agree.
    """
    first = linears[0]
    for linear in linears[1:]:
        if (linear.in_features, linear.group_size) != (first.in_features, first.group_size):
            raise LanceQuantError(
                f"linears of {first.in_features} inputs in groups of {first.group_size} and of {linear.in_features} in "
                f"groups of {linear.group_size} do not make one: fuse those that read the same input alone"
            )
    outputs = sum(linear.out_features for linear in linears)
    biased = any(linear.bias is not None for linear in linears)
    whole = Int4Linear((outputs, first.in_features), first.group_size, biased, device="meta")
    whole.backend = first.backend
    device = first.qweight.device
    for part in PARTS:  # part by part, so that no more than one part of the linears exists twice
        setattr(whole, part, torch.cat([getattr(linear, part) for linear in linears]))
        for linear in linears:
            setattr(linear, part, getattr(linear, part).to("meta"))
    if biased:
        zero = [torch.zeros(linear.out_features, dtype=torch.bfloat16, device=device) for linear in linears]
        whole.bias = torch.cat([b if a.bias is None else a.bias for a, b in zip(linears, zero, strict=True)])
    for linear in linears:
        linear.bias = None if linear.bias is None else linear.bias.to("meta")
        linear.dense = None
    return whole
