"""`compensate`: rounding column by column, each error made up for by the columns that follow (GPTQ, arXiv 2210.17323).

Columns go in the order of their second moment, the largest first, each against the step and zero point that its group
had from the start: the stored layout does not know of the order.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lance_quant.awq.rounding import Draft

COLUMNS = 128  # updated at once; what follows is updated when they are done
MOST_DAMPING = 1e6


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped second moments [I, I], float32.

    damping: share of the mean second moment that is added to the diagonal, ten times as much until both factors exist.
    """
    diagonal = torch.arange(len(moments), device=moments.device)
    mean = moments[diagonal, diagonal].mean()
    while damping < MOST_DAMPING:
        damped = moments / mean
        damped[diagonal, diagonal] += damping
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and upper.isfinite().all():
                return upper
        damping *= 10
    return torch.eye(len(moments), device=moments.device)


def compensate(made: Draft, moments: Tensor, damping: float) -> Draft:
    """The draft with its latent weight as each column stood when it was rounded.

    moments: float32 [I, I] of what the linear reads. Channels that are always 0 neither take nor give.
    """
    if not moments.diagonal().any():
        return made
    order = moments.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(moments[order][:, order], damping)
    group = torch.arange(len(moments), device=moments.device)[order] // made.grid.group_size
    # columns as rows, so that each is read at one stretch
    columns = made.latent.T[order].contiguous()
    step, zero = made.step.T[group], made.zero.T[group]
    fixed = made.constant.T[group]
    exact = columns.clone() if fixed.any() else None
    share = (1 / factor.diagonal()).tolist()
    for start in range(0, len(columns), COLUMNS):
        end = min(start + COLUMNS, len(columns))
        block = columns[start:end]
        errors = torch.empty_like(block)
        within = factor[start:end, start:end]
        parts = zip(*(part.unbind() for part in (block, errors, step[start:end], zero[start:end], within)), strict=True)
        for at, (column, error, size, origin, onward) in enumerate(parts):
            wanted = column
            if exact is not None:
                wanted = torch.where(fixed[start + at], exact[start + at], column)
            code = torch.addcdiv(origin, wanted, size).round_().clamp_(0, made.grid.top).sub_(origin)
            torch.addcmul(column, code, size, value=-1, out=error).mul_(share[start + at])
            if exact is not None:
                column.copy_(wanted)
            block[at + 1 :].addr_(onward[at + 1 :], error, alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    latent = torch.empty_like(columns)
    latent[order] = columns
    return replace(made, latent=latent.T.contiguous())
