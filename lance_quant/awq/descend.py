"""`descend`: codes, steps and zero points of a compensated weight moved, one after another, to where the error in the
outputs is least (coordinate descent, as QuantEase, arXiv 2309.01885, with the steps and zero points of the groups).

Compensation never looks back: a column is rounded before it is known what the columns after it will take over. Here
every column is rounded anew against what all the others came to be, group by group, each time after the group's step
and zero point were fitted to its codes. Every move lowers the error; a pass that moves nothing ends it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lance_quant.awq.compensate import on_triton
from lance_quant.awq.rounding import Draft


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
    pull = damped.diagonal().reciprocal()
    # columns as rows, so that each is read at one stretch
    codes = made.codes().view(made.latent.shape).T.contiguous()
    step, zero = made.step.T.contiguous(), made.zero.T.contiguous()
    free = (~made.constant.T).float()
    change = _values(codes, step, zero) - wanted.T
    through = block_of(codes)
    for _ in range(passes):
        before = codes.clone()
        for group in range(len(step)):
            at = slice(group * size, (group + 1) * size)
            within, slope = damped[at, at], damped[at] @ change
            _fit_step(codes[at] - zero[group], change[at], slope, step[group], free[group], within)
            _fit_zero(change[at], slope, step[group], zero[group], free[group], within, top)
            through(codes[at], change[at], slope, step[group], free[group], within, pull[at], top)
        if torch.equal(before, codes):
            break
    latent = _values(codes, step, zero).T.contiguous()
    return replace(made, latent=latent, step=step.T.contiguous(), zero=zero.T.contiguous(), offset=None)


def _values(codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """[I, O] of codes [I, O], steps and zero points [I/G, O]."""
    return ((codes.view(len(step), -1, codes.shape[1]) - zero[:, None]) * step[:, None]).view(codes.shape)


def _fit_step(steps: Tensor, change: Tensor, slope: Tensor, step: Tensor, free: Tensor, within: Tensor) -> None:
    """The step [O] of a group to the least error, as bf16; steps: code - zero point [G, O]."""
    push = within @ steps
    along, curve = (steps * slope).sum(0), (steps * push).sum(0)
    better = (step - along / curve.clamp(min=1e-30)).to(torch.bfloat16).float()
    delta = better - step
    gain = (2 * along + delta * curve) * delta
    delta = torch.where((gain < 0) & (better > 0), delta * free, 0.0)
    step += delta
    change.addcmul_(steps, delta)
    slope.addcmul_(push, delta)


def _fit_zero(
    change: Tensor, slope: Tensor, step: Tensor, zero: Tensor, free: Tensor, within: Tensor, top: int
) -> None:
    """The zero point [O] of a group one up or down, where that helps."""
    push = within.sum(1, keepdim=True)
    along, curve = slope.sum(0), push.sum()
    moved = (zero + along.sign()).clamp(0, top) - zero
    gain = step * (step * curve - 2 * along.abs())
    moved = torch.where(gain < 0, moved * free, 0.0)
    zero += moved
    change -= moved * step
    slope -= push * (moved * step)


def block_of(x: Tensor):
    """`descend_block`, one kernel where there is a GPU."""
    if not on_triton(x):
        return descend_block
    from lance_quant.awq import kernels

    return kernels.descend_block


def descend_block(
    codes: Tensor, change: Tensor, slope: Tensor, step: Tensor, free: Tensor, within: Tensor, pull: Tensor, top: int
) -> None:
    """Each column of a group in turn to the code of least error.

    codes, change (of the weight), slope (half the gradient of the error): [G, O], the first two are updated; step, free
    (1.0, or 0.0 where nothing may move): [O]; within: second moments [G, G]; pull: 1 / their diagonal.
    """
    for column, share in enumerate(pull.tolist()):
        moved = torch.addcdiv(codes[column], slope[column], step, value=-share)
        moved = moved.round_().clamp_(0, top).sub_(codes[column]).mul_(free)
        codes[column] += moved
        moved *= step
        change[column] += moved
        slope[column + 1 :].addr_(within[column + 1 :, column], moved)
