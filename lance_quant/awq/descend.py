"""`descend`: codes, steps and zero points of a compensated weight moved, one after another, to where the error in the
outputs is least (coordinate descent, as QuantEase, arXiv 2309.01885, with the steps and zero points of the groups).

Compensation never looks back: a column is rounded before it is known what the columns after it will take over. Here
every column is rounded anew against what all the others came to be, group by group, each time after the group's step
and zero point were fitted to its codes. Every move lowers the error; a pass that moves no code ends it, whatever
became of steps and zero points.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lance_quant.awq.clip import group_blocks
from lance_quant.awq.forms import form_of
from lance_quant.awq.rounding import Draft
from lance_quant.awq.score import TINY


@dataclass(frozen=True)
class Group:
    """A group's columns, as rows.

    codes, change (of the weight): [G, O], updated, as step and zero are: [O]; slope: half the gradient of the error
    [G, O], and push: what a larger step adds to it, used up; free: 1.0, or 0.0 where nothing may move [O]; within:
    second moments [G, G]; sums: of their rows [G]; pull: 1 / their diagonal [G].
    """

    codes: Tensor
    change: Tensor
    slope: Tensor
    push: Tensor
    step: Tensor
    zero: Tensor
    free: Tensor
    within: Tensor
    sums: Tensor
    pull: Tensor
    top: int


def descend(made: Draft, wanted: Tensor, moments: Tensor, damping: float, passes: int) -> Draft:
    """The draft moved by at most `passes` passes over all groups.

    wanted: float32 [O, I] whose outputs are to be met; moments: float32 [I, I] of what the linear reads; damping: share
    of the mean second moment that a change of any weight costs besides.
    """
    if not passes or not moments.diagonal().any():
        return made
    size, top = made.grid.group_size, made.grid.top
    damped = moments.clone()
    damped.diagonal().add_(damping * moments.diagonal().mean())
    blocks, pull = group_blocks(damped, size).contiguous(), damped.diagonal().reciprocal().view(-1, size)
    sums = blocks.sum(2)
    # columns as rows, so that each is read at one stretch
    codes = made.codes().view(made.latent.shape).T.contiguous()
    step, zero = made.step.T.contiguous(), made.zero.T.contiguous()
    free = (~made.constant.T).float()
    change = _values(codes, step, zero) - wanted.T
    through = form_of(descend_group, codes)
    of_group = list(zip(codes.split(size), change.split(size), damped.split(size), step, zero, free, strict=True))
    for _ in range(passes):
        before = codes.clone()
        for group, (code, moved, across, size_, origin, may) in enumerate(of_group):
            push = blocks[group] @ (code - origin)
            slope = across @ change
            through(Group(code, moved, slope, push, size_, origin, may, blocks[group], sums[group], pull[group], top))
        if torch.equal(before, codes):
            break
    latent = _values(codes, step, zero).T.contiguous()
    return replace(made, latent=latent, step=step.T.contiguous(), zero=zero.T.contiguous(), offset=None)


def _values(codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """[I, O] of codes [I, O], steps and zero points [I/G, O]."""
    return ((codes.view(len(step), -1, codes.shape[1]) - zero[:, None]) * step[:, None]).view(codes.shape)


def descend_group(group: Group) -> None:
    """The step, the zero point, then every code, each to the least error."""
    _fit_step(group)
    _fit_zero(group)
    _fit_codes(group)


def _fit_step(group: Group) -> None:
    """As bf16."""
    steps = group.codes - group.zero
    along, curve = (steps * group.slope).sum(0), (steps * group.push).sum(0)
    better = (group.step - along / curve.clamp(min=TINY)).to(torch.bfloat16).float()
    delta = better - group.step
    gain = (2 * along + delta * curve) * delta
    delta = torch.where((gain < 0) & (better > 0), delta * group.free, 0.0)
    group.step.add_(delta)
    group.change.addcmul_(steps, delta)
    group.slope.addcmul_(group.push, delta)


def _fit_zero(group: Group) -> None:
    """One up or down, where that helps."""
    along, curve = group.slope.sum(0), group.sums.sum()
    moved = (group.zero + along.sign()).clamp(0, group.top) - group.zero
    gain = group.step * (group.step * curve - 2 * along.abs())
    moved = torch.where(gain < 0, moved * group.free, 0.0)
    group.zero.add_(moved)
    group.change.sub_(moved * group.step)
    group.slope.addr_(group.sums, moved * group.step, alpha=-1)


def _fit_codes(group: Group) -> None:
    """Column after column."""
    for column, share in enumerate(group.pull.tolist()):
        code, slope = group.codes[column], group.slope[column]
        moved = torch.addcdiv(code, slope, group.step, value=-share)
        moved = moved.round_().clamp_(0, group.top).sub_(code).mul_(group.free)
        code += moved
        moved *= group.step
        group.change[column] += moved
        group.slope[column + 1 :].addr_(group.within[column + 1 :, column], moved)
