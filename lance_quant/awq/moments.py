"""`Moments`: second moments of what a site reads, in the folded layer's own terms, one matrix for all its linears.

Tasks weigh in by the energy of the linears' outputs, as in `score.OutputError`: the mean over the site's linears.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lance_quant.awq.score import SiteRows

FEW_SAMPLES = 4


@dataclass(frozen=True)
class Split:
    """A site's rows: `fit`, what rounding makes up for, and `judge`, what choices are made by; without a split all."""

    fit: SiteRows
    judge: SiteRows


def split_rows(rows: SiteRows, heldout: float) -> Split:
    """Every 1/heldout-th calibration sample of a task is held out, of four and more at least the last one, and of fewer
    samples every 1/heldout-th row: the same token comes as a captured row, in a kept sequence and in the next forward
    of its sample, and would be judged by what it was fitted to. Where a task has too few rows for that, none of any.
    """
    if not heldout:
        return Split(rows, rows)
    every = round(1 / heldout)
    held = torch.zeros_like(rows.task, dtype=torch.bool)
    for task in range(rows.tasks):
        at = (rows.task == task).nonzero().squeeze(1)
        turn = torch.arange(len(at), device=at.device)
        if rows.sample is not None:
            kinds, inverse = rows.sample[at].unique(return_inverse=True)
            if len(kinds) >= FEW_SAMPLES:
                turn = inverse + max(0, every - len(kinds))
        held[at] = turn % every == every - 1
        if len(at) < every:
            return Split(rows, rows)
    return Split(taken(rows, ~held), taken(rows, held))


def taken(rows: SiteRows, which: Tensor) -> SiteRows:
    """Some of the rows."""
    return replace(
        rows, rows=rows.rows[which], task=rows.task[which], sample=None if rows.sample is None else rows.sample[which]
    )


def second_moments(weights: Sequence[Tensor], rows: SiteRows, columns: Tensor) -> Tensor:
    """float32 [I, I] of rows / columns, for linears with source weights `weights` [O, I] each.

    columns: float32 [I], what folds multiplied the linears' columns by.
    """
    share = sum(rows.shares(weight) / len(weights) for weight in weights)
    return rows.weighed(share) / columns / columns[:, None]
