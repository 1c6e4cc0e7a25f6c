"""`gemm`: y = x W' for 2 to some hundred rows of x on tensor cores, codes becoming weights on the way.

    y = gemm(x, linear.packed, linear.bias)

The tile of W stands on the left of each product, so that few rows of x pad a small side; the next tile is read while
one is multiplied. Few outputs leave multiprocessors idle: `splits` share the inputs out and write their sums, and the
last one to come adds all in order, so that a call gives the same bits every time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lance_quant.runtime.kernels.dequantize import ONE, _weights
from lance_quant.runtime.kernels.launch import Kernel, cdiv, next_power_of_2
from lance_quant.runtime.kernels.splits import room, splits_of


@dataclass(frozen=True)
class GemmConfig:
    """A program makes block_o outputs (16, 32, 64, ...) of block_m rows (16, 32, ...), block_w words of 8 inputs at a
    time (8, 16, 32, ...). stages: tiles in shared memory, read ahead; 1: only the next tile, in registers."""

    block_o: int = 32
    block_w: int = 16
    splits: int = 4
    warps: int = 2
    block_m: int = 16
    stages: int = 1


@triton.jit
def _tile(x, qweight, scales, zeros, o, m, step, INPUTS: tl.constexpr, G: tl.constexpr, BLOCK_W: tl.constexpr,
          WHOLE: tl.constexpr):  # fmt: skip
    """Words, steps and zero points [O, BLOCK_W], and x [M, 8 * BLOCK_W]; beyond the inputs all is 0."""
    w = step * BLOCK_W + tl.arange(0, BLOCK_W)
    i = step * (BLOCK_W * 8) + tl.arange(0, BLOCK_W * 8)
    at = o[:, None] * (INPUTS // 8) + w[None, :]
    g = o[:, None] * (INPUTS // G) + (w // (G // 8))[None, :]
    xs = x + m[:, None] * INPUTS + i[None, :]
    if WHOLE:
        return tl.load(qweight + at), tl.load(scales + g), tl.load(zeros + g), tl.load(xs)
    else:
        there = (w < INPUTS // 8)[None, :]
        return (
            tl.load(qweight + at, there, 0),
            tl.load(scales + g, there, 0.0),
            tl.load(zeros + g, there, 0),
            tl.load(xs, (i < INPUTS)[None, :], 0.0),
        )


@triton.jit
def _added(acc, words, scale, zero, xs, one, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr, DOT: tl.constexpr):
    """acc [O, M] and the product of a tile."""
    scale = scale.to(tl.float32)
    weight = _weights(words, scale * 128.0, scale * (zero.to(tl.float32) + 128.0), one)
    weight = tl.reshape(weight, (BLOCK_O, BLOCK_W * 8))
    return tl.dot(weight.to(DOT), tl.trans(xs.to(DOT)), acc)


@triton.jit
def _gemm(x, qweight, scales, zeros, bias, parts, tickets, out, rows, outputs, one, INPUTS: tl.constexpr,
            G: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
            BLOCK_W: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """parts float32 [SPLITS, rows, outputs]; tickets int32 [tiles], 0 before and after."""
    STEPS: tl.constexpr = (INPUTS // 8 + BLOCK_W - 1) // BLOCK_W
    EACH: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    WHOLE: tl.constexpr = INPUTS // 8 % BLOCK_W == 0 and STEPS % SPLITS == 0
    tile = tl.program_id(0)
    split = tl.program_id(1)
    blocks_m = tl.cdiv(rows, BLOCK_M)  # they lie side by side, so that their weights are read once from memory
    row = (tile % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tile // blocks_m) * BLOCK_O + tl.arange(0, BLOCK_O)
    o = tl.minimum(column, outputs - 1)
    m = tl.minimum(row, rows - 1)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    one += tl.program_id(2)  # 0: an argument alone would be read anew for every code
    acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    if STAGES > 1:
        for turn in tl.range(EACH, num_stages=STAGES):
            words, scale, zero, xs = _tile(
                x, qweight, scales, zeros, o, m, split * EACH + turn, INPUTS, G, BLOCK_W, WHOLE
            )
            acc = _added(acc, words, scale, zero, xs, one, BLOCK_O, BLOCK_W, DOT)
    else:
        words, scale, zero, xs = _tile(x, qweight, scales, zeros, o, m, split * EACH, INPUTS, G, BLOCK_W, WHOLE)
        for turn in range(1, EACH):
            now = words, scale, zero, xs
            words, scale, zero, xs = _tile(
                x, qweight, scales, zeros, o, m, split * EACH + turn, INPUTS, G, BLOCK_W, WHOLE
            )  # under way while the tile before is multiplied
            acc = _added(acc, now[0], now[1], now[2], now[3], one, BLOCK_O, BLOCK_W, DOT)
        acc = _added(acc, words, scale, zero, xs, one, BLOCK_O, BLOCK_W, DOT)
    place = row[None, :] * outputs + column[:, None]
    inside = (column < outputs)[:, None] & (row < rows)[None, :]
    last = True
    if SPLITS > 1:
        tl.store(parts + split * rows * outputs + place, acc, inside)
        tl.debug_barrier()  # all threads' sums are written before one thread takes the ticket
        last = tl.atomic_add(tickets + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        if SPLITS > 1:
            acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
            for other in tl.static_range(SPLITS):
                acc += tl.load(parts + other * rows * outputs + place, inside, 0.0, cache_modifier=".cg")
            tl.store(tickets + tile, 0)
        if BIAS:
            acc += tl.load(bias + o).to(tl.float32)[:, None]
        tl.store(out + place, acc.to(out.dtype.element_ty), inside)


GEMM = Kernel(_gemm)

# (rows, outputs, inputs) -> what `benchmarks/int4_kernels.py stage=tune` found fastest, for up to 8, 16, 32, ... rows
TUNED: dict[tuple[int, int, int], GemmConfig] = {
    (8, 2048, 2048): GemmConfig(16, 32, 8, 1, 16),
    (8, 2048, 11008): GemmConfig(64, 16, 8, 4, 16, 3),
    (8, 2560, 2048): GemmConfig(32, 16, 8, 2, 16),
    (8, 22016, 2048): GemmConfig(16, 16, 1, 1, 16, 3),
    (16, 2048, 11008): GemmConfig(64, 16, 8, 4, 16, 3),
    (16, 22016, 2048): GemmConfig(16, 16, 1, 1, 16, 3),
}


def config_for(outputs: int, inputs: int, rows: int) -> GemmConfig:
    """As tuned; else so that some four programs stand on each multiprocessor of an H100."""
    tuned = TUNED.get((max(8, next_power_of_2(rows)), outputs, inputs))
    if tuned is not None:
        return tuned
    block_m = max(16, min(64, next_power_of_2(rows)))
    block_o = 32 if outputs < 8192 and rows <= 16 else 64
    splits = 1
    while splits < 8 and cdiv(outputs, block_o) * splits < 400 and inputs // (splits * 2) >= 256:
        splits *= 2
    return GemmConfig(block_o, 16, splits, 2 if block_o == 32 else 4, block_m)


def gemm(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    out: Tensor | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """x bf16 [M, I], contiguous -> [M, O] in `out`'s float dtype, else bf16.

    weight: qweight, scales, zeros; groups of a power of two, at least 8. Calls on two streams would share memory.
    """
    qweight, scales, zeros = weight
    rows, inputs = x.shape
    outputs = scales.shape[0]
    config = config or config_for(outputs, inputs, rows)
    if out is None:
        out = torch.empty((rows, outputs), dtype=torch.bfloat16, device=x.device)
    tiles = cdiv(outputs, config.block_o) * cdiv(rows, config.block_m)
    splits = splits_of(config.splits, rows, outputs, tiles)
    parts, tickets = room(x.device)
    constants = dict(
        INPUTS=inputs, G=inputs // scales.shape[1], BIAS=bias is not None, SPLITS=splits, BLOCK_M=config.block_m,
        BLOCK_O=config.block_o, BLOCK_W=config.block_w, STAGES=config.stages,
        DOT=tl.bfloat16 if x.is_cuda else tl.float32,
    )  # fmt: skip
    arguments = (x, qweight.view(torch.int32), scales, zeros, bias, parts, tickets, out, rows, outputs, ONE)
    GEMM((tiles, splits, 1), arguments, constants, num_warps=config.warps, num_stages=1)
    return out
