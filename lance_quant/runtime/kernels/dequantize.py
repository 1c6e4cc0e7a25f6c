"""`dequantize(qweight, scales, zeros, out)`: codes to bf16, bound by memory: per weight half a byte in, two out."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class DequantizeConfig:
    """block_o rows of block_i weights a program, block_i a power of two and no less than a group."""

    block_o: int = 4
    block_i: int = 1024
    warps: int = 4


@triton.jit
def _dequantize(qweight, scales, zeros, out, outputs, INPUTS: tl.constexpr, G: tl.constexpr,
                BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):  # fmt: skip
    BYTES: tl.constexpr = BLOCK_I // 2
    BLOCK_G: tl.constexpr = BLOCK_I // G
    GROUPS: tl.constexpr = INPUTS // G
    row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    o = tl.minimum(row, outputs - 1)
    at = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = (g < GROUPS)[None, :]
    packed = tl.load(qweight + o[:, None] * (INPUTS // 2) + at[None, :], mask=(at < INPUTS // 2)[None, :], other=0)
    scale = tl.load(scales + o[:, None] * GROUPS + g[None, :], mask=inside, other=0).to(tl.float32)
    zero = tl.load(zeros + o[:, None] * GROUPS + g[None, :], mask=inside, other=0).to(tl.float32)
    packed = tl.reshape(packed, (BLOCK_O, BLOCK_G, G // 2))
    low = ((packed & 15).to(tl.float32) - zero[:, :, None]) * scale[:, :, None]
    high = ((packed >> 4).to(tl.float32) - zero[:, :, None]) * scale[:, :, None]
    both = tl.join(low.to(out.dtype.element_ty), high.to(out.dtype.element_ty))
    both = tl.reshape(both, (BLOCK_O, BLOCK_I))
    there = (row < outputs)[:, None] & (i < INPUTS)[None, :]
    tl.store(out + row[:, None].to(tl.int64) * INPUTS + i[None, :], both, mask=there)


def dequantize(
    qweight: Tensor, scales: Tensor, zeros: Tensor, out: Tensor | None = None, config: DequantizeConfig | None = None
) -> Tensor:
    """Rows of the native layout -> the weight [O, I], contiguous, in `out`'s float dtype, bf16 where it is made here.

    Each is rounded once. Groups of a power of two.
    """
    outputs, inputs = len(qweight), 2 * qweight.shape[1]
    group = inputs // scales.shape[1]
    config = config or DequantizeConfig()
    block_i = max(min(config.block_i, triton.next_power_of_2(inputs)), group)
    if out is None:
        out = torch.empty((outputs, inputs), dtype=torch.bfloat16, device=qweight.device)
    _dequantize[(triton.cdiv(outputs, config.block_o), triton.cdiv(inputs, block_i))](
        qweight, scales, zeros, out, outputs,
        INPUTS=inputs, G=group, BLOCK_O=config.block_o, BLOCK_I=block_i, num_warps=config.warps,
    )  # fmt: skip
    return out
