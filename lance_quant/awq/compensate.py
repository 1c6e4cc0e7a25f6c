"""`Compensation`: rounding column by column, each error made up for by the columns after it (GPTQ, arXiv 2210.17323).

Columns go in the order of their second moment, the largest first, each against the step and zero point that its group
had from the start: the stored layout does not know of the order.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lance_quant.awq.forms import form_of
from lance_quant.awq.rounding import Draft

COLUMNS = 128  # updated at once; what follows is updated when they are done
MOST_DAMPING = 1e6


@dataclass(frozen=True)
class Columns:
    """A block of columns, as rows. latent, step, zero, fixed: [C, O], latent becomes what each column was when it was
    rounded; exact: what `fixed` entries stay, None where there are none; onward: [C, C], what an error takes off later
    columns; share: [C], 1 / its diagonal.
    """

    latent: Tensor
    exact: Tensor | None
    fixed: Tensor
    step: Tensor
    zero: Tensor
    onward: Tensor
    share: Tensor
    top: int


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped second moments [I, I], float32.

    damping: share of the mean second moment that is added to the diagonal, ten times as much until the factor exists.
    """
    mean = moments.diagonal().mean()
    one = torch.eye(len(moments), device=moments.device)
    while damping < MOST_DAMPING:
        # back to front, so that the inverse of the lower factor, turned round again, is the upper factor of the inverse
        damped = (moments / mean).flip(0, 1)
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper = torch.linalg.solve_triangular(lower, one, upper=False).flip(0, 1)
            if upper.isfinite().all():
                return upper
        damping *= 10
    return one


class Compensation:
    """What inputs of some second moments ask of every weight that reads them.

    moments: float32 [I, I]; damping: as for `inverse_factor`. Channels that are always 0 neither take nor give.
    """

    def __init__(self, moments: Tensor, damping: float):
        self.order = moments.diagonal().argsort(descending=True, stable=True)
        self.factor = None
        if moments.diagonal().any():
            self.factor = inverse_factor(moments[self.order][:, self.order], damping)

    def __call__(self, made: Draft) -> Draft:
        """The draft with its latent weight as each column stood when it was rounded."""
        order, factor = self.order, self.factor
        if factor is None:
            return made
        group = torch.arange(len(order), device=order.device)[order] // made.grid.group_size
        # columns as rows, so that each is read at one stretch
        columns = made.latent.T[order].contiguous()
        step, zero, fixed = made.step.T[group], made.zero.T[group], made.constant.T[group]
        exact = columns.clone() if fixed.any() else None
        share = 1 / factor.diagonal()
        through = form_of(compensate_block, columns)
        for start in range(0, len(columns), COLUMNS):
            at = slice(start, min(start + COLUMNS, len(columns)))
            held = None if exact is None else exact[at]
            block = Columns(columns[at], held, fixed[at], step[at], zero[at], factor[at, at], share[at], made.grid.top)
            columns[at.stop :].addmm_(factor[at, at.stop :].T, through(block), alpha=-1)
        latent = torch.empty_like(columns)
        latent[order] = columns
        return replace(made, latent=latent.T.contiguous())


def compensate_block(block: Columns) -> Tensor:
    """Round a block of columns one after another; returns the errors that they pass on [C, O], each times its share."""
    errors = torch.empty_like(block.latent)
    parts = (block.latent, errors, block.step, block.zero, block.onward)
    parts = zip(*(part.unbind() for part in parts), block.share.tolist(), strict=True)
    for at, (column, error, size, origin, onto, part) in enumerate(parts):
        if block.exact is not None:
            column.copy_(torch.where(block.fixed[at], block.exact[at], column))
        code = torch.addcdiv(origin, column, size).round_().clamp_(0, block.top).sub_(origin)
        torch.addcmul(column, code, size, value=-1, out=error).mul_(part)
        block.latent[at + 1 :].addr_(onto[at + 1 :], error, alpha=-1)
    return errors
