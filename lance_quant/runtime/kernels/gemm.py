"""`gemm`: y = x W' on tensor cores, codes dequantized on the way: for rows beyond the GEMV's, up to a few hundred.

    y = gemm(x, linear.qweight, linear.scales, linear.zeros, linear.bias)

The tile of W stands on the left of each product, so that few rows of x pad a small side. Few outputs leave
multiprocessors idle: `splits` share the inputs of a tile out, and a second kernel adds their sums in order, the same
to the bit at every call.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class GemmConfig:
    """A program makes block_o outputs of block_m rows, block_i inputs at a time (no less than a group)."""

    block_m: int = 16
    block_o: int = 64
    block_i: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 4


@triton.jit
def _gemm(x, qweight, scales, zeros, bias, out, rows, outputs, INPUTS: tl.constexpr, G: tl.constexpr,
          BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
          BLOCK_I: tl.constexpr):  # fmt: skip
    """out [rows, outputs], or float32 [SPLITS, rows, outputs]."""
    GROUPS: tl.constexpr = INPUTS // G
    BLOCK_G: tl.constexpr = BLOCK_I // G
    STEPS: tl.constexpr = (INPUTS + BLOCK_I - 1) // BLOCK_I
    EACH: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    blocks_m = tl.cdiv(rows, BLOCK_M)
    row = (tl.program_id(0) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) // blocks_m) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(1)
    m = tl.minimum(row, rows - 1)
    o = tl.minimum(column, outputs - 1)
    acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for turn in range(EACH):
        step = split * EACH + turn
        at = step * (BLOCK_I // 2) + tl.arange(0, BLOCK_I // 2)
        i = step * BLOCK_I + tl.arange(0, BLOCK_I)
        g = step * BLOCK_G + tl.arange(0, BLOCK_G)
        packed_at = qweight + o[:, None] * (INPUTS // 2) + at[None, :]
        group_at = o[:, None] * GROUPS + g[None, :]
        if INPUTS % BLOCK_I == 0 and STEPS % SPLITS == 0:
            packed = tl.load(packed_at)
            values = tl.load(x + m[:, None] * INPUTS + i[None, :])
            scale = tl.load(scales + group_at).to(tl.float32)
            zero = tl.load(zeros + group_at).to(tl.float32)
        else:
            packed = tl.load(packed_at, mask=(at < INPUTS // 2)[None, :], other=0)
            values = tl.load(x + m[:, None] * INPUTS + i[None, :], mask=(i < INPUTS)[None, :], other=0)
            scale = tl.load(scales + group_at, mask=(g < GROUPS)[None, :], other=0).to(tl.float32)
            zero = tl.load(zeros + group_at, mask=(g < GROUPS)[None, :], other=0).to(tl.float32)
        packed = tl.reshape(packed, (BLOCK_O, BLOCK_G, G // 2))
        low = ((packed & 15).to(tl.float32) - zero[:, :, None]) * scale[:, :, None]
        high = ((packed >> 4).to(tl.float32) - zero[:, :, None]) * scale[:, :, None]
        weight = tl.reshape(tl.join(low.to(values.dtype), high.to(values.dtype)), (BLOCK_O, BLOCK_I))
        acc = tl.dot(weight, tl.trans(values), acc)
    if BIAS:
        acc += tl.load(bias + o).to(tl.float32)[:, None]
    there = (column < outputs)[:, None] & (row < rows)[None, :]
    at = (split * rows + row).to(tl.int64)[None, :] * outputs + column[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=there)


@triton.jit
def _add_splits(parts, bias, out, rows, outputs, BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = o < outputs
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * rows + row) * outputs + o, mask=there, other=0)
    if BIAS:
        total += tl.load(bias + o, mask=there, other=0).to(tl.float32)
    tl.store(out + row * outputs + o, total.to(out.dtype.element_ty), mask=there)


def config_for(outputs: int, inputs: int, rows: int) -> GemmConfig:
    """A starting point for an H100; `selection` knows better once it has measured."""
    if rows > 64:
        return GemmConfig(128, 128, 64, 1, 8, 3)
    block_m = max(16, triton.next_power_of_2(rows))
    block_o, warps = (32, 2) if rows <= 16 else (64, 4)
    splits = min(8, max(1, 528 // triton.cdiv(outputs, block_o)), max(1, inputs // 512))
    return GemmConfig(block_m, block_o, 128, splits, warps, 4)


def gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """x bf16 [M, I], contiguous -> [M, O] in `out`'s float dtype, else bf16. Groups of a power of two."""
    rows, inputs = x.shape
    outputs = len(qweight)
    group = inputs // scales.shape[1]
    config = config or config_for(outputs, inputs, rows)
    block_i = max(config.block_i, group)
    if out is None:
        out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    split = config.splits > 1
    sums = torch.empty((config.splits, rows, outputs), dtype=torch.float32, device=x.device) if split else out
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(outputs, config.block_o)
    _gemm[(tiles, config.splits)](
        x, qweight, scales, zeros, bias, sums, rows, outputs,
        INPUTS=inputs, G=group, BIAS=bias is not None and not split, SPLITS=config.splits, BLOCK_M=config.block_m,
        BLOCK_O=config.block_o, BLOCK_I=block_i, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if split:
        _add_splits[(triton.cdiv(outputs, 512), rows)](
            sums, bias, out, rows, outputs, BIAS=bias is not None, SPLITS=config.splits, BLOCK=512
        )
    return out
