"""The inner loops of `compensate`, `descend`, `clip` and `score` as one Triton kernel each: a few hundred launches for
a large linear in place of a hundred thousand.

Output rows know nothing of each other. Through a block of columns a program takes OUT of them one column after another
and keeps what each passed on in registers; arrays lie as there, columns as rows. A clip tries every pair of shares on
one group of ROWS rows, which it reads once; its products run on tensor cores, each float32 as two tf32 (three of the
four partial products: 22 bits). As float32 multiply-adds they do not fit into registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lance_quant.awq import clip, score
from lance_quant.awq.compensate import Columns
from lance_quant.awq.config import RecipeConfig
from lance_quant.awq.descend import Group
from lance_quant.awq.grid import MIN_SCALE, Grid
from lance_quant.awq.rounding import Draft

OUT = 16  # output rows of a program
ROWS = 64  # of a clip's program: the fewest that Hopper's tensor cores take
TILE = 2048  # weights of a rounding's program
WIDEST = 128  # columns of a group whose second moments fit into shared memory
HALF = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off again, it rounds half to even
FLOOR, TINY = tl.constexpr(MIN_SCALE), tl.constexpr(score.TINY)


@triton.jit
def _nearest(x, top):
    return tl.minimum(tl.maximum((tl.minimum(tl.maximum(x, -1.0), top + 1.0) + HALF) - HALF, 0.0), top)


@triton.jit
def _bf16(x):
    """Rounded to bf16 half to even, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _compensate(
    block, exact, fixed, step, zero, onward, share, errors, count, outputs, top,
    HOLDS: tl.constexpr, COUNT: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    inside = out < outputs
    before = tl.arange(0, COUNT)
    passed = tl.zeros((COUNT, OUT), tl.float32)
    for column in range(count):
        at = column * outputs + out
        factor = tl.load(onward + before * count + column, mask=before < column, other=0.0)
        wanted = tl.load(block + at, mask=inside, other=0.0) - tl.sum(passed * factor[:, None], 0)
        if HOLDS:
            held = tl.load(fixed + at, mask=inside, other=0) != 0
            wanted = tl.where(held, tl.load(exact + at, mask=inside, other=0.0), wanted)
        size = tl.load(step + at, mask=inside, other=1.0)
        origin = tl.load(zero + at, mask=inside, other=0.0)
        code = _nearest(tl.div_rn(wanted, size) + origin, top)
        error = (wanted - (code - origin) * size) * tl.load(share + column)
        tl.store(block + at, wanted, mask=inside)
        tl.store(errors + at, error, mask=inside)
        passed = tl.where(before[:, None] == column, error[None, :], passed)


def compensate_block(block: Columns) -> Tensor:
    """As `compensate.compensate_block`."""
    count, outputs = block.latent.shape
    errors = torch.empty_like(block.latent)
    holds = block.exact is not None
    exact, fixed = (block.exact, block.fixed.contiguous()) if holds else (block.latent, block.latent)
    _compensate[(triton.cdiv(outputs, OUT),)](
        block.latent, exact, fixed, block.step.contiguous(), block.zero.contiguous(), block.onward.contiguous(),
        block.share.contiguous(), errors, count, outputs, float(block.top),
        HOLDS=holds, COUNT=triton.next_power_of_2(count), OUT=OUT, num_warps=1,
    )  # fmt: skip
    return errors


@triton.jit
def _descend(
    codes, change, slope, push, step, zero, free, within, sums, pull, count, outputs, top,
    COUNT: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    inside = out < outputs
    before = tl.arange(0, COUNT)
    size = tl.load(step + out, mask=inside, other=1.0)
    origin = tl.load(zero + out, mask=inside, other=0.0)
    may = tl.load(free + out, mask=inside, other=0.0)

    all_ = before[:, None] * outputs + out[None, :]
    there = (before < count)[:, None] & inside[None, :]
    slopes = tl.load(slope + all_, mask=there, other=0.0)
    pushes = tl.load(push + all_, mask=there, other=0.0)
    steps = tl.load(codes + all_, mask=there, other=0.0) - origin[None, :]
    along, curve = tl.sum(steps * slopes, 0), tl.sum(steps * pushes, 0)
    better = _bf16(size - tl.div_rn(along, tl.maximum(curve, TINY)))
    grown = better - size
    gain = (2 * along + grown * curve) * grown
    grown = tl.where((gain < 0) & (better > 0), grown * may, 0.0)
    size += grown

    along = tl.sum(slopes + pushes * grown[None, :], 0)
    curve = tl.sum(tl.load(sums + before, mask=before < count, other=0.0), 0)
    aside = tl.where(along > 0, 1.0, tl.where(along < 0, -1.0, 0.0))
    aside = tl.minimum(tl.maximum(origin + aside, 0.0), top) - origin
    gain = size * (size * curve - 2 * tl.abs(along))
    aside = tl.where(gain < 0, aside * may, 0.0)
    shift = aside * size

    passed = tl.zeros((COUNT, OUT), tl.float32)
    for column in range(count):
        at = column * outputs + out
        factor = tl.load(within + column * count + before, mask=before < column, other=0.0)
        slant = tl.load(slope + at, mask=inside, other=0.0) + tl.load(push + at, mask=inside, other=0.0) * grown
        slant += tl.sum(passed * factor[:, None], 0) - tl.load(sums + column) * shift
        code = tl.load(codes + at, mask=inside, other=0.0)
        moved = (_nearest(code - tl.div_rn(slant * tl.load(pull + column), size), top) - code) * may
        delta = moved * size
        ahead = tl.load(change + at, mask=inside, other=0.0) + (code - origin) * grown - shift
        tl.store(codes + at, code + moved, mask=inside)
        tl.store(change + at, ahead + delta, mask=inside)
        passed = tl.where(before[:, None] == column, delta[None, :], passed)
    tl.store(step + out, size, mask=inside)
    tl.store(zero + out, origin + aside, mask=inside)


def descend_group(group: Group) -> None:
    """As `descend.descend_group`; slope and push stay as they are."""
    count, outputs = group.codes.shape
    _descend[(triton.cdiv(outputs, OUT),)](
        group.codes, group.change, group.slope, group.push, group.step, group.zero, group.free,
        group.within.contiguous(), group.sums, group.pull, count, outputs, float(group.top),
        COUNT=triton.next_power_of_2(count), OUT=OUT, num_warps=1,
    )  # fmt: skip


@triton.jit
def _clip(
    latent, blocks, constant, step, zero, below, above, outputs, size, groups, top, least, STEPS: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    inside = (row < outputs)[:, None] & (column < size)[None, :]
    weight = tl.load(latent + row.to(tl.int64)[:, None] * size * groups + group * size + column, mask=inside, other=0.0)
    square = (column < size)[:, None] & (column < size)[None, :]
    at = group.to(tl.int64) * size * size + column[:, None] * size + column[None, :]
    moments = tl.load(blocks + at, mask=square, other=0.0)
    low, high = tl.minimum(tl.min(weight, 1), 0.0), tl.maximum(tl.max(weight, 1), 0.0)
    best = tl.full((ROWS,), float("inf"), tl.float32)
    best_step, best_zero, best_below, best_above = best, best, best, best
    taken = (1 - least) / (STEPS - 1)
    for number in range(STEPS * STEPS):
        share_low, share_high = 1 - taken * (number // STEPS), 1 - taken * (number % STEPS)
        bottom, upper = low * share_low, high * share_high
        size_ = _bf16(tl.maximum(tl.div_rn(upper - bottom, top), FLOOR))
        origin = _nearest(tl.div_rn(-bottom, size_), top)
        code = _nearest(weight * (1 / size_)[:, None] + origin[:, None], top)
        change = tl.where(inside, (code - origin[:, None]) * size_[:, None] - weight, 0.0)
        error = tl.sum(tl.dot(change, moments, input_precision="tf32x3") * change, 1)
        better = error < best
        best = tl.where(better, error, best)
        best_step, best_zero = tl.where(better, size_, best_step), tl.where(better, origin, best_zero)
        best_below = tl.where(better, share_low, best_below)
        best_above = tl.where(better, share_high, best_above)
    at = row * groups + group
    may = row < outputs
    stays = tl.load(constant + at, mask=may, other=1) != 0
    tl.store(step + at, best_step, mask=may & ~stays)
    tl.store(zero + at, best_zero, mask=may & ~stays)
    tl.store(below + at, tl.where(stays, 1.0, best_below), mask=may)
    tl.store(above + at, tl.where(stays, 1.0, best_above), mask=may)


def clip_rows(made: Draft, blocks: Tensor, recipe: RecipeConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `clip.clip_rows`."""
    outputs, groups = made.step.shape
    size = made.grid.group_size
    if size > WIDEST:
        return clip.clip_rows(made, blocks, recipe)
    wide = max(16, triton.next_power_of_2(size))
    step, zero = made.step.clone(), made.zero.clone()
    below, above = torch.empty_like(step), torch.empty_like(step)
    _clip[(triton.cdiv(outputs, ROWS), groups)](
        made.latent.contiguous(), blocks.contiguous(), made.constant.contiguous(), step, zero, below, above,
        outputs, size, groups, float(made.grid.top), recipe.clip_least,
        STEPS=recipe.clip_steps, SIZE=wide, ROWS=ROWS, num_warps=4 if wide <= 64 else 8,
    )  # fmt: skip
    return step, zero, below, above


@triton.jit
def _rounding(
    weight, columns, change, outputs, size, groups, top, SIZE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    inside = (row < outputs)[:, None] & (column < size)[None, :]
    at = row.to(tl.int64)[:, None] * size * groups + group * size + column
    was = tl.load(weight + at, mask=inside, other=0.0)
    factor = tl.load(columns + group * size + column, mask=column < size, other=1.0)[None, :]
    scaled = was * factor
    low = tl.min(tl.where(inside, scaled, float("inf")), 1)
    high = tl.max(tl.where(inside, scaled, float("-inf")), 1)
    constant = (low == high) & (low != 0)  # as in `grid.step_and_zero`
    bottom, upper = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    step = tl.where(constant, tl.abs(low), tl.div_rn(upper - bottom, top))
    step = _bf16(tl.maximum(step, FLOOR))
    zero = _nearest(tl.div_rn(-bottom, step), top)
    code = _nearest(tl.div_rn(scaled, step[:, None]) + zero[:, None], top)
    rounded = (code - zero[:, None]) * step[:, None]
    tl.store(change + at, tl.div_rn(rounded, factor) - was, mask=inside)


def rounding_change(weight: Tensor, columns: Tensor, grid: Grid) -> Tensor:
    """As `score.rounding_change`."""
    if not (grid.zero_in_range and grid.bf16_scale_codes):
        return score.rounding_change(weight, columns, grid)
    outputs, size = len(weight), grid.group_size
    groups, wide = weight.shape[1] // size, triton.next_power_of_2(size)
    rows = max(1, TILE // wide)
    change = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    _rounding[(triton.cdiv(outputs, rows), groups)](
        weight.contiguous(), columns.contiguous(), change, outputs, size, groups, float(grid.top),
        SIZE=wide, ROWS=rows,
    )  # fmt: skip
    return change
