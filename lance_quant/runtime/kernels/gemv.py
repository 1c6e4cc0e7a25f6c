"""`gemv`: y = x W' for 1 to 4 rows of x, reading the codes once, 16 bytes a thread, multiplied in float32 lanes.

    y = gemv(x, linear.packed, linear.bias)
    h = gemv(r, gate_up.packed, around=Around(gain=norm.weight, eps=norm.eps, silu_mul=True))
    r = gemv(h, down.packed, around=Around(residual=r))

A program takes block_o rows of W, block_w words of 8 codes at a time; its warps lie side by side along a row, so that
each value of x is read by one warp alone and rows are summed once, at the end. A code becomes a float by a shift and
one bit operation: set into the mantissa of 1.0 it reads 1 + code / 128, and ones and zero point are taken off group by
group, 128 * sum(placed * x) - (128 + zero) * sum(x): one multiplication a code. A lower place in the mantissa would
save half of the shifts and lose the digits of small activations beside a massive one.

The RMSNorm before a product is worked out by every program anew, from 4 KB that lie in the L2 cache, which takes less
than a kernel of its own. It is not rounded to bf16 on its way.

With `early` a program starts while the kernel before it still runs, and waits for its end only once the codes are on
their way: the launch costs nothing. Its successor may do so too.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lance_quant.runtime.kernels.launch import Kernel, cdiv, next_power_of_2

MOST_ROWS = 4
ONE = 0x3F800000  # 1.0 as bits; an argument rather than a constant, so that and-or becomes one instruction


@dataclass(frozen=True)
class GemvConfig:
    """block_o: rows a program. block_w: words of 8 codes at a time, a power of two. warps: they share block_w."""

    block_o: int = 8
    block_w: int = 256
    warps: int = 2


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
def _eight(at, there):
    """8 consecutive bf16 each, of int64 pointers, as float32."""
    return _four(tl.load(at, there, 0)) + _four(tl.load(at + 1, there, 0))


@triton.jit
def _inverse_rms(x, eps, ROWS: tl.constexpr, INPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """1 / rms of each row of x."""
    at = tl.arange(0, BLOCK)
    found = ()
    for m in tl.static_range(ROWS):
        v = _four(tl.load(x + m * (INPUTS // 4) + at, at < INPUTS // 4, 0))
        squares = (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3])
        found += (1.0 / tl.sqrt(tl.sum(squares, 0) / INPUTS + eps),)
    return found


@triton.jit
def _inputs(x, gain, inverse, w, m: tl.constexpr, INPUTS: tl.constexpr, NORM: tl.constexpr):
    """What row m of x gives the codes of words w, 8 float32 each; normed with NORM."""
    there = w < INPUTS // 8
    v = _eight(x + m * (INPUTS // 4) + 2 * w, there)
    if NORM:
        k = inverse[m]
        g = _eight(gain + 2 * w, there)
        v = (v[0] * k * g[0], v[1] * k * g[1], v[2] * k * g[2], v[3] * k * g[3],
             v[4] * k * g[4], v[5] * k * g[5], v[6] * k * g[6], v[7] * k * g[7])  # fmt: skip
    return v


@triton.jit
def _rows(x, gain, inverse, following, qweight, scales, zeros, o, one, ROWS: tl.constexpr, INPUTS: tl.constexpr,
          G: tl.constexpr, NORM: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """ROWS sums [BLOCK_O]: x times the rows `o` of W. following: what `_block` read of the first words."""
    W: tl.constexpr = INPUTS // 8
    GW: tl.constexpr = G // 8
    BLOCK_G: tl.constexpr = BLOCK_W // GW
    y = ()
    for _m in tl.static_range(ROWS):
        y += (tl.zeros((BLOCK_O, BLOCK_G), tl.float32),)
    for start in tl.static_range(0, W, BLOCK_W):
        words, scale, zero = following
        if start + BLOCK_W < W:  # under way while this block is multiplied
            following = _block(qweight, scales, zeros, o, start + BLOCK_W, INPUTS, G, BLOCK_W)
        w = start + tl.arange(0, BLOCK_W)
        xs = ()
        for m in tl.static_range(ROWS):
            xs += (_inputs(x, gain, inverse, w, m, INPUTS, NORM),)
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
def _gemv(x, qweight, scales, zeros, bias, gain, residual, out, outputs, one, eps, ROWS: tl.constexpr,
          INPUTS: tl.constexpr, G: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
          SILU_MUL: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_X: tl.constexpr,
          EARLY: tl.constexpr):  # fmt: skip
    """outputs: with SILU_MUL half of W's rows. BLOCK_X: a row of x, in fours."""
    row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    there = row < outputs
    o = tl.minimum(row, outputs - 1)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    first = _block(qweight, scales, zeros, o, 0, INPUTS, G, BLOCK_W)
    second = first
    if SILU_MUL:
        second = _block(qweight, scales, zeros, o + outputs, 0, INPUTS, G, BLOCK_W)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    inverse = ()
    if NORM:
        inverse = _inverse_rms(x, eps, ROWS, INPUTS, BLOCK_X)
    y = _rows(x, gain, inverse, first, qweight, scales, zeros, o, one, ROWS, INPUTS, G, NORM, BLOCK_O, BLOCK_W)
    up = y
    if SILU_MUL:
        up = _rows(
            x, gain, inverse, second, qweight, scales, zeros, o + outputs, one, ROWS, INPUTS, G, NORM, BLOCK_O, BLOCK_W
        )
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


# (rows, outputs, inputs) -> what `benchmarks/int4_kernels.py stage=tune` found fastest, for 1, 2 and 3 to 4 rows
TUNED: dict[tuple[int, int, int], GemvConfig] = {
    (1, 2048, 2048): GemvConfig(8, 256, 4),
    (1, 2048, 11008): GemvConfig(4, 512, 4),
    (1, 2560, 2048): GemvConfig(8, 256, 4),
    (1, 22016, 2048): GemvConfig(4, 256, 2),
    (2, 22016, 2048): GemvConfig(8, 256, 4),
}


def config_for(outputs: int, inputs: int, rows: int) -> GemvConfig:
    """As tuned; else what was fastest on an H100 for shapes like this."""
    tuned = TUNED.get((rows if rows < 3 else 4, outputs, inputs))
    if tuned is not None:
        return tuned
    if inputs > 4096:
        return GemvConfig(4, 512, 4) if rows == 1 else GemvConfig(2, 512, 4)
    if rows > 1:
        return GemvConfig(4, 256, 4)
    if outputs < 8192:
        return GemvConfig(4, 256, 2)
    return GemvConfig(8, 256, 2)


@dataclass(frozen=True, kw_only=True)
class Around:
    """What is done in the same kernel. gain, eps: x is a residual stream, and its RMSNorm is multiplied. silu_mul: the
    first half of the rows of W is the gate, silu(gate) * up comes out. residual [M, outputs]: added at the end."""

    gain: Tensor | None = None
    eps: float = 0.0
    silu_mul: bool = False
    residual: Tensor | None = None


NOTHING = Around()
GEMV = Kernel(_gemv)


def gemv(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    around: Around = NOTHING,
    out: Tensor | None = None,
    config: GemvConfig | None = None,
) -> Tensor:
    """x bf16 [M, I], M at most MOST_ROWS, contiguous -> bf16 [M, O], or [M, O / 2] with silu_mul.

    weight: qweight, scales, zeros; groups of a power of two, at least 8. The residual may be `out` itself, whose dtype
    is any float one, bf16 where it is made here.
    """
    qweight, scales, zeros = weight
    rows, inputs = x.shape
    all_outputs, groups = scales.shape
    outputs = all_outputs // 2 if around.silu_mul else all_outputs
    config = config or config_for(all_outputs, inputs, rows)
    group = inputs // groups
    block_w = max(min(config.block_w, next_power_of_2(inputs // 8)), group // 8)
    if out is None:
        out = torch.empty((rows, outputs), dtype=torch.bfloat16, device=x.device)
    gain = None if around.gain is None else around.gain.view(torch.int64)
    constants = dict(
        ROWS=rows, INPUTS=inputs, G=group, BIAS=bias is not None, NORM=gain is not None,
        RESIDUAL=around.residual is not None, SILU_MUL=around.silu_mul, BLOCK_O=config.block_o, BLOCK_W=block_w,
        BLOCK_X=next_power_of_2(inputs // 4),
    )  # fmt: skip
    packed = (qweight.view(torch.int32), scales, zeros, bias)
    arguments = (x.view(torch.int64), *packed, gain, around.residual, out, outputs, ONE, around.eps)
    GEMV((cdiv(outputs, config.block_o), 1, 1), arguments, constants, num_warps=config.warps)
    return out
