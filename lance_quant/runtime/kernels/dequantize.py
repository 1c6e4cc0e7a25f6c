"""`dequantize(qweight, scales, zeros, out)`: codes to bf16, bound by memory: per weight half a byte in, two out.

Rows follow each other in all four arrays, so that a weight is a run of words of 8 codes, whatever its shape. A thread
reads a word and writes 16 bytes. A code set into the mantissa of 1.0 reads 1 + code / 128, and one multiply-add makes
(code - zero) * scale of it: 128 * scale and (128 + zero) * scale have 16 bits at most, so that nothing is rounded but
the result.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lance_quant.runtime.kernels.launch import Kernel, Launch, cdiv

ONE = 0x3F800000  # 1.0 as bits; an argument rather than a constant, so that and-or becomes one instruction


@dataclass(frozen=True)
class DequantizeConfig:
    """A program takes `turns` times `words` words of 8 codes, all read before the first is written."""

    words: int = 512
    turns: int = 2
    warps: int = 8


@triton.jit
def _weights(words, scale, shift, one):
    """8 float32 weights of each word, in order: [BLOCK] -> [BLOCK * 8]."""
    v0 = ((((words << 16) & 0xF0000) | one).to(tl.float32, bitcast=True)) * scale - shift
    v1 = ((((words << 12) & 0xF0000) | one).to(tl.float32, bitcast=True)) * scale - shift
    v2 = ((((words << 8) & 0xF0000) | one).to(tl.float32, bitcast=True)) * scale - shift
    v3 = ((((words << 4) & 0xF0000) | one).to(tl.float32, bitcast=True)) * scale - shift
    v4 = (((words & 0xF0000) | one).to(tl.float32, bitcast=True)) * scale - shift
    v5 = ((((words >> 4) & 0xF0000) | one).to(tl.float32, bitcast=True)) * scale - shift
    v6 = ((((words >> 8) & 0xF0000) | one).to(tl.float32, bitcast=True)) * scale - shift
    v7 = ((((words >> 12) & 0xF0000) | one).to(tl.float32, bitcast=True)) * scale - shift
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))  # [BLOCK, 2, 2]: the last index counts slowest
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.join(even, odd)


@triton.jit
def _dequantize(qweight, scales, zeros, out, words, first, skipped, one, GW: tl.constexpr, BLOCK: tl.constexpr,
                TURNS: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Words `first` on come from `skipped` words further on."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    start = tl.program_id(0) * (BLOCK * TURNS)
    held = ()
    for turn in tl.static_range(TURNS):
        w = start + turn * BLOCK + tl.arange(0, BLOCK)
        there = w < words
        w += tl.where(w < first, 0, skipped)
        if WHOLE:
            read = (tl.load(qweight + w), tl.load(scales + w // GW), tl.load(zeros + w // GW))
        else:
            read = (
                tl.load(qweight + w, there, 0),
                tl.load(scales + w // GW, there, 0.0),
                tl.load(zeros + w // GW, there, 0),
            )
        held += (read,)
    if EARLY:
        tl.extra.cuda.gdc_wait()  # the product before may still read what is written now
    for turn in tl.static_range(TURNS):
        codes, scale, zero = held[turn]
        scale = scale.to(tl.float32)
        values = _weights(codes, scale * 128.0, scale * (zero.to(tl.float32) + 128.0), one)
        i = start * 8 + turn * (BLOCK * 8) + tl.arange(0, BLOCK * 8)
        values = tl.reshape(values, (BLOCK * 8,)).to(out.dtype.element_ty)
        if WHOLE:
            tl.store(out + i, values)
        else:
            tl.store(out + i, values, i < words * 8)


DEQUANTIZE = Kernel(_dequantize)


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    out: Tensor | None = None,
    config: DequantizeConfig | None = None,
    gap: tuple[int, int] = (0, 0),
) -> Tensor:
    """Contiguous rows of the native layout -> the weight [O, I], contiguous, in `out`'s float dtype, bf16 where it is
    made here. gap: (rows that come first, rows that are left out behind them).

    Each is rounded once. Groups of a multiple of 8; fewer than 2^31 weights.
    """
    if out is None:
        shape = len(qweight) - gap[1], 2 * qweight.shape[1]
        out = torch.empty(shape, dtype=torch.bfloat16, device=qweight.device)
    dequantizing((qweight, scales, zeros), out, config, gap)()
    return out


def dequantizing(
    packed: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    config: DequantizeConfig | None = None,
    gap: tuple[int, int] = (0, 0),
) -> Launch:
    """The same as a launch, to be made again whenever `out` has been given to something else."""
    qweight, scales, zeros = packed
    config = config or DequantizeConfig()
    row = qweight.shape[1] // 4  # words
    words, each = (len(qweight) - gap[1]) * row, config.words * config.turns
    return Launch(
        DEQUANTIZE,
        (cdiv(words, each), 1, 1),
        (qweight.view(torch.int32), scales, zeros, out, words, gap[0] * row, gap[1] * row, ONE),
        {"GW": row // scales.shape[1], "BLOCK": config.words, "TURNS": config.turns, "WHOLE": words % each == 0},
        num_warps=config.warps,
    )
