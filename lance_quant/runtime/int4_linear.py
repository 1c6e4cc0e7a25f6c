"""`Int4Linear`: a linear over packed codes, the one resident copy, from which few and many rows are served.

    gate_up = fuse([mlp.gate_proj, mlp.up_proj])    # one product instead of two; the parts give up their buffers

Which kernel multiplies is `selection.choose`'s answer to the device and the number of rows.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lance_quant.checkpoint.native import PARTS, pack_nibbles, part_shapes, unpack_nibbles
from lance_quant.errors import LanceQuantError
from lance_quant.runtime.cpu_layout import GROUPS, block_rows, pack_rows, terms, unpack_rows
from lance_quant.runtime.dequantized import forget_parts
from lance_quant.runtime.selection import choose

BLOCK_ELEMENTS = 2**22  # of a weight dequantized at a time


class Int4Linear(nn.Module):
    """y = x @ ((codes - zeros) * scales).T + bias, in the dtype of x.

    Buffers as in the native layout: qweight uint8 [O, I/2], scales bf16 [O, I/G], zeros uint8 [O, I/G], bias bf16 [O]
    or None. Built empty on `device`; `swap.swap_linears` fills it.
    backend: the name of the one to use wherever it serves; None: as measured or built in for the device.
    dense: the weight in bf16 [O, I] where `keep_dense` made it, None otherwise; no part of the state.
    terms: None, or what goes with codes that `to_cpu_layout` has put in another order. The state has them in order, and
    so has a linear that leaves the CPU.
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
        self.register_buffer("terms", None, persistent=False)

    @property
    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.qweight, self.scales, self.zeros

    def codes(self, rows: slice = slice(None)) -> Tensor:
        """uint8 [O, I]; of codes in the CPU's layout, rows of whole blocks alone."""
        return (
            unpack_nibbles(self.qweight[rows]) if self.terms is None else unpack_rows(self.qweight[rows], block_rows())
        )

    def weight(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """The dequantized weight [O, I], or some rows of it; one rounding to `dtype`, as code - zero is exact."""
        codes = self.codes(rows).unflatten(-1, (-1, self.group_size))
        steps = codes.to(dtype) - self.zeros[rows, :, None].to(dtype)
        return (steps * self.scales[rows, :, None].to(dtype)).flatten(1)

    def blocks(self, dtype: torch.dtype, elements: int = BLOCK_ELEMENTS) -> Iterator[Tensor]:
        """The weight's rows in blocks of about `elements`: a whole one never exists."""
        step = max(1, elements // self.in_features)
        if self.terms is not None:
            step = max(1, step // block_rows()) * block_rows()
        for first in range(0, self.out_features, step):
            yield self.weight(dtype, slice(first, first + step))

    def keep_dense(self) -> None:
        """Keep the weight in bf16 beside the codes: many rows then need no dequantizing."""
        self.dense = torch.cat(list(self.blocks(torch.bfloat16)))

    def _apply(self, fn, recurse=True):
        forget_parts(self)
        super()._apply(fn, recurse)
        if self.qweight.device.type != "cpu":  # other devices' kernels read the codes in order
            self.to_native_layout()
        return self

    def to_cpu_layout(self) -> bool:
        """Put the codes in the order of torch's int4 kernel for CPUs; False where that does not serve this linear."""
        rows = block_rows()
        forget_parts(self)
        if self.terms is not None or not rows or self.out_features % rows or self.group_size not in GROUPS:
            return self.terms is not None
        self.qweight = pack_rows(self.codes(), rows)
        self.terms = terms(self.scales, self.zeros)
        return True

    def to_native_layout(self) -> None:
        """Undo `to_cpu_layout`."""
        if self.terms is not None:
            forget_parts(self)
            self.qweight, self.terms = pack_nibbles(self.codes()), None

    def _load_from_state_dict(self, *args):
        """A state has its codes in order, and what was made of the old ones is made anew."""
        reordered = self.terms is not None
        self.to_native_layout()
        super()._load_from_state_dict(*args)
        if reordered and self.qweight.device.type == "cpu":
            self.to_cpu_layout()
        if self.dense is not None:
            self.keep_dense()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.terms is not None:
            destination[f"{prefix}qweight"] = pack_nibbles(self.codes())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        return choose(self, rows)(self, rows).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"
        return f"{sizes}, bias={self.bias is not None}"


def fuse(linears: Sequence[Int4Linear]) -> Int4Linear:
    """One linear whose outputs are those of `linears` side by side; these are left empty, on the meta device.

    Where only some have a bias the others' is 0. Raises LanceQuantError unless inputs, group size and layout agree.
    """
    first = linears[0]
    for linear in linears[1:]:
        if (linear.in_features, linear.group_size) != (first.in_features, first.group_size):
            raise LanceQuantError(
                f"linears of {first.in_features} inputs in groups of {first.group_size} and of {linear.in_features} in "
                f"groups of {linear.group_size} do not make one: fuse those that read the same input alone"
            )
    if len({linear.terms is None for linear in linears}) > 1:
        raise LanceQuantError(
            "linears with codes in the CPU's layout and others do not make one: fuse before it is made"
        )
    outputs = sum(linear.out_features for linear in linears)
    device = first.qweight.device
    whole = Int4Linear((outputs, first.in_features), first.group_size, bias=False, device="meta")
    whole.backend = first.backend
    if any(linear.bias is not None for linear in linears):
        zeros = (torch.zeros(linear.out_features, dtype=torch.bfloat16, device=device) for linear in linears)
        whole.bias = torch.cat([b if a.bias is None else a.bias for a, b in zip(linears, zeros, strict=True)])
    if all(linear.dense is not None for linear in linears):
        whole.dense = torch.cat([linear.dense for linear in linears])
    if first.terms is not None:  # whole blocks of rows, so that they lie side by side as they are
        whole.terms = torch.cat([linear.terms for linear in linears], dim=1)
    for part in PARTS:  # one after the other, so that no more than one part of the linears exists twice
        setattr(whole, part, torch.cat([getattr(linear, part) for linear in linears]))
        for linear in linears:
            setattr(linear, part, getattr(linear, part).to("meta"))
    for linear in linears:
        forget_parts(linear)
        linear.dense = linear.terms = None
        linear.bias = None if linear.bias is None else linear.bias.to("meta")
    return whole
