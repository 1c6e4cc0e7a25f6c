"""`BACKENDS`: the ways to multiply by packed codes, each from the one copy that an `Int4Linear` holds.

A row says on which devices a backend runs and for how many rows of x at most; `run(linear, x)` takes x [M, I]. All but
`reference` and `blocks` take bf16 alone, and the Triton ones groups of a power of two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lance_quant.devices import has_triton
from lance_quant.model.linear import multiplies_bf16
from lance_quant.runtime import cpu_layout, dequantized
from lance_quant.runtime.dequantized import triton_dequant_cublas

if TYPE_CHECKING:
    from lance_quant.runtime.int4_linear import Int4Linear

GEMV_ROWS, FEW_ROWS = 4, 16
FEW_GROUP, FEW_OUTPUTS = 32, 32  # at least; outputs twice what a tile has, for gate and up make a tile each


@dataclass(frozen=True, kw_only=True)
class Backend:
    """devices: types of torch devices, empty for any. most_rows: None for any number."""

    name: str
    run: Callable[["Int4Linear", Tensor], Tensor]
    serves_linear: Callable[["Int4Linear"], bool] = lambda linear: True
    devices: tuple[str, ...] = ()
    most_rows: int | None = None
    any_dtype: bool = False

    def serves(self, linear: "Int4Linear", x: Tensor) -> bool:
        return (
            (not self.devices or x.device.type in self.devices)
            and (self.any_dtype or x.dtype == torch.bfloat16)
            and (self.most_rows is None or x.shape[0] <= self.most_rows)
            and self.serves_linear(linear)
        )


def reference(linear: "Int4Linear", x: Tensor) -> Tensor:
    """Dequantize all, then multiply: needs nothing."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight(x.dtype), bias)


def blocks(linear: "Int4Linear", x: Tensor) -> Tensor:
    """Block by block, in float32 where a CPU has no bf16 arithmetic."""
    wide = x.float() if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not multiplies_bf16() else x
    y = torch.cat([(wide @ block.T).to(x.dtype) for block in linear.blocks(wide.dtype)], dim=-1)
    return y if linear.bias is None else y + linear.bias.to(x.dtype)


def cpu_int4(linear: "Int4Linear", x: Tensor) -> Tensor:
    y = cpu_layout.multiply(x.contiguous(), linear.qweight, linear.group_size, linear.terms)
    return y if linear.bias is None else y + linear.bias


def triton_gemv(linear: "Int4Linear", x: Tensor) -> Tensor:
    from lance_quant.runtime.kernels.gemv import gemv

    return gemv(x.contiguous(), linear.packed, linear.bias)


def triton_few(linear: "Int4Linear", x: Tensor) -> Tensor:
    from lance_quant.runtime.kernels.few import few

    return few(x.contiguous(), linear.packed, linear.bias)


def triton_gemm(linear: "Int4Linear", x: Tensor) -> Tensor:
    from lance_quant.runtime.kernels.gemm import gemm

    return gemm(x.contiguous(), linear.packed, linear.bias)


def dense(linear: "Int4Linear", x: Tensor) -> Tensor:
    """The kept bf16 weight."""
    return F.linear(x, linear.dense, linear.bias)


def reserve(device: torch.device) -> None:
    """Make the memory that a GPU's backends share now: made while a graph is captured, it would belong to the graph."""
    dequantized.reserve(device)
    if has_triton():
        from lance_quant.runtime.kernels import splits

        splits.room(device)


def _triton_serves(linear: "Int4Linear") -> bool:
    """Not codes in the CPU's layout."""
    group = linear.group_size
    return has_triton() and linear.terms is None and group >= 16 and group & (group - 1) == 0


def _few_serves(linear: "Int4Linear") -> bool:
    return _triton_serves(linear) and linear.group_size >= FEW_GROUP and linear.out_features >= FEW_OUTPUTS


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            name="triton_gemv", run=triton_gemv, serves_linear=_triton_serves, devices=("cuda",), most_rows=GEMV_ROWS
        ),
        Backend(name="triton_few", run=triton_few, serves_linear=_few_serves, devices=("cuda",), most_rows=FEW_ROWS),
        Backend(name="triton_gemm", run=triton_gemm, serves_linear=_triton_serves, devices=("cuda",)),
        Backend(
            name="triton_dequant_cublas", run=triton_dequant_cublas, serves_linear=_triton_serves, devices=("cuda",)
        ),
        Backend(name="dense", run=dense, serves_linear=lambda linear: linear.dense is not None),
        Backend(name="cpu_int4", run=cpu_int4, serves_linear=lambda linear: linear.terms is not None, devices=("cpu",)),
        Backend(name="blocks", run=blocks, any_dtype=True),
        Backend(name="reference", run=reference, any_dtype=True),
    )
}
