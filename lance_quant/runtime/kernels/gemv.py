"""`gemv`: y = x W' for 1 to 4 rows of x, reading the codes once, 16 bytes a thread, multiplied in float32 lanes.

    y = gemv(x, linear.qweight, linear.scales, linear.zeros, linear.bias)
    h = gemv(x, *gate_up, silu_mul=True)            # rows 0..n-1 the gate, n.. the other factor: silu(gate) * up
    r = gemv(h, *down, residual=r)                  # y + residual

A program takes block_o rows of W, block_w words of 8 codes at a time; its warps lie side by side along a row, so that
each value of x is read by one warp alone and rows are summed once, at the end. A code becomes a float by a shift and
one bit operation: set into the mantissa of 1.0 it reads 1 + code / 128, and ones and zero point are taken off group by
group, 128 * sum(placed * x) - (128 + zero) * sum(x): one multiplication a code. A lower place in the mantissa would
save half of the shifts and lose the digits of small activations beside a massive one.

With `early` a program starts while the kernel before it still runs, and waits for its end only once the codes are on
their way: the launch costs nothing. Its successor may do so too.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 4
ONE = 0x3F800000  # 1.0 as bits; an argument rather than a constant, so that and-or becomes one instruction


@dataclass(frozen=True)
class GemvConfig:
    """block_o: rows a program. block_w: words of 8 codes at a time, a power of two. warps: they share block_w."""

    block_o: int = 8
    block_w: int = 256
    warps: int = 2
    early: bool = False


@triton.jit
def _place(words, j: tl.constexpr, one):
    """Code j of each word as 1 + code / 128."""
    if j < 4:
        words = words << (16 - 4 * j)
    if j > 4:
        words = words >> (4 * j - 16)
    return ((words & 0xF0000) | one).to(tl.float32, bitcast=True)


@triton.jit
def _four(packed):
    """4 bf16 of an int64 as float32."""
    low = packed.to(tl.int32)
    high = (packed >> 32).to(tl.int32)
    return (
        (low << 16).to(tl.float32, bitcast=True),
        (low & -65536).to(tl.float32, bitcast=True),
        (high << 16).to(tl.float32, bitcast=True),
        (high & -65536).to(tl.float32, bitcast=True),
    )


@triton.jit
def _block(qweight, scales, zeros, o, start, INPUTS: tl.constexpr, G: tl.constexpr, BLOCK_W: tl.constexpr):
    """Words, steps and 128 + zero points of the rows `o`, from word `start` on."""
    GROUPS: tl.constexpr = INPUTS // G
    w = start + tl.arange(0, BLOCK_W)
    g = start // (G // 8) + tl.arange(0, BLOCK_W // (G // 8))
    there = (g < GROUPS)[None, :]
    words = tl.load(qweight + o[:, None] * (INPUTS // 8) + w[None, :], mask=(w < INPUTS // 8)[None, :], other=0)
    scale = tl.load(scales + o[:, None] * GROUPS + g[None, :], mask=there, other=0).to(tl.float32)
    zero = tl.load(zeros + o[:, None] * GROUPS + g[None, :], mask=there, other=0).to(tl.float32)
    return words, scale, zero + 128.0


@triton.jit
def _rows(x, qweight, scales, zeros, o, one, ROWS: tl.constexpr, INPUTS: tl.constexpr, G: tl.constexpr,
          BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr, WAIT: tl.constexpr):  # fmt: skip
    """ROWS sums [BLOCK_O]: x times the rows `o` of W."""
    W: tl.constexpr = INPUTS // 8
    GW: tl.constexpr = G // 8
    BLOCK_G: tl.constexpr = BLOCK_W // GW
    y = ()
    for _m in tl.static_range(ROWS):
        y += (tl.zeros((BLOCK_O, BLOCK_G), tl.float32),)
    following = _block(qweight, scales, zeros, o, 0, INPUTS, G, BLOCK_W)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    for start in tl.static_range(0, W, BLOCK_W):
        words, scale, zero = following
        if start + BLOCK_W < W:  # under way while this block is multiplied
            following = _block(qweight, scales, zeros, o, start + BLOCK_W, INPUTS, G, BLOCK_W)
        w = start + tl.arange(0, BLOCK_W)
        xs = ()
        for m in tl.static_range(ROWS):
            at = x + m * (INPUTS // 4) + 2 * w
            xs += (_four(tl.load(at, mask=w < W, other=0)) + _four(tl.load(at + 1, mask=w < W, other=0)),)
        sums = ()
        for j in tl.static_range(8):
            placed = _place(words, j, one)
            new = ()
            for m in tl.static_range(ROWS):
                term = placed * xs[m][j][None, :]
                if j == 0:
                    new += (term,)
                else:
                    new += (sums[m] + term,)
            sums = new
        added = ()
        for m in tl.static_range(ROWS):
            v = xs[m]
            eight = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))
            total = tl.sum(tl.reshape(eight, (BLOCK_G, GW)), 1)
            got = tl.sum(tl.reshape(sums[m], (BLOCK_O, BLOCK_G, GW)), 2)
            added += (y[m] + scale * (128.0 * got - zero * total[None, :]),)
        y = added
    out = ()
    for m in tl.static_range(ROWS):
        out += (tl.sum(y[m], 1),)
    return out


@triton.jit
def _gemv(x, qweight, scales, zeros, bias, residual, out, outputs, one, ROWS: tl.constexpr, INPUTS: tl.constexpr,
          G: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SILU_MUL: tl.constexpr,
          BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """outputs: with SILU_MUL half of W's rows."""
    row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    there = row < outputs
    o = tl.minimum(row, outputs - 1)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    y = _rows(x, qweight, scales, zeros, o, one, ROWS, INPUTS, G, BLOCK_O, BLOCK_W, EARLY)
    up = y
    if SILU_MUL:
        up = _rows(x, qweight, scales, zeros, o + outputs, one, ROWS, INPUTS, G, BLOCK_O, BLOCK_W, False)
    for m in tl.static_range(ROWS):
        value = y[m]
        if BIAS:
            value += tl.load(bias + o).to(tl.float32)
        if SILU_MUL:
            other = up[m]
            if BIAS:
                other += tl.load(bias + o + outputs).to(tl.float32)
            value = value / (1 + tl.exp(-value)) * other
        if RESIDUAL:
            value += tl.load(residual + m * outputs + o).to(tl.float32)
        tl.store(out + m * outputs + row, value.to(out.dtype.element_ty), mask=there)


def config_for(outputs: int, inputs: int, rows: int) -> GemvConfig:
    """What was fastest on an H100 for shapes like this."""
    if inputs > 4096:
        return GemvConfig(4, 512, 4) if rows == 1 else GemvConfig(2, 512, 4)
    if rows > 1:
        return GemvConfig(4, 256, 4)
    if outputs < 8192:
        return GemvConfig(4, 256, 2)
    return GemvConfig(8, 256, 2)


def gemv(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    out: Tensor | None = None,
    config: GemvConfig | None = None,
) -> Tensor:
    """x bf16 [M, I], M at most MOST_ROWS, contiguous -> bf16 [M, O], or [M, O / 2] with silu_mul.

    Groups of a power of two, at least 8. residual [M, outputs] is added; it may be `out` itself.
    out: of any float dtype, bf16 where it is made here.
    """
    rows, inputs = x.shape
    outputs = len(qweight) // 2 if silu_mul else len(qweight)
    config = config or config_for(len(qweight), inputs, rows)
    group = inputs // scales.shape[1]
    block_w = max(min(config.block_w, triton.next_power_of_2(inputs // 8)), group // 8)
    if out is None:
        out = torch.empty((rows, outputs), dtype=torch.bfloat16, device=x.device)
    _gemv[(triton.cdiv(outputs, config.block_o),)](
        x.view(torch.int64), qweight.view(torch.int32), scales, zeros, bias, residual, out, outputs, ONE,
        ROWS=rows, INPUTS=inputs, G=group, BIAS=bias is not None, RESIDUAL=residual is not None, SILU_MUL=silu_mul,
        BLOCK_O=config.block_o, BLOCK_W=block_w, EARLY=config.early, num_warps=config.warps,
        **({"launch_pdl": True} if config.early else {}),
    )  # fmt: skip
    return out
