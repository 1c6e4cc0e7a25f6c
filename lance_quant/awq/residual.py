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
from lance_quant.checkpoint.layout import PATHS

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # shares of the mean second moment
SITE = "down"
HELD_EVERY = 4


@dataclass(frozen=True)
class Missing:
    """Of one path's tokens: inputs [n, I] of down_proj, what is missing from the layer's output [n, H], both times the
    root of what each counts. The first `fitted` of them are fitted to, the others, of whole sequences, judged by.
    """

    inputs: Tensor
    missing: Tensor
    fitted: int

    def error(self, change: Tensor) -> float:
        """What is still missing where down_proj's weight changes by [H, I], over all tokens."""
        return _squared(self.missing - self.inputs @ change.T)


def _squared(x: Tensor) -> float:
    return x.square().sum(dtype=torch.float64).item()


@torch.no_grad()
def missing_parts(block: Block, tensors: dict[str, Tensor], taught: Sequence[Lesson]) -> dict[str, Missing]:
    """Path -> what is missing with `tensors`, in which down_proj is the float one and the others are rounded."""
    sequences = [(lesson, row) for lesson in taught for row in range(len(lesson.counts))]
    places = {path: placed([_tokens(lesson, path) for lesson, _ in sequences]) for path in PATHS}
    made: dict[str, Missing] = {}
    for number, (lesson, row) in enumerate(sequences):
        out, rows = block.trace(tensors, lesson.batch.part([row]), [(path, SITE) for path in PATHS])
        root = lesson.counts[row].sqrt()[:, None]
        left = (lesson.wanted[row] - out[0]) * root
        for path in PATHS:
            if (path, SITE) not in rows:
                continue
            at, inputs = _at(lesson, path), rows[path, SITE][0]
            starts, fitted, total = places[path]
            if path not in made:
                room = (inputs.new_empty(total, inputs.shape[1]), left.new_empty(total, left.shape[1]))
                made[path] = Missing(*room, fitted)
            here = slice(starts[number], starts[number] + len(inputs))
            torch.mul(inputs, root[at], out=made[path].inputs[here])
            made[path].missing[here] = left[at]
    return made


def placed(counts: Sequence[int]) -> tuple[list[int], int, int]:
    """Where the tokens of each sequence go, `counts` of them, those that are judged by behind all others; where these
    begin; how many tokens there are."""
    there = [number for number, count in enumerate(counts) if count]
    held = set(there[HELD_EVERY - 1 :: HELD_EVERY] if len(there) >= HELD_EVERY else there[1:][-1:])
    starts, fitted, total = [0] * len(counts), 0, 0
    for judged in (False, True):
        for number in there:
            if (number in held) == judged:
                starts[number] = total
                total += counts[number]
        fitted = fitted if judged else total
    return starts, fitted, total


def _at(lesson: Lesson, path: str) -> Tensor:
    """bool [n]: the path's tokens."""
    return lesson.batch.latent if path == "gen" else ~lesson.batch.latent


def _tokens(lesson: Lesson, path: str) -> int:
    return int(_at(lesson, path).sum())


def make_up(part: Missing) -> Tensor | None:
    """The change of down_proj's weight, float32 [H, I]; None where nothing that was tried helps what was held out."""
    fit, inputs = part.inputs[: part.fitted], part.inputs[part.fitted :]
    left = part.missing[part.fitted :]
    if not len(inputs):
        return None
    moments, cross = fit.T @ fit, fit.T @ part.missing[: part.fitted]
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
