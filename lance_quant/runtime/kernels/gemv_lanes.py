"""The GEMV of `gemv` in another order: a thread has one word of 8 codes of each of the program's rows, and so no value
ever changes threads before the one sum at the end. Meets `gemv.gemv` through its config (`lanes`)."""

import triton
import triton.language as tl

from lance_quant.runtime.kernels.gemv import _inputs, _inverse_rms, _place


@triton.jit
def _read(qweight, scales, zeros, first, outputs, start, INPUTS: tl.constexpr, G: tl.constexpr, BLOCK_O: tl.constexpr,
          BLOCK_W: tl.constexpr):  # fmt: skip
    """For each of BLOCK_O rows from `first` on: words, steps, 128 + zero points [BLOCK_W] from word `start` on."""
    w = start + tl.arange(0, BLOCK_W)
    there = w < INPUTS // 8
    found = ()
    for r in tl.static_range(BLOCK_O):
        o = tl.minimum(first + r, outputs - 1)
        words = tl.load(qweight + o * (INPUTS // 8) + w, there, 0)
        g = o * (INPUTS // G) + w // (G // 8)
        found += ((words, tl.load(scales + g, there, 0.0), tl.load(zeros + g, there, 0)),)
    return found


@triton.jit
def _sums(x, gain, inverse, following, qweight, scales, zeros, first, outputs, one, ROWS: tl.constexpr,
          INPUTS: tl.constexpr, G: tl.constexpr, NORM: tl.constexpr, BLOCK_O: tl.constexpr,
          BLOCK_W: tl.constexpr):  # fmt: skip
    """BLOCK_O * ROWS sums a thread [BLOCK_W], rows of x counting fastest."""
    W: tl.constexpr = INPUTS // 8
    y = ()
    for _ in tl.static_range(BLOCK_O * ROWS):
        y += (tl.zeros((BLOCK_W,), tl.float32),)
    for start in tl.static_range(0, W, BLOCK_W):
        held = following
        if start + BLOCK_W < W:  # under way while this block is multiplied
            following = _read(qweight, scales, zeros, first, outputs, start + BLOCK_W, INPUTS, G, BLOCK_O, BLOCK_W)
        w = start + tl.arange(0, BLOCK_W)
        xs = ()
        totals = ()
        for m in tl.static_range(ROWS):
            v = _inputs(x, gain, inverse, w, m, INPUTS, NORM)
            xs += (v,)
            totals += (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])),)
        added = ()
        for r in tl.static_range(BLOCK_O):
            words, scale, zero = held[r]
            scale = scale.to(tl.float32)
            step = scale * 128.0
            shift = scale * (zero.to(tl.float32) + 128.0)
            sums = ()
            for j in tl.static_range(8):
                placed = _place(words, j, one)
                new = ()
                for m in tl.static_range(ROWS):
                    term = placed * xs[m][j]
                    if j == 0:
                        new += (term,)
                    else:
                        new += (sums[m] + term,)
                sums = new
            for m in tl.static_range(ROWS):
                added += (y[r * ROWS + m] + (step * sums[m] - shift * totals[m]),)
        y = added
    return y


@triton.jit
def _joined(y, COUNT: tl.constexpr):
    """COUNT (1, 2, 4, ...) tensors [BLOCK] as [BLOCK, 2, 2, ...], the last index counting fastest."""
    if COUNT == 1:
        return y[0]
    else:
        halves = ()
        for at in tl.static_range(COUNT // 2):
            halves += (tl.join(y[at], y[at + COUNT // 2]),)
        return _joined(halves, COUNT // 2)


@triton.jit
def _stacked(y, HELD: tl.constexpr, COUNT: tl.constexpr):
    """The sum of each of at most COUNT tensors [BLOCK], [COUNT], all in one go; what is left over at the end is any."""
    for _ in tl.static_range(COUNT - HELD):
        y += (y[0],)
    if COUNT == 1:
        return tl.sum(y[0], 0, keep_dims=True)
    else:
        return tl.reshape(tl.sum(_joined(y, COUNT), 0), (COUNT,))


@triton.jit
def _gemv_lanes(x, qweight, scales, zeros, bias, gain, residual, out, outputs, one, eps, ROWS: tl.constexpr,
                INPUTS: tl.constexpr, G: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
                RESIDUAL: tl.constexpr, SILU_MUL: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr,
                BLOCK_X: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """As `gemv._gemv`; BLOCK_O a power of two, at most 8 ROWS."""
    COUNT: tl.constexpr = BLOCK_O * (ROWS if ROWS <= 2 else 4 if ROWS <= 4 else 8)
    first = tl.program_id(0) * BLOCK_O
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    ahead = _read(qweight, scales, zeros, first, outputs, 0, INPUTS, G, BLOCK_O, BLOCK_W)
    other = ahead
    if SILU_MUL:
        other = _read(qweight, scales, zeros, first + outputs, 2 * outputs, 0, INPUTS, G, BLOCK_O, BLOCK_W)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    inverse = ()
    if NORM:
        inverse = _inverse_rms(x, eps, ROWS, INPUTS, BLOCK_X)
    y = _sums(
        x, gain, inverse, ahead, qweight, scales, zeros, first, outputs, one, ROWS, INPUTS, G, NORM, BLOCK_O, BLOCK_W
    )
    value = _stacked(y, BLOCK_O * ROWS, COUNT)
    at = tl.arange(0, COUNT)
    row = first + at // ROWS
    m = at % ROWS
    there = (row < outputs) & (at < BLOCK_O * ROWS)
    if BIAS:
        value += tl.load(bias + row, there, 0.0).to(tl.float32)
    if SILU_MUL:
        y = _sums(
            x, gain, inverse, other, qweight, scales, zeros, first + outputs, 2 * outputs, one, ROWS, INPUTS, G, NORM,
            BLOCK_O, BLOCK_W,
        )  # fmt: skip
        up = _stacked(y, BLOCK_O * ROWS, COUNT)
        if BIAS:
            up += tl.load(bias + outputs + row, there, 0.0).to(tl.float32)
        value = value / (1 + tl.exp(-value)) * up
    place = m * outputs + row
    if RESIDUAL:
        value += tl.load(residual + place, there, 0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=there)
