"""`few`: y = x W' for 2 to 16 rows of x on tensor cores, codes and x read in the order in which the cores take them.

    y = few(x, linear.packed, linear.bias)
    h = few(x, gate_up.packed, silu_mul=True)

A warp makes 16 outputs of all rows from a stretch of inputs; the warps of a program share the inputs out, and so do
programs (`splits`: the last one to come adds all in order, so that a call gives the same bits every time). A tensor
core wants from each of 4 neighbouring threads 2 inputs at a time of its output. Which ones is free, as long as codes
and x agree, so a thread reads 4 to 16 bytes of codes in one piece, and x likewise, and nothing changes threads or goes
through shared memory before the sums of the warps.

A word of 8 codes becomes 4 registers of two bf16 by a shift and one bit operation each: set into the mantissa of 16 a
code reads 16 + code. Steps and zero points come in group by group: scale * (sum(placed * x) - (16 + zero) * sum(x)),
the last sum by a product with ones, which leaves it where the other one lies.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lance_quant.runtime.kernels.launch import Kernel, cdiv
from lance_quant.runtime.kernels.splits import room, splits_of

MOST_ROWS = 16
SIXTEEN = 0x41804180  # 16.0 twice as bf16; an argument rather than a constant, so that and-or becomes one instruction


@dataclass(frozen=True)
class FewConfig:
    """A program makes 16 * tiles outputs, from twice as many rows of W with silu_mul. warps: they share the inputs.
    stretch: inputs of a warp at a time, whole groups. ahead: stretches whose codes are on their way."""

    tiles: int = 1
    warps: int = 4
    splits: int = 1
    stretch: int = 256
    ahead: int = 2


@triton.jit
def _places(qweight, scales, zeros, first, step, INPUTS: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr,
            WARPS: tl.constexpr, WIDE: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """Pointers to what 16 outputs from `first` on need of the stretch `step`, and of the WARPS - 1 after it.

    Words [CHUNKS, GROUPS, 2, WARPS, 8, 4; WIDE], scales and zeros [2, WARPS, 8, 4; GROUPS], in two dimensions, so that
    the 32 threads of a warp lie along the 8 and the 4 and each reads the last dimension in one piece. Which thread it
    is and what it reads are added apart: the latter are constants of an instruction.
    """
    i = tl.arange(0, CHUNKS * GROUPS * 2 * WARPS * 32)[:, None]
    at = (first + i // 4 % 8) * (INPUTS // 8) + (step + i // 32 % WARPS) * (GROUPS * G // 8) + (i % 4 ^ 1) * WIDE
    group, chunk = i // (64 * WARPS) % GROUPS, i // (64 * WARPS * GROUPS)
    more = i // (32 * WARPS) % 2 * INPUTS + group * (G // 8) + chunk * (4 * WIDE) + tl.arange(0, WIDE)[None, :]
    words = qweight + at + more  # ^ 1: or a thread would get the word of the next one when WIDE is 1
    i = tl.arange(0, 2 * WARPS * 32)[:, None]
    at = (first + i // 4 % 8) * (INPUTS // G) + (step + i // 32 % WARPS) * GROUPS
    more = i // (32 * WARPS) * (8 * INPUTS // G) + tl.arange(0, GROUPS)[None, :]
    return words, scales + at + more, zeros + at + more


@triton.jit
def _read(places, turn: tl.constexpr, left, G: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr,
          WHOLE: tl.constexpr):  # fmt: skip
    """What lies there, `turn` times WARPS stretches on. left: stretches from the first on."""
    words, scales, zeros = places
    words += turn * (WARPS * GROUPS * G // 8)
    scales += turn * (WARPS * GROUPS)
    zeros += turn * (WARPS * GROUPS)
    if WHOLE:
        return tl.load(words), tl.load(scales), tl.load(zeros)
    else:
        there = (tl.arange(0, words.shape[0]) // 32 % WARPS < left - turn * WARPS)[:, None]
        and_its_group = (tl.arange(0, 64 * WARPS) // 32 % WARPS < left - turn * WARPS)[:, None]
        return tl.load(words, there, 0), tl.load(scales, and_its_group, 0.0), tl.load(zeros, and_its_group, 0)


@triton.jit
def _inputs(x, rows, step, turn: tl.constexpr, left, INPUTS: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr,
            WARPS: tl.constexpr, WIDE: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
            WHOLE: tl.constexpr):  # fmt: skip
    """x [GROUPS * WARPS, G, ROWS], the inputs of a group in the order of `_placed`."""
    i = tl.arange(0, ROWS // 8 * CHUNKS * WIDE * GROUPS * WARPS * 8)[:, None]  # slowest to fastest, 8 rows
    m = tl.minimum(i // (8 * WARPS * GROUPS * WIDE * CHUNKS) * 8 + i % 8, rows - 1)
    group, word = i // (8 * WARPS) % GROUPS, i // (8 * WARPS * GROUPS) % WIDE
    chunk = i // (8 * WARPS * GROUPS * WIDE) % CHUNKS
    code = tl.arange(0, 32)[None, :]  # 8 of a word, for 4 threads
    at = m * INPUTS + (step + i // 8 % WARPS) * (GROUPS * G) + (code // 8 ^ 1) * (8 * WIDE)
    xs = x + at + (turn * (WARPS * GROUPS * G) + group * G + chunk * (32 * WIDE) + word * 8 + code % 8)
    if WHOLE:
        v = tl.load(xs)
    else:
        v = tl.load(xs, i // 8 % WARPS < left - turn * WARPS, 0.0)
    v = tl.reshape(v, (ROWS // 8, CHUNKS, WIDE, GROUPS, WARPS, 8, 4, 2, 4))
    return tl.reshape(tl.permute(v, (3, 4, 1, 2, 8, 6, 7, 0, 5)), (GROUPS * WARPS, G, ROWS))


@triton.jit
def _placed(words, sixteen, G: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, WIDE: tl.constexpr,
            CHUNKS: tl.constexpr):  # fmt: skip
    """16 + code as bf16 [GROUPS * WARPS, 16, G]; codes j and j + 4 of a word share a register."""
    j = tl.reshape(tl.arange(0, 4), (1, 1, 1, 1, 1, 1, 1, 4))
    words = tl.reshape(words, (CHUNKS, GROUPS, 2, WARPS, 8, 4, WIDE, 1))
    words = tl.broadcast_to(words, (CHUNKS, GROUPS, 2, WARPS, 8, 4, WIDE, 4))
    pair = (tl.where(j == 0, words << 3, words >> tl.maximum(4 * j - 3, 0)) & 0x780078) | sixteen
    pair = tl.reshape(pair, (CHUNKS, GROUPS, 2, WARPS, 8, 4, WIDE, 4, 1))
    pair = tl.broadcast_to(pair, (CHUNKS, GROUPS, 2, WARPS, 8, 4, WIDE, 4, 2))
    side = tl.reshape(tl.arange(0, 2), (1, 1, 1, 1, 1, 1, 1, 1, 2))
    v = (pair >> (16 * side)).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.permute(v, (1, 3, 2, 4, 0, 6, 7, 5, 8)), (GROUPS * WARPS, 16, G))


@triton.jit
def _of_groups(v, GROUPS: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr):
    """What `_read` got for each group and output -> for all rows [GROUPS * WARPS, 16, ROWS]."""
    v = tl.permute(tl.reshape(v, (2, WARPS, 8, 4, GROUPS)), (4, 1, 0, 2, 3))
    v = tl.reshape(v, (GROUPS, WARPS, 16, 1, 4, 1))  # each of 4 threads makes 2 of 8 rows
    return tl.reshape(tl.broadcast_to(v, (GROUPS, WARPS, 16, ROWS // 8, 4, 2)), (GROUPS * WARPS, 16, ROWS))


@triton.jit
def _first(tile, outputs):
    """Of a tile's 16 outputs. Some of the last tile are made twice, and written by the tile before it alone."""
    return tl.minimum(tile * 16, outputs - 16)


@triton.jit
def _whole(y, parts, bias, row, column, inside, rows, outputs, BIAS: tl.constexpr, SPLITS: tl.constexpr):
    """All splits' sums, in order, and the bias."""
    if SPLITS > 1:
        y = tl.zeros(y.shape, tl.float32)
        for split in tl.static_range(SPLITS):
            place = parts + (split * rows + row) * outputs + column
            y += tl.load(place, inside, 0.0, cache_modifier=".cg")
    if BIAS:
        y += tl.load(bias + column).to(tl.float32)
    return y


@triton.jit
def _few(x, qweight, scales, zeros, bias, parts, tickets, out, rows, outputs, sixteen, INPUTS: tl.constexpr,
         G: tl.constexpr, BIAS: tl.constexpr, SILU_MUL: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr,
         ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, AHEAD: tl.constexpr, DOT: tl.constexpr,
         EARLY: tl.constexpr):  # fmt: skip
    """outputs: with SILU_MUL half of W's rows. GROUPS: in a stretch. parts float32 [SPLITS, rows, W's rows]; tickets
    int32 [programs], 0 before and after."""
    STEPS: tl.constexpr = INPUTS // (G * GROUPS)
    TURNS: tl.constexpr = (STEPS + WARPS * SPLITS - 1) // (WARPS * SPLITS)
    WHOLE: tl.constexpr = STEPS == WARPS * SPLITS * TURNS
    WIDE: tl.constexpr = G // 32 if G < 128 else 4  # words a thread at a time
    CHUNKS: tl.constexpr = G // (32 * WIDE)
    SIDES: tl.constexpr = 2 if SILU_MUL else 1  # gate and up of an output follow each other
    MADE: tl.constexpr = TILES * SIDES
    program = tl.program_id(0)
    step = tl.program_id(1) * (TURNS * WARPS)
    left = STEPS - step
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    sixteen += tl.program_id(2)  # 0: an argument alone would be read anew for every code
    places = ()
    held = ()
    acc = ()
    for t in tl.static_range(MADE):
        first = _first(program * TILES + t // SIDES, outputs) + t % SIDES * outputs
        places += (_places(qweight, scales, zeros, first, step, INPUTS, G, GROUPS, WARPS, WIDE, CHUNKS),)
        acc += (tl.zeros((WARPS, 16, ROWS), tl.float32),)
    for turn in tl.static_range(TURNS):
        if turn < AHEAD:
            for t in tl.static_range(MADE):
                held += (_read(places[t], turn, left, G, GROUPS, WARPS, WHOLE),)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    else:
        tl.debug_barrier()  # without it ptxas moves half of what is read ahead to where it is needed
    ones = tl.full((GROUPS * WARPS, 16, G), 1.0, DOT)
    for turn in tl.static_range(TURNS):
        xs = _inputs(x, rows, step, turn, left, INPUTS, G, GROUPS, WARPS, WIDE, CHUNKS, ROWS, WHOLE).to(DOT)
        total = tl.dot(ones, xs)
        added = ()
        for t in tl.static_range(MADE):
            words, scale, zero = held[turn * MADE + t]
            if turn + AHEAD < TURNS:  # under way while this one is multiplied
                held += (_read(places[t], turn + AHEAD, left, G, GROUPS, WARPS, WHOLE),)
            got = tl.dot(_placed(words, sixteen, G, GROUPS, WARPS, WIDE, CHUNKS).to(DOT), xs)
            scale = _of_groups(scale.to(tl.float32), GROUPS, WARPS, ROWS)
            zero = _of_groups(zero.to(tl.float32) + 16.0, GROUPS, WARPS, ROWS)
            got = tl.reshape(scale * (got - zero * total), (GROUPS, WARPS, 16, ROWS))
            added += (acc[t] + tl.sum(got, 0),)
        acc = added
    y = ()
    for t in tl.static_range(MADE):
        y += (tl.sum(acc[t], 0),)
    row = tl.arange(0, ROWS)[None, :]
    last = True
    if SPLITS > 1:
        for t in tl.static_range(MADE):
            tile = program * TILES + t // SIDES
            column = _first(tile, outputs) + tl.arange(0, 16)[:, None]
            mine = parts + (tl.program_id(1) * rows + row) * (outputs * SIDES) + t % SIDES * outputs
            tl.store(mine + column, y[t], (row < rows) & (column >= tile * 16))
        tl.debug_barrier()  # all threads' sums are written before one thread takes the ticket
        last = tl.atomic_add(tickets + program, 1, sem="acq_rel") == SPLITS - 1
    if last:
        for t in tl.static_range(TILES):
            tile = program * TILES + t
            column = _first(tile, outputs) + tl.arange(0, 16)[:, None]
            inside = (row < rows) & (column >= tile * 16)
            value = _whole(y[t * SIDES], parts, bias, row, column, inside, rows, outputs * SIDES, BIAS, SPLITS)
            if SILU_MUL:
                up = _whole(y[t * 2 + 1], parts, bias, row, column + outputs, inside, rows, outputs * 2, BIAS, SPLITS)
                value = value / (1 + tl.exp(-value)) * up
            tl.store(out + row * outputs + column, value.to(out.dtype.element_ty), inside)
        if SPLITS > 1:
            tl.store(tickets + program, 0)


FEW = Kernel(_few)

# (rows, outputs, inputs) -> what `benchmarks/int4_kernels.py stage=tune` found fastest, for up to 8 and up to 16 rows
TUNED: dict[tuple[int, int, int], FewConfig] = {
    (8, 2048, 2048): FewConfig(1, 8, 1, 128, 2),
    (8, 2048, 11008): FewConfig(2, 4, 6, 256, 1),
    (8, 2560, 2048): FewConfig(1, 4, 1, 256, 2),
    (8, 22016, 2048): FewConfig(1, 4, 1, 128, 2),
    (16, 2048, 2048): FewConfig(1, 4, 1, 512, 1),
    (16, 2048, 11008): FewConfig(2, 4, 6, 128, 2),
    (16, 2560, 2048): FewConfig(1, 4, 1, 256, 2),
    (16, 22016, 2048): FewConfig(1, 2, 1, 128, 2),
}


def config_for(outputs: int, inputs: int, rows: int) -> FewConfig:
    """As tuned; else so that all codes of a warp are on their way at once, 64 or 128 bytes a thread, and some 20 warps
    stand on each multiprocessor of an H100 where there are outputs enough, which nobody has measured."""
    tuned = TUNED.get((8 if rows <= 8 else 16, outputs, inputs))
    if tuned is not None:
        return tuned
    if inputs > 2048:
        return FewConfig(1, 4, min(16, cdiv(inputs, 2048)), 128, 4)
    return FewConfig(1, 8, 1, 256, 1)


def few(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None = None,
    out: Tensor | None = None,
    config: FewConfig | None = None,
    silu_mul: bool = False,
) -> Tensor:
    """x bf16 [M, I], M at most MOST_ROWS, contiguous -> [M, O] in `out`'s float dtype, else bf16; [M, O / 2] with
    silu_mul, where the first half of the rows of W is the gate and silu(gate) * up comes out.

    weight: qweight, scales, zeros; groups of a power of two, at least 32, so that 4 threads have a word each; at
    least 16 outputs, 32 with silu_mul. Calls on two streams would share memory.
    """
    qweight, scales, zeros = weight
    rows, inputs = x.shape
    all_outputs, groups = scales.shape
    outputs = all_outputs // 2 if silu_mul else all_outputs
    config = config or config_for(all_outputs, inputs, rows)
    if out is None:
        out = torch.empty((rows, outputs), dtype=torch.bfloat16, device=x.device)
    group = inputs // groups
    programs = cdiv(outputs, 16 * config.tiles)
    splits = splits_of(config.splits, rows, all_outputs, programs)
    parts, tickets = room(x.device)
    constants = dict(
        INPUTS=inputs, G=group, BIAS=bias is not None, SILU_MUL=silu_mul, SPLITS=splits, TILES=config.tiles,
        ROWS=8 if rows <= 8 else 16, WARPS=config.warps, GROUPS=math.gcd(max(1, config.stretch // group), groups),
        AHEAD=config.ahead, DOT=tl.bfloat16 if x.is_cuda else tl.float32,
    )  # fmt: skip
    arguments = (x, qweight.view(torch.int32), scales, zeros, bias, parts, tickets, out, rows, outputs, SIXTEEN)
    FEW((programs, splits, 1), arguments, constants, num_warps=config.warps, num_stages=1)
    return out
