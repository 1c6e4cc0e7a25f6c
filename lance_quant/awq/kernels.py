"""The inner loops of `compensate` and `descend` as one Triton kernel each: a few hundred launches for a large linear in
place of a hundred thousand.

Output rows know nothing of each other. A program takes OUT of them through a block of columns one after another and
keeps what each column passed on in registers. Arrays lie as there: columns as rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lance_quant.awq.compensate import Columns
from lance_quant.awq.descend import Group

OUT = 16  # output rows of a program
HALF = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off again, it rounds half to even


@triton.jit
def _nearest(x, top):
    return tl.minimum(tl.maximum((tl.minimum(tl.maximum(x, -1.0), top + 1.0) + HALF) - HALF, 0.0), top)


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
    codes, change, slope, step, free, within, pull, count, outputs, top, COUNT: tl.constexpr, OUT: tl.constexpr
):
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    inside = out < outputs
    before = tl.arange(0, COUNT)
    passed = tl.zeros((COUNT, OUT), tl.float32)
    size = tl.load(step + out, mask=inside, other=1.0)
    may = tl.load(free + out, mask=inside, other=0.0)
    for column in range(count):
        at = column * outputs + out
        factor = tl.load(within + column * count + before, mask=before < column, other=0.0)
        slant = tl.load(slope + at, mask=inside, other=0.0) + tl.sum(passed * factor[:, None], 0)
        code = tl.load(codes + at, mask=inside, other=0.0)
        moved = (_nearest(code - tl.div_rn(slant * tl.load(pull + column), size), top) - code) * may
        delta = moved * size
        tl.store(codes + at, code + moved, mask=inside)
        tl.store(change + at, tl.load(change + at, mask=inside, other=0.0) + delta, mask=inside)
        passed = tl.where(before[:, None] == column, delta[None, :], passed)


def descend_block(group: Group) -> None:
    """As `descend.descend_block`."""
    count, outputs = group.codes.shape
    _descend[(triton.cdiv(outputs, OUT),)](
        group.codes, group.change, group.slope, group.step, group.free, group.within.contiguous(), group.pull,
        count, outputs, float(group.top), COUNT=triton.next_power_of_2(count), OUT=OUT, num_warps=1,
    )  # fmt: skip
