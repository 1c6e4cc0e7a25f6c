"""`make_up`: down_proj's weight moved towards what the layer's other linears, rounded, leave missing in its output.

The last linear of a layer reads many channels of every token: a ridge regression of the missing part on them finds what
it can say about it. How much of that is trusted is chosen on sequences that it was not fitted to, nothing included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lance_quant.awq.block import Block
from lance_quant.awq.lessons import Lesson

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # shares of the mean second moment
SITE = "down"
HELD_EVERY = 4


@dataclass(frozen=True)
class Missing:
    """Of one path's tokens: inputs [n, I] of down_proj, what is missing from the layer's output [n, H], both times the
    root of what each counts; held: bool [n], tokens of sequences that are only judged by.
    """

    inputs: Tensor
    missing: Tensor
    held: Tensor

    def error(self, change: Tensor) -> float:
        """What is still missing where down_proj's weight changes by [H, I], over all tokens."""
        return _squared(self.missing - self.inputs @ change.T)


def _squared(x: Tensor) -> float:
    return x.square().sum(dtype=torch.float64).item()


@torch.no_grad()
def missing_parts(block: Block, tensors: dict[str, Tensor], taught: Sequence[Lesson]) -> dict[str, Missing]:
    """Path -> what is missing with `tensors`, in which down_proj is the float one and the others are rounded."""
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    number = 0
    for lesson in taught:
        for row in range(len(lesson.counts)):
            out, rows = block.trace(tensors, lesson.batch.part([row]), [("und", SITE), ("gen", SITE)])
            root = lesson.counts[row].sqrt()[:, None]
            left = (lesson.wanted[row] - out[0]) * root
            for path, at in (("und", ~lesson.batch.latent), ("gen", lesson.batch.latent)):
                if (path, SITE) in rows:
                    inputs = rows[path, SITE][0] * root[at]
                    parts.setdefault(path, []).append((inputs, left[at], torch.full((len(inputs),), number)))
            number += 1
    made = {}
    for path, found in parts.items():
        inputs, left, numbers = (torch.cat(column) for column in zip(*found, strict=True))
        order = torch.unique_consecutive(numbers)
        last = order[HELD_EVERY - 1 :: HELD_EVERY] if len(order) >= HELD_EVERY else order[1:][-1:]
        made[path] = Missing(inputs, left, torch.isin(numbers, last).to(inputs.device))
    return made


def make_up(part: Missing) -> Tensor | None:
    """The change of down_proj's weight, float32 [H, I]; None where nothing that was tried helps what was held out."""
    if not part.held.any():
        return None
    fit, judge = ~part.held, part.held
    inputs, left = part.inputs[judge], part.missing[judge]
    moments, cross = part.inputs[fit].T @ part.inputs[fit], part.inputs[fit].T @ part.missing[fit]
    least, best = _squared(left), None
    for ridge in RIDGES:
        change = _solved(moments, cross, ridge)
        error = least if change is None else _squared(left - inputs @ change.T)
        if error < least:
            least, best = error, ridge
    if best is None:
        return None
    return _solved(moments + inputs.T @ inputs, cross + inputs.T @ left, best)


def _solved(moments: Tensor, cross: Tensor, ridge: float) -> Tensor | None:
    """Ridge regression, transposed; None where the damped second moments have no Cholesky factor."""
    damped = moments.clone()
    damped.diagonal().add_(ridge * moments.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    return None if failed else torch.cholesky_solve(cross, factor).T.contiguous()
